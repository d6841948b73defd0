"""Ctrl-C, SIGTERM and SIGUSR1 stop between two steps, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from gamma_po.checkpoints import save_whole
from gamma_po.ranks import Ranks, current_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what SLURM is often told to send
SLURM_ADVICE = (
    "SLURM: this job does not requeue itself. With `#SBATCH --signal=TERM@120` it stops with a checkpoint and status "
    "130 two minutes before its end; let the batch script then call `scontrol requeue`, and give --ckpt_path last"
)
log = logging.getLogger(__name__)


class StopBetweenSteps(Callback):
    """On the first SIGINT, SIGTERM or SIGUSR1, finish the step, save `checkpoints/interrupted.ckpt` and stop.

    With several processes it is enough that one of them is told: after each step they tell each other, save together
    and stop at the same step. A second Ctrl-C stops at once; the last regular checkpoint remains. (With several
    processes it does not count: launchers pass a signal on that a process may have received already.)

    In a validation during training it stops after a batch of it, with the state of the step before. A run that goes on
    from there trains on with the same bits, but is without that validation.

    While data is read, the reference scored and a checkpoint loaded, a signal stops at once: what is on disk then is
    whole and is used by the next run. From there to the first step all processes stop together, without a checkpoint.

    Lightning's own handlers are not registered: they talk to the other processes, wherever these are. What it does in
    a SLURM job is switched off, too: it would write a checkpoint in the middle of a step, over the one before, where
    all runs of a folder write theirs.
    """

    def __init__(self) -> None:
        self._received = self._saved = False
        self._alone = True
        self._ranks: Ranks = current_ranks()
        self._previous: dict[int, Any] = {}
        self._at_step: dict[str, Any] | None = None  # Lightning's counters after a step, until its validation is over
        self._in_validation = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing of a SLURM job's signals to Lightning, which looks at this later."""
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            environment.auto_requeue = False
            if trainer.is_global_zero:
                log.warning(SLURM_ADVICE)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals: until all is loaded they stop at once, and from then on between steps.

        Lightning calls no hook on every run where it registers its handlers, so these are taken in its place.
        """
        self._received = self._saved = self._in_validation = False
        self._take(self._stop_at_once)
        trainer._signal_connector.register_signal_handlers = lambda: self._wait_for_steps(trainer)

    def _wait_for_steps(self, trainer: Trainer) -> None:
        del trainer._signal_connector.register_signal_handlers  # of this object: the class has Lightning's own
        if trainer.fit_loop.skip:  # nothing is left to train
            return
        self._ranks = current_ranks()
        self._alone = self._ranks.world_size == 1
        self._take(self._remember)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, if a signal came before."""
        self._stop_before_steps(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a signal came, unless gradients of an unfinished step would be lost."""
        self._at_step = None
        if trainer.fit_loop._should_accumulate():
            return
        if self._someone_received():
            self._save(trainer)
        elif trainer.fit_loop.epoch_loop._should_check_val_epoch():  # on all ranks alike, unlike whether it is time
            self._at_step = trainer.fit_loop.state_dict()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and stop if a signal came: a validation may be long."""
        if trainer.sanity_checking:
            self._stop_before_steps(trainer)
        if self._at_step is not None and self._someone_received():
            self._in_validation = True
            self._save(trainer)
            self._stop_if_saved()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say that the validation has not begun: Lightning would go on with the rest of it alone."""
        if self._in_validation:
            checkpoint["loops"]["fit_loop"] = self._at_step

    def _save(self, trainer: Trainer) -> None:
        """Write the checkpoint and say how to go on."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"
        save_whole(trainer, path)
        self._saved = True
        if trainer.is_global_zero:
            where = f"stopped after step {trainer.global_step}"
            if self._in_validation:
                where += ", in a validation, which is not made up for"
            if trainer.global_step == trainer.max_steps:
                log.warning(f"{where}. It was the last step: the trained policy is in {path}, for export --policy")
            else:
                log.warning(
                    f"{where}; to continue, repeat the command with --ckpt_path {path}; without it, the same command "
                    "starts anew in a directory of its own"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop: the loggers have the saved step by now."""
        self._stop_if_saved()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, if the saved step was the last before a validation."""
        self._stop_if_saved()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, if the saved step was the last of its epoch."""
        self._stop_if_saved()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is complete: from here on a signal stops at once, also one that came during the last validation."""
        received, self._at_step = self._someone_received(), None
        self._restore()
        if received:
            log.warning("stopped after the last step; what `fit` does after training (export, report) may be missing")
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back after an error, too: Lightning calls no `teardown` then."""
        vars(trainer._signal_connector).pop("register_signal_handlers", None)
        if not isinstance(exception, KeyboardInterrupt):  # then Lightning ignores Ctrl-C until the process ends
            self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _stop_before_steps(self, trainer: Trainer) -> None:
        """Stop where a checkpoint would say no more than the one that the run goes on from, if any."""
        if self._someone_received():
            self._restore()
            if trainer.is_global_zero:
                log.warning("stopped before the first step; no checkpoint is written, repeat the command as it is")
            raise KeyboardInterrupt

    def _someone_received(self) -> bool:
        """Whether this process or another was told to stop; all of them ask at the same moments."""
        return bool(self._ranks.all_gather(torch.tensor([self._received])).any())

    def _stop_if_saved(self) -> None:
        if self._saved:
            self._restore()
            raise KeyboardInterrupt

    def _take(self, handler: Any) -> None:
        for number in SIGNALS:
            before = signal.signal(number, handler)
            self._previous.setdefault(number, before)

    def _stop_at_once(self, number: int, frame: Any) -> None:
        self._received = True  # Python drops what is raised in a finalizer or a weak reference's callback: asked later
        raise KeyboardInterrupt

    def _remember(self, number: int, frame: Any) -> None:
        if self._received and self._alone:
            self._restore()
            raise KeyboardInterrupt
        self._received = True
        # Not through logging: the handler may have interrupted a write.
        once_more = b"; once more stops at once" if self._alone else b""
        os.write(sys.__stderr__.fileno(), b"\nstopping after this step" + once_more + b"\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
