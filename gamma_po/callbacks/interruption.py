"""Ctrl-C and SIGTERM stop between two steps, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class StopBetweenSteps(Callback):
    """On the first SIGINT or SIGTERM, finish the step, save `checkpoints/interrupted.ckpt` and stop.

    A second Ctrl-C stops at once; the last regular checkpoint remains. With several processes the signals keep
    Lightning's own handling, because ranks could otherwise stop at different steps.
    """

    def __init__(self) -> None:
        self._received = self._saved = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        self._received = self._saved = False
        if trainer.world_size > 1:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a signal came, unless gradients of an unfinished step would be lost."""
        if not self._received or trainer.fit_loop._should_accumulate():
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        self._saved = True
        log.warning(
            "stopped after step %s; to continue, repeat the command with --ckpt_path %s; without it, the same command "
            "starts anew in a directory of its own",
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
        self._restore()
        if self._received:
            log.warning("stopped after the last step; what `fit` does after training (export, report) may be missing")
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _stop_if_saved(self) -> None:
        if self._saved:
            self._restore()
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: Any) -> None:
        if self._received:
            self._restore()
            raise KeyboardInterrupt
        self._received = True
        # Not through logging: the handler may have interrupted a write.
        os.write(sys.__stderr__.fileno(), b"\nstopping after this step; once more stops at once\n")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
