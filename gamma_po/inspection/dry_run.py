"""The costly half of an inspection: load the policy, measure memory and time on real micro-batches; change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.dataset import Example, PairDataset
from gamma_po.forwards import score
from gamma_po.inspection.cost import (
    Memory,
    around_bytes,
    at_batch_size,
    head_bytes,
    optimizer_bytes,
    parameter_bytes,
    saved_bytes,
    timed,
)
from gamma_po.inspection.findings import Finding
from gamma_po.inspection.reference_accuracy import as_examples, sample_order
from gamma_po.inspection.show import size
from gamma_po.module import PreferenceModule
from gamma_po.policies import evaluating
from gamma_po.types import PairLogps, PreferenceBatch

TIMED_STEPS = 4
TIGHT = 0.9  # share of the free memory


@contextmanager
def reference_scorer(module: PreferenceModule) -> Iterator[Callable[[PreferenceBatch], PairLogps]]:
    """Give the frozen reference as a function from batch to log-probabilities.

    Before training, the policy in eval mode is its own reference: adapters change nothing yet.
    """
    reference, device = module.reference, next(module.policy.parameters()).device
    starts_as_policy = reference is None or reference.is_start_of_policy
    opened = evaluating(module.policy) if starts_as_policy else module.open_reference()
    with opened as other, torch.no_grad(), module.precision_context():
        scorer = module.policy if starts_as_policy else other
        yield lambda batch: score(scorer, batch.to(device))


def longest_last(dataset: PairDataset) -> list[int]:
    """Return the rows by the tokens of their pairs."""
    return sorted(range(len(dataset)), key=lambda i: sum(len(part) for part in dataset.pairs[i][:3]))


class DryRun:
    """Micro-batches of the run, computed as training would, without an effect.

    Args:
        module: with its model configured, on its device.
        datamodule: set up.
    """

    def __init__(self, module: PreferenceModule, datamodule: PreferenceDataModule) -> None:
        self.module, self.datamodule = module, datamodule
        self.dataset: PairDataset = datamodule.datasets["train"]
        self.device = next(module.policy.parameters()).device
        self.trainable = [p for p in module.policy.parameters() if p.requires_grad]

    def batch(self, rows: Sequence[int]) -> PreferenceBatch:
        """Return rows of the training split as one micro-batch on the device."""
        examples: list[Example] = as_examples(self.dataset, rows)
        return self.datamodule.collate(examples).to(self.device)

    def loss(self, batch: PreferenceBatch) -> Tensor:
        """Return -log σ of the log-probability margin, with the policy's graph.

        Losses and margins are arithmetic on [P] numbers: what a step costs is what the models cost. The reference
        runs too where the run would not read it from the cache.
        """
        module = self.module
        with module.precision_context():
            policy = score(module.policy, batch)
            if module.reference is not None and module.reference.source != "cached":
                module.reference.logps(batch, module.policy)
        return -functional.logsigmoid(policy.margin).mean()

    def memory(self) -> Memory:
        """Measure and estimate the peak of a training step with the longest pairs."""
        module = self.module
        by_length = longest_last(self.dataset)
        one, short = self.batch(by_length[-1:]), by_length[:1]
        size_ = self.datamodule.batch_size
        activations = self._saved(one)
        if size_ > 1:
            few = (self._saved(self.batch(short * number)) for number in (1, 2))
            activations = at_batch_size(activations, *few, size_)
        config = module.policy.model.config
        if module.gradient_checkpointing:  # while layers are recomputed, all of their activations are there
            at_once = int(module.gradient_checkpointing) / max(1, config.num_hidden_layers)
            activations += int(self._saved_without_checkpointing(one) * size_ * at_once)
        weights = parameter_bytes(module.policy.parameters())
        copy = getattr(module.reference, "copy", None)
        itemsize = torch.finfo(next(module.policy.parameters()).dtype).bits // 8
        head = head_bytes(one.model_inputs[0], size_, config.vocab_size, itemsize)
        return Memory(
            weights=weights,
            reference=0 if copy is None else parameter_bytes(copy.parameters()),
            gradients=parameter_bytes(self.trainable),
            optimizer=optimizer_bytes(module.optimizer_factory, self.trainable),
            activations=activations,
            head=head,
            around=around_bytes(activations + head, self.device),
        )

    def seconds_per_step(self, *, seed: int, seconds: float) -> float:
        """Time forward, backward and optimizer on random micro-batches; the policy is of no use afterwards.

        A step of one pair warms up and tells how many pairs there is time for; where these are fewer than a
        micro-batch has, the time of a step is scaled.

        Args:
            seed: of the pairs.
            seconds: for all of it; no further step starts after this time.
        """
        batch_size = self.datamodule.batch_size
        order = cycle(sample_order(len(self.dataset), seed))
        optimizer = self.module.optimizer_factory(self.trainable)

        def step(num_pairs: int) -> None:
            self.loss(self.batch([next(order) for _ in range(num_pairs)])).backward()
            optimizer.step()
            optimizer.zero_grad()

        one = timed(lambda: step(1), self.device, seconds=seconds, most=1)
        left = max(0.0, seconds - one)
        num_pairs = min(batch_size, max(1, int(left / one)))
        return timed(lambda: step(num_pairs), self.device, seconds=left, most=TIMED_STEPS) * batch_size / num_pairs

    def _saved(self, batch: PreferenceBatch) -> int:
        return saved_bytes(lambda: self.loss(batch), self.module.policy)

    def _saved_without_checkpointing(self, batch: PreferenceBatch) -> int:
        model = self.module.policy.model
        model.activation_checkpointing_disable()
        try:
            return self._saved(batch)
        finally:
            layers = int(self.module.gradient_checkpointing)
            model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=layers)


def memory_findings(
    needed: int, free: int, *, lora: bool, checkpointing: bool, batch_size: int, shared_by: int = 1
) -> list[Finding]:
    """Compare the estimate with what the device has.

    Args:
        needed: bytes at the peak.
        free: bytes, before anything was loaded.
        lora: adapters are trained.
        checkpointing: activations are recomputed.
        batch_size: pairs per micro-batch.
        shared_by: processes that share the weights; then the bytes are those of each.
    """
    if needed <= TIGHT * free:
        return []
    changes = []
    if not checkpointing:
        changes.append("model.gradient_checkpointing: true")
    if batch_size > 1:
        changes.append(f"data.batch_size below {batch_size} with trainer.accumulate_grad_batches above")
    if not lora:
        changes.append("model.lora (e.g. {r: 16, alpha: 32})")
    changes.append("shorter data.tokenization.max_prompt_length and max_completion_length")
    level = "fails" if needed > free else "note"
    each = "" if shared_by == 1 else f" in each of {shared_by} processes"
    if shared_by > 1:
        changes.append("more GPUs")
    problem = f"a training step needs about {size(needed)}{each}, and {size(free)} are free"
    return [Finding(level, problem, "; ".join(changes))]
