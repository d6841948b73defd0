"""Leave the trained policy behind in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from gamma_po.flat_sharding import is_flat, whole_flat_weights, without_wrappers
from gamma_po.policies import export_policy
from gamma_po.saved import adapter_record
from gamma_po.sharding import whole_weights


class ExportPolicy(Callback):
    """At the end of `fit`, writes the adapter (LoRA) or the whole model to `<run directory>/policy`.

    Nothing is replaced: where something has that name, the policy goes to `policy-1`, and so on.

    Args:
        enabled: off for throw-away runs.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._written = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it also where the checkpoint is from the end of its training, and Lightning trains no more."""
        if not self._written:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, once, from the first process; all of them give what they hold of it."""
        self._written = True
        folder = trainer.log_dir
        if not self.enabled or folder is None:
            return
        scorer, policy = pl_module.policy, pl_module.policy.model
        weights = whole_flat_weights(scorer) if is_flat(scorer) else whole_weights(policy)
        if trainer.is_global_zero:
            name = Path(folder) / "policy"
            with without_wrappers(policy):
                base, reference = pl_module.base_weights, pl_module.hparams.get("reference_model")
                record = adapter_record(pl_module.policy_config, reference, base and base._asdict())
                written = export_policy(policy, pl_module.tokenizer, name, record=record, weights=weights)
            rank_zero_info(f"policy written to {written}")
