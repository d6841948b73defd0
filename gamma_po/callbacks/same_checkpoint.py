"""All processes go on from one checkpoint, or none of them does."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from gamma_po.ckpt_path import check_same_checkpoint
from gamma_po.ranks import current_ranks


class SameCheckpoint(Callback):
    """Refuses to start where the processes have found different checkpoints, of which each would load its own.

    Args:
        found: what this process has found for `ckpt_path`, in words that say which it is.
    """

    def __init__(self, found: str) -> None:
        self.found = found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare before anything is loaded: the processes are not yet connected when the command line is read."""
        check_same_checkpoint(current_ranks(), self.found)
