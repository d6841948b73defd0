"""Epochs, validations and with them checkpoints only between whole optimizer steps, where gradients are accumulated."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.loader import TokenBatches
from gamma_po.errors import ConfigError


def check_accumulation(trainer: Trainer) -> None:
    """Refuse a GradientAccumulationScheduler: Lightning counts the steps of the whole training without it.

    Raises:
        ConfigError: saying what to use.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise ConfigError(
            "GradientAccumulationScheduler does not work here: the learning rate's schedule would end at another step "
            "than the training, and a run that goes on inside an epoch would take steps of another size; allowed: "
            "trainer.accumulate_grad_batches"
        )


def check_whole_steps(trainer: Trainer) -> None:
    """Refuse to end epochs inside an optimizer step whose micro-batches have different numbers of pairs.

    Args:
        trainer: with its training data loaded.

    Raises:
        ConfigError: pairs of the cut step would weigh more or less than those of others.
    """
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    taken, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    cut = isinstance(batches, TokenBatches) and taken < len(batches) and taken % accumulate > 0
    if cut and not trainer.fast_dev_run:
        raise ConfigError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} takes {taken} micro-batches, which ends inside "
            f"a step of {accumulate}; with data.length_window={batches.window} these have different numbers of pairs; "
            f"allowed: a multiple of trainer.accumulate_grad_batches={accumulate}, or data.limit_train"
        )


def check_validations(trainer: Trainer) -> None:
    """Refuse to validate inside an optimizer step: no checkpoint could be saved with what the validation finds.

    Args:
        trainer: with its training data loaded.

    Raises:
        ConfigError: naming the options and what is allowed.
    """
    accumulate, epoch, every = trainer.accumulate_grad_batches, trainer.num_training_batches, trainer.val_check_batch
    data = trainer.datamodule
    without = isinstance(data, PreferenceDataModule) and "validation" not in data.datasets
    if accumulate == 1 or without or not trainer.enable_validation or trainer.fast_dev_run or every == float("inf"):
        return
    if every is None and trainer._val_check_time_interval is None:
        return  # trainer.limit_train_batches is 0
    if every is None:
        raise ConfigError(
            f"trainer.val_check_interval is a time, {trainer._val_check_time_interval:g} s, and would end inside an "
            f"optimizer step of trainer.accumulate_grad_batches={accumulate} micro-batches; allowed with it: a "
            f"multiple of {accumulate} (micro-batches), or 1.0"
        )
    across = trainer.check_val_every_n_epoch is None  # epochs
    if every % epoch and (every % accumulate or (across and epoch % accumulate)):
        cut = f", where trainer.limit_train_batches makes epochs a multiple of {accumulate}, too," if across else ""
        raise ConfigError(
            f"trainer.val_check_interval={trainer.val_check_interval} validates every {every} of an epoch's {epoch} "
            f"micro-batches, which is inside an optimizer step of trainer.accumulate_grad_batches={accumulate} "
            f"micro-batches, where no checkpoint can be saved; allowed: a multiple of {accumulate}{cut} or of {epoch}"
        )
