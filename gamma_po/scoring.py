"""The frozen reference in a run: opened as the run's strategy has models, and asked once about each split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer

from gamma_po.attention import SEGMENTS
from gamma_po.data.dataset import PairDataset
from gamma_po.data.reference_cache import (
    BASE_FIELDS,
    SHARED_FIELDS,
    CachedLogps,
    ReferenceKey,
    cached_logps,
    default_cache_dir,
)
from gamma_po.flat_sharding import is_flat
from gamma_po.forwards import score
from gamma_po.policies import evaluating
from gamma_po.ranks import as_one
from gamma_po.reference import Reference, check_agreement
from gamma_po.scorer import CompletionScorer
from gamma_po.types import PairLogps, PreferenceBatch


def opened(module: LightningModule) -> AbstractContextManager[CompletionScorer]:
    """Give the reference in eval mode; where the loss reads none, the policy as it was before training."""
    reference = module.reference
    if reference is None:
        adapters = {"has_adapters": module.lora is not None}
        reference = Reference("cached", module.policy_config, is_start_of_policy=True, **adapters)
    untouched = _is_untouched(module.trainer) and not is_flat(module.policy)  # its weights cannot be read one by one
    how = {"place": module.placement.place, "load": module.load, "precision": module.trainer.precision}
    return reference.opened(module.policy, policy_is_untouched=untouched, **how)


def attach(module: LightningModule, dataset: PairDataset, split: str) -> CachedLogps | None:
    """Give a data set the reference's log-probabilities, from the cache or computed now.

    Args:
        module: with its models and a trainer.
        dataset: a split.
        split: its name, for the progress bar.

    Returns:
        What they cost; None where the data set has them already, or the run reads none that could be cached.
    """
    reference = module.reference
    if reference is None or reference.source != "cached":
        return None
    data = module.trainer.datamodule
    key = ReferenceKey(
        weights=reference.fingerprint.digest,
        layout=data.layout,
        precision=f"{reference.config.dtype}/{module.placement.arithmetic}",
        attention=reference.config.attention if data.layout == "padded" else SEGMENTS,
    )
    needed = BASE_FIELDS + (SHARED_FIELDS if module.loss.needs_shared else ())
    if dataset.reference is not None and dataset.scored_as == (key, needed):
        return None  # else it has the numbers of another module's reference, which trained on this data before
    found = cached_logps(
        dataset.pairs,
        partial(_scores, module),
        key=key,
        folder=data.cache_dir or default_cache_dir(),
        ranks=module.ranks,
        batch_size=data.eval_batch_size,
        collate=data.collate,
        description=f"reference log-probabilities, {split}",
        needed=needed,
    )
    dataset.scored_as = (key, needed)
    dataset.reference = found.logps
    return found


def check_same_start(module: LightningModule, batch: PreferenceBatch) -> None:
    """Compare policy and reference before the first step of a run in which they start as the same model.

    Raises:
        ConfigError: they differ on a pair of the batch.
    """
    reference = module.reference
    if not _is_untouched(module.trainer) or reference is None or not reference.is_start_of_policy:
        return
    with evaluating(module.policy), torch.no_grad(), module.precision_context():
        of_policy, of_reference = score(module.policy, batch), reference.logps(batch, module.policy)
    full_precision = module.policy_config.dtype == "float32" and module.trainer.precision == "32-true"
    with as_one(module.ranks):
        check_agreement(of_policy, of_reference, batch.index, full_precision=full_precision)


@contextmanager
def _scores(module: LightningModule) -> Iterator[Callable[[PreferenceBatch], PairLogps]]:
    """Give a function from batch to reference log-probabilities, under the trainer's precision."""
    with opened(module) as scorer, torch.no_grad(), module.precision_context():
        yield lambda batch: score(scorer, batch.to(module.device))


def _is_untouched(trainer: Trainer) -> bool:
    """Whether this run has not trained the policy yet."""
    return bool(trainer.training and trainer.global_step == 0 and trainer.ckpt_path is None)
