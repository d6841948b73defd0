"""Ctrl-C and SIGTERM stop between two steps, with a checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class StopBetweenSteps(Callback):
    """On the first SIGINT or SIGTERM, finish the step, save `checkpoints/interrupted.ckpt` and stop.

    A second Ctrl-C stops at once; the last regular checkpoint remains. With several processes the signals keep
    Lightning's own handling, because ranks could otherwise stop at different steps.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals."""
        if trainer.world_size > 1:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if a signal came, unless gradients of an unfinished step would be lost."""
        finished = trainer.fit_loop._should_accumulate() is False
        if self._received is None or not finished:
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_warn(
            f"stopped after step {trainer.global_step}; to continue, repeat the command with --ckpt_path {path}; "
            "without it, the same command starts anew in a directory of its own"
        )
        self._restore()
        raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def _remember(self, number: int, frame: Any) -> None:
        if self._received is not None:
            self._restore()
            raise KeyboardInterrupt
        self._received = number

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
