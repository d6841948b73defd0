"""A training that goes on from a checkpoint: what is written for it, compared with it, and taken up from it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from gamma_po.checkpoints import slim_state_dict, straighten_progress, trained_names
from gamma_po.ckpt_path import check_same_checkpoint
from gamma_po.data.loader import ShuffledBatches
from gamma_po.fingerprints import Fingerprint
from gamma_po.resuming import (
    check_end_of_training,
    check_same_run,
    check_same_settings,
    check_same_weights,
    go_on_as_given,
    run_settings,
)
from gamma_po.runs import FORMAT, FORMAT_KEY, check_format
from gamma_po.state import state_to_plain


class Continuation:
    """What a run knows of its own plan and of the checkpoint it goes on from, until its training starts."""

    def __init__(self) -> None:
        self._steps: dict[str, Any] = {}
        self._given_options: list[dict[str, Any]] = []  # of the optimizer's groups, before a checkpoint's come
        self._steps_before: dict[str, Any] | None = None  # of the checkpoint

    def plan(self, optimizer: Optimizer, steps_in_all: int | str) -> None:
        """Remember what the run would do without a checkpoint.

        Args:
            optimizer: with its schedule.
            steps_in_all: of the training, or "any" where nothing depends on it.
        """
        self._steps = {"steps_in_all": steps_in_all}
        self._given_options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def write(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint, in place: what training changes, and what must match to go on from it.

        Args:
            module: in training.
            checkpoint: as Lightning has put it together.
        """
        trainer = module.trainer
        checkpoint["state_dict"] = slim_state_dict(module, checkpoint["state_dict"])
        checkpoint["trained_weights"] = trained_names(module)
        checkpoint["loss_state"] = state_to_plain(module.loss_state)
        checkpoint["margin_state"] = state_to_plain(module.margin_state)
        checkpoint[FORMAT_KEY] = FORMAT
        checkpoint["run"] = run_settings(trainer)
        checkpoint["steps"] = self._steps
        known = {"reference": module.reference and module.reference.fingerprint, "base": module.base_weights}
        checkpoint |= {f"{what}_weights": found and found._asdict() for what, found in known.items()}
        batches = _training_batches(trainer)
        if batches is not None and "loops" in checkpoint:
            straighten_progress(checkpoint["loops"], batches.epoch)

    def check(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint with the run that loads it, before anything of it is used.

        Raises:
            ConfigError: it does not fit, or is not the one that other processes have found.
        """
        trainer = module._trainer
        if trainer is not None:  # a run that is still ending may have replaced the file for some of the processes
            check_same_checkpoint(module.ranks, f"step {checkpoint['global_step']}")
        check_format(checkpoint, str(getattr(trainer, "ckpt_path", None) or "the checkpoint"))
        if trainer is None:
            return
        saved, here, training = checkpoint.get("hyper_parameters", {}), dict(module.hparams), bool(trainer.training)
        check_same_settings(saved, here, training=training, resume=module.resume)
        if training:
            check_end_of_training(checkpoint, max_steps=trainer.max_steps, max_epochs=trainer.max_epochs)
            check_same_run(checkpoint["run"], run_settings(trainer), module.resume)
            self._steps_before = checkpoint["steps"]

    def begin(self, module: LightningModule) -> None:
        """Continue in the data where the checkpoint stood: Lightning forgets that for a loader that it built before
        it restored its loops, and `estimated_stepping_batches` builds it early.

        Args:
            module: with its optimizer and the checkpoint's state, if there is one.

        Raises:
            ConfigError: the run has other steps than that of the checkpoint.
        """
        before, self._steps_before = self._steps_before, None
        if before is not None:
            check_same_run(before, self._steps, module.resume)
        module.trainer.fit_loop._load_combined_loader_states()
        begin_epoch_of_data(module.trainer)
        if before is not None and module.resume == "anyway":
            optimizer, schedule = module.optimizers().optimizer, module.lr_schedulers()
            go_on_as_given(module.trainer, optimizer, schedule, self._given_options)


def check_models(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Compare the models of a run with those that its checkpoint was trained with; all of them are loaded by now.

    Raises:
        ConfigError: the base under adapters, or in training the reference, is another one.
    """
    trainer = module._trainer
    if trainer is None:
        return
    if trainer.training and module.reference is not None:
        saved = Fingerprint.of(checkpoint.get("reference_weights"))
        check_same_weights("reference", saved, module.reference.fingerprint, module.resume)
    resume = module.resume if trainer.training else "anyway"
    check_same_weights("base", Fingerprint.of(checkpoint.get("base_weights")), module.base_weights, resume)


def begin_epoch_of_data(trainer: Trainer) -> None:
    """Let the data take this epoch's order: Lightning tells no batch sampler of one's own which epoch it is."""
    batches = _training_batches(trainer)
    if batches is not None:
        batches.set_epoch(trainer.current_epoch)


def _training_batches(trainer: Trainer) -> ShuffledBatches | None:
    """The order of the training data; None where another data module gives batches of its own."""
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    return batches if isinstance(batches, ShuffledBatches) else None
