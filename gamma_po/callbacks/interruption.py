"""Ctrl-C and SIGTERM stop between two steps, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gamma_po.checkpoints import save_whole
from gamma_po.ranks import Ranks, current_ranks

log = logging.getLogger(__name__)


class StopBetweenSteps(Callback):
    """On the first SIGINT or SIGTERM, finish the step, save `checkpoints/interrupted.ckpt` and stop.

    With several processes it is enough that one of them is told: after each step they tell each other, save together
    and stop at the same step. A second Ctrl-C stops at once; the last regular checkpoint remains. (With several
    processes it does not count: launchers pass a signal on that a process may have received already.)

    Before the first step, while data is read and the reference scored, a signal stops at once: what is on disk then
    is whole and is used by the next run.
    """

    def __init__(self) -> None:
        self._received = self._saved = False
        self._alone = True
        self._ranks: Ranks = current_ranks()
        self._previous: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals: until training starts they stop at once."""
        self._take(signal.default_int_handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on they stop between steps."""
        self._received = self._saved = False
        self._ranks = current_ranks()
        self._alone = self._ranks.world_size == 1
        self._take(self._remember)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a signal came, unless gradients of an unfinished step would be lost."""
        if trainer.fit_loop._should_accumulate() or not self._someone_received():
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"
        save_whole(trainer, path)
        self._saved = True
        if trainer.is_global_zero:
            log.warning(
                "stopped after step %s; to continue, repeat the command with --ckpt_path %s; without it, the same "
                "command starts anew in a directory of its own",
                trainer.global_step,
                path,
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
        received = self._someone_received()
        self._restore()
        if received:
            log.warning("stopped after the last step; what `fit` does after training (export, report) may be missing")
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _someone_received(self) -> bool:
        """Whether this process or another was told to stop; all of them ask at the same moments."""
        return bool(self._ranks.all_gather(torch.tensor([self._received])).any())

    def _stop_if_saved(self) -> None:
        if self._saved:
            self._restore()
            raise KeyboardInterrupt

    def _take(self, handler: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, handler)
            self._previous.setdefault(number, before)

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
