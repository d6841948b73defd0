"""The frozen reference: cached numbers, the policy with its adapters off, or a copy in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gamma_po.errors import ConfigError, require
from gamma_po.fingerprints import Fingerprint, fingerprint
from gamma_po.forwards import score
from gamma_po.losses import Loss
from gamma_po.margins import Margin
from gamma_po.policies import (
    ModelConfig,
    adapters_off,
    evaluating,
    load_model,
)
from gamma_po.scorer import CompletionScorer, check_layout
from gamma_po.types import PairLogps, PreferenceBatch

ReferenceSource = Literal["cached", "adapters_off", "copy"]
SOURCES = ("cached", "adapters_off", "copy")
Place = Callable[[CompletionScorer], CompletionScorer]  # where a model loaded here goes, e.g. shards it
Load = Callable[[ModelConfig], PreTrainedModel]  # whole, or without weights where `Place` reads them
CASTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}  # by the trainer
FULL_AGREEMENT = 1e-4  # nats per token, in full precision
AGREEMENT, SEQUENCE_AGREEMENT = 0.05, 0.5  # below it: nats per token, and nats per sequence on top


def _as_loaded(scorer: CompletionScorer) -> CompletionScorer:
    return scorer


class Reference(nn.Module):
    """Where the reference's log-probabilities come from.

    Args:
        source: "cached" (computed once, kept on disk), "adapters_off" (LoRA's base model), "copy" (in memory).
        config: the reference's model.
        is_start_of_policy: the reference is the policy before training, not a model of its own.
        has_adapters: the policy is trained through LoRA adapters.

    Raises:
        ConfigError: adapters are to be switched off where there are none.
    """

    def __init__(
        self, source: ReferenceSource, config: ModelConfig, *, is_start_of_policy: bool, has_adapters: bool
    ) -> None:
        super().__init__()
        require(source in SOURCES, "model.reference", source, ", ".join(SOURCES))
        if source == "adapters_off" and not (has_adapters and is_start_of_policy):
            raise ConfigError(
                "model.reference=adapters_off needs model.lora and no model.reference_model: without adapters there "
                "is nothing to switch off; allowed here: cached, copy"
            )
        self.source, self.config = source, config
        self.is_start_of_policy = is_start_of_policy
        self.is_base_of_adapters = has_adapters and is_start_of_policy
        self.copy: CompletionScorer | None = None
        self.fingerprint: Fingerprint | None = None  # for the cache

    def load(
        self, untouched_policy: PreTrainedModel, layout: str, place: Place = _as_loaded, load: Load = load_model
    ) -> None:
        """Take what is needed from the policy before adapters and training change it; load the copy.

        Args:
            untouched_policy: as loaded.
            layout: of the batches, which the reference must be able to compute.
            place: shards the copy as the policy will be sharded, or leaves it.
            load: loads a model for `place`.

        Raises:
            ConfigError: the reference cannot compute the layout, or has another vocabulary than the policy.
        """
        if not self.is_start_of_policy:
            other = load(self.config)
            check_layout(layout, other, self.config.attention)
            sizes = [model.config.get_text_config().vocab_size for model in (other, untouched_policy)]
            if sizes[0] != sizes[1]:
                raise ConfigError(
                    f"model.reference_model has {sizes[0]} tokens, the policy {sizes[1]}: both must read the same "
                    "token ids"
                )
        if self.source == "cached":
            self.fingerprint = fingerprint(untouched_policy if self.is_start_of_policy else other)
        if self.source == "copy":
            self.copy = place(CompletionScorer(load(self.config)).requires_grad_(False)).eval()
            # Lightning's advice at the start of training; this one is in eval mode on purpose, and stays so.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")

    def train(self, mode: bool = True) -> Reference:
        """Stay in eval mode, whatever the policy around it does."""
        return super().train(False)

    @contextmanager
    def opened(
        self,
        policy: CompletionScorer,
        *,
        policy_is_untouched: bool,
        place: Place = _as_loaded,
        load: Load = load_model,
        precision: str = "32-true",
    ) -> Iterator[CompletionScorer]:
        """Give the reference as a model in eval mode.

        Args:
            policy: the policy, adapters and all.
            policy_is_untouched: this run has not trained it yet. It serves as its own reference only if its weights
                are those it started from; a module that was trained before is recognised by its fingerprint.
            place: shards a model loaded for this as the policy is sharded, or leaves it.
            load: loads a model for `place`.
            precision: the trainer's. One that casts all weights casts these; otherwise they keep the reference's dtype.
        """
        if self.copy is not None:
            yield self.copy
        elif self.is_base_of_adapters:
            with evaluating(policy), adapters_off(policy.model):
                yield policy
        elif self.is_start_of_policy and policy_is_untouched and self.fingerprint == fingerprint(policy.model):
            with evaluating(policy):
                yield policy
        else:
            loaded = CompletionScorer(load(self.config))
            if precision in CASTS:
                loaded = loaded.to(CASTS[precision])  # its weights; buffers keep theirs
            yield place(loaded).to(next(policy.parameters()).device).eval()

    def logps(self, batch: PreferenceBatch, policy: CompletionScorer) -> PairLogps:
        """Return the reference's log-probabilities of a batch, [P] each, without gradient.

        Raises:
            ConfigError: they should be cached, but the batch carries none.
        """
        if self.source == "cached":
            if batch.reference is None:
                raise ConfigError(
                    "model.reference=cached, but the batch carries no reference log-probabilities: use "
                    "PreferenceDataModule, or model.reference: copy (or adapters_off with lora)"
                )
            return batch.reference
        with self.opened(policy, policy_is_untouched=False) as scorer, torch.no_grad():
            return score(scorer, batch)


def check_agreement(policy: PairLogps, reference: PairLogps, index: Tensor, *, full_precision: bool) -> None:
    """Before the first step the policy is its own reference: their log-probabilities must agree.

    In full precision 1e-4 nat per token is allowed. Below it, how far a row is filled up and which pairs share its
    forward decide which kernels run and how they round: one token may be some tenths of a nat off, which only averages
    out over many. So a completion of n tokens may be 0.05 + 0.5 / n nat per token off.

    Args:
        policy: [P] each, in eval mode.
        reference: [P] each.
        index: rows of the pairs in the training split, [P].
        full_precision: weights and forward in float32.

    Raises:
        ConfigError: naming the worst pair, how far apart it is, and likely causes.
    """
    chosen = (policy.mean_chosen - reference.mean_chosen).abs()
    rejected = (policy.mean_rejected - reference.mean_rejected).abs()
    gap, lengths = torch.cat([chosen, rejected]), torch.cat([policy.chosen_length, policy.rejected_length])
    allowed = torch.full_like(gap, FULL_AGREEMENT) if full_precision else AGREEMENT + SEQUENCE_AGREEMENT / lengths
    worst = int((gap / allowed).argmax())
    if not bool((gap <= allowed).all()):
        raise ConfigError(
            f"before the first step, policy and reference differ by {float(gap[worst]):.2g} nat per token (pair in row "
            f"{int(index.repeat(2)[worst])} of the training split, a completion of {int(lengths[worst])} tokens; "
            f"allowed {float(allowed[worst]):.2g}). They should be the same model. Likely causes: the policy's weights "
            "changed after the reference was scored, or the two run in different precision or attention; if the "
            "reference is meant to differ, set model.reference_model"
        )


def reference_for(
    loss: Loss,
    margin: Margin,
    source: ReferenceSource,
    policy: ModelConfig,
    reference_model: ModelConfig | None,
    *,
    has_adapters: bool,
) -> Reference | None:
    """Return the reference of a run, None where neither the loss nor the margin reads one.

    Args:
        loss: of the run.
        margin: of the run.
        source: where its log-probabilities come from.
        policy: the model to train.
        reference_model: a reference other than the untrained policy.
        has_adapters: the policy is trained through LoRA adapters.

    Raises:
        ConfigError: the settings would be ignored, or do not work.
    """
    check_reference_is_used(loss, margin, source, reference_model)
    if not (loss.needs_reference or margin.needs_reference):
        return None
    start = reference_model is None
    return Reference(source, reference_model or policy, is_start_of_policy=start, has_adapters=has_adapters)


def check_reference_is_used(
    loss: Loss, margin: Margin, source: ReferenceSource, reference_model: ModelConfig | None
) -> None:
    """Refuse reference settings that the loss and the margin would ignore or could not use.

    Raises:
        ConfigError: naming both sides.
    """
    needed = loss.needs_reference or margin.needs_reference
    unused = "model.reference_model" if reference_model is not None else f"model.reference={source}"
    if not needed and (reference_model is not None or source != "cached"):
        raise ConfigError(
            f"{unused} is not used: neither the loss {loss.name} nor the margin {margin.name} reads a reference"
        )
    if margin.needs_fit and source != "cached":
        raise ConfigError(
            f"the margin {margin.name} reads the reference's margins of the whole training split before training; "
            f"model.reference={source!r} does not compute them; allowed: cached"
        )
