"""The costly half of an inspection: load the policy, measure memory and time on real micro-batches; change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, cycle, islice

import torch
from torch import Tensor
from torch.nn import functional

from gamma_po.data.batching import TokenCosts
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.dataset import Example, PairDataset
from gamma_po.data.loader import ShuffledBatches
from gamma_po.forwards import score
from gamma_po.inspection.cost import (
    WHOLE,
    Memory,
    Share,
    at_peak,
    library_bytes,
    optimizer_bytes,
    optimizer_step_bytes,
    parameter_bytes,
    timed,
)
from gamma_po.inspection.findings import Finding
from gamma_po.inspection.live import Counted, count_step
from gamma_po.inspection.reference_accuracy import as_examples, sample_order
from gamma_po.inspection.sections import Plan
from gamma_po.inspection.show import size
from gamma_po.logps import chunk_length
from gamma_po.module import PreferenceModule
from gamma_po.policies import evaluating
from gamma_po.types import PairLogps, PreferenceBatch

TIMED_STEPS = 4
LOOKED_AT = 20_000  # micro-batches of a process, at most
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


def most_tokens(datamodule: PreferenceDataModule, costs: TokenCosts, planned: Plan) -> int:
    """Return the tokens, padding included, of the largest forward of a run: its order is known beforehand.

    Args:
        datamodule: set up.
        costs: of the training pairs.
        planned: how many micro-batches there will be.
    """
    limit, most = datamodule.max_tokens_per_forward, 0
    seen = len(costs.widths)
    if seen < planned.processes * datamodule.batch_size:  # so few were looked at: as if the longest met in one batch
        longest = sorted(range(seen), key=lambda row: costs.widths[row], reverse=True)
        rows = list(islice(cycle(longest), datamodule.batch_size))
        return max(map(costs.total, [rows] if limit is None else costs.within(rows, limit)))
    micro_batches = min(planned.steps * planned.accumulate, LOOKED_AT)
    for rank in range(planned.processes):
        batches = datamodule.training_batches(rank, planned.processes)
        for rows in islice(_rows_of_all_epochs(batches), micro_batches):
            parts = [rows] if limit is None else costs.within(rows, limit)
            most = max(most, *map(costs.total, parts))
    return most


def _rows_of_all_epochs(batches: ShuffledBatches) -> Iterator[list[int]]:
    for epoch in count():
        batches.set_epoch(epoch)
        for slots in batches:
            yield [slot.index for slot in slots]


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
            if module.reference is not None and module.reference.source != "cached":
                module.reference.logps(batch, module.policy)
            policy = score(module.policy, batch)
        return -functional.logsigmoid(policy.margin).mean()

    def memory(self, planned: Plan, free: int, *, share: Share = WHOLE) -> Memory:
        """Estimate the peak of a training step in the micro-batch that takes most of all that the run will have.

        What processes share is not divided yet (`Memory.shared`).

        A step of the shortest pair and one of the longest (twice, where it is not much longer) are run and counted;
        what they need beyond what stays the same goes with the tokens. Where the largest micro-batch takes the head in
        several chunks, the steps that are counted do so, too. Where it is plain beforehand that a step will not fit, it
        is not tried: then the activations are extended from short pairs, or left out where even without them too little
        is free.

        Args:
            planned: the run's micro-batches.
            free: bytes, before anything was loaded.
            share: of a process.
        """
        held = self._held()
        if held.total > free:
            return held
        costs = TokenCosts.of(self.dataset.pairs, self.datamodule.layout)
        by_width = sorted(range(len(costs.widths)), key=lambda row: costs.widths[row])
        short, long, most = by_width[:1], by_width[-1:], most_tokens(self.datamodule, costs, planned)
        accumulates = planned.accumulate > 1
        one, other = (self._count(rows, accumulates) for rows in (short, 2 * short))
        room = free - held.total
        rows = long if costs.total(long) > other.tokens else 2 * long
        if max(one.at(costs.total(rows), other).most) < room:
            other = self._count(rows, accumulates)
            one, other = self._in_chunks(one, other, long, costs.total(long), most, room, accumulates)
        counted = one.at(most, other)
        step = optimizer_step_bytes(self.module.optimizer_factory, self.trainable)
        return at_peak(held, counted, step, accumulates=accumulates, share=share)

    def _in_chunks(
        self, one: Counted, other: Counted, row: list[int], tokens: int, most: int, room: int, accumulates: bool
    ) -> tuple[Counted, Counted]:
        """Count two micro-batches that fill a chunk of the head, where the largest one does; else return the given.

        Until a chunk is full, what the head takes grows with the completions; from then on it stays as it is.

        Args:
            one: counted on few tokens.
            other: counted on more.
            row: of the longest pair.
            tokens: of that pair.
            most: tokens of the largest micro-batch.
            room: bytes for what a step makes.
            accumulates: as in `_count`.
        """
        pair, config = self.dataset.pairs[row[0]], self.module.policy.model.config.get_text_config()
        filled_by = -(-chunk_length(config.vocab_size, self.device) // (len(pair.chosen) + len(pair.rejected)))
        beyond, limit = (filled_by + 1) * tokens, self.datamodule.max_tokens_per_forward
        needed = max(one.at(beyond, other).most)
        if most < filled_by * tokens or needed > room or (limit is not None and beyond > limit):
            return one, other
        full = other if other.tokens == filled_by * tokens else self._count(filled_by * row, accumulates)
        return full, self._count((filled_by + 1) * row, accumulates)

    def _held(self) -> Memory:
        module = self.module
        copy = getattr(module.reference, "copy", None)
        return Memory(
            weights=parameter_bytes(module.policy.parameters()),
            reference=0 if copy is None else parameter_bytes(copy.parameters()),
            gradients=parameter_bytes(self.trainable),
            optimizer=optimizer_bytes(module.optimizer_factory, self.trainable),
            activations=0,
            head=0,
            libraries=library_bytes(self.device),
        )

    def _count(self, rows: Sequence[int], accumulates: bool) -> Counted:
        batch = self.batch(rows)
        tokens = max(forward.input_ids.numel() for forward in batch.model_inputs)
        if accumulates:  # all but a step's first micro-batch find gradients
            for parameter in self.trainable:
                parameter.grad = torch.zeros_like(parameter)
        counted = count_step(lambda: self.loss(batch), self.trainable, tokens)
        for parameter in self.trainable:
            parameter.grad = None
        return counted

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


def memory_findings(
    needed: int, free: int, *, lora: bool, checkpointing: bool, batch_size: int, holes: int = 0, shared_by: int = 1
) -> list[Finding]:
    """Compare the estimate with what the device has.

    Args:
        needed: bytes at the peak.
        free: bytes, before anything was loaded.
        holes: bytes that a CPU's malloc may hold back besides.
        lora: adapters are trained.
        checkpointing: activations are recomputed.
        batch_size: pairs per micro-batch.
        shared_by: processes that share the weights; then the bytes are those of each.
    """
    if needed + holes <= TIGHT * free:
        return []
    changes = []
    if holes:
        changes.append("MALLOC_MMAP_THRESHOLD_=131072 in the environment (no holes in the heap, but slower)")
    if not checkpointing:
        changes.append("model.gradient_checkpointing: true")
    if batch_size > 1:
        changes.append(f"data.batch_size below {batch_size} with trainer.accumulate_grad_batches above")
    if not lora:
        changes.append("model.lora (e.g. {r: 16, alpha: 32})")
    changes.append("shorter data.tokenization.max_prompt_length and max_completion_length, or max_length")
    level = "fails" if needed > free else "note"
    each = "" if shared_by == 1 else f" in each of {shared_by} processes"
    if shared_by > 1:
        changes.append("more GPUs")
    more = f" (with holes in the heap up to {size(needed + holes)})" if holes else ""
    problem = f"a training step needs about {size(needed)}{each}{more}, and {size(free)} are free"
    return [Finding(level, problem, "; ".join(changes))]
