"""Checkpoints belong to the run that writes them, and are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gamma_po.checkpoints import save_whole
from gamma_po.errors import require


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; a resumed run ranks and deletes the checkpoints of its own folder only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require(self.save_last != "link", "checkpoint.save_last", self.save_last, "true, false: a file of its own")

    @property
    def state_key(self) -> str:
        """One for all settings: a resumed run may write checkpoints more or less often than the one before."""
        return type(self).__name__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the record of earlier checkpoints where they lie in the same folder."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write under another name first; Lightning copies onto the place itself from another file system."""
        save_whole(trainer, Path(filepath), weights_only=self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))
