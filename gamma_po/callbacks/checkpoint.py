"""Checkpoints belong to the run that writes them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; a resumed run ranks and deletes the checkpoints of its own folder only."""

    @property
    def state_key(self) -> str:
        """One for all settings: a resumed run may write checkpoints more or less often than the one before."""
        return type(self).__name__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the record of earlier checkpoints where they lie in the same folder."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)
