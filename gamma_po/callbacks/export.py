"""Leave the trained policy behind in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from gamma_po.policies import export_policy


class ExportPolicy(Callback):
    """At the end of `fit`, writes the adapter (LoRA) or the whole model to `<run directory>/policy`.

    Nothing is replaced: where something has that name, the policy goes to `policy-1`, and so on.

    Args:
        enabled: off for throw-away runs.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, once, from the first process."""
        folder = trainer.log_dir
        if not self.enabled or folder is None or not trainer.is_global_zero:
            return
        written = export_policy(pl_module.policy.model, pl_module.tokenizer, Path(folder) / "policy")
        rank_zero_info(f"policy written to {written}")
