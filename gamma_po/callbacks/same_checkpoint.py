"""All processes go on from one checkpoint, or none of them does."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gamma_po.errors import ConfigError
from gamma_po.ranks import Ranks, current_ranks, lines_of_all


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

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare what was loaded: a run that is still ending may have replaced the file meanwhile."""
        check_same_checkpoint(current_ranks(), f"step {checkpoint['global_step']}")


def check_same_checkpoint(ranks: Ranks, found: str) -> None:
    """Refuse different checkpoints, on all ranks with the same message.

    Args:
        ranks: the processes of the run.
        found: by this one.

    Raises:
        ConfigError: saying what each has found.
    """
    everyone = lines_of_all(ranks, found)
    if len(set(everyone)) > 1:
        each = "; ".join(f"process {rank} {line}" for rank, line in enumerate(everyone))
        raise ConfigError(
            f"ckpt_path: the processes have found different checkpoints: {each}; allowed: one file that all of them "
            "see, in a folder that the nodes share. If another run still writes there, wait until it has ended"
        )
