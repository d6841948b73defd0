"""What a training step holds and sends on many GPUs, by arithmetic; experiments/SCALING.md is its output, explained.

python experiments/sharding/scaling.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

GB = 1e9
BF16, FLOAT32 = 2, 4  # bytes
ADAM = 2  # moments
CHUNK = 2**26  # logits at once on a GPU, see gamma_po/logps.py
CACHED = 16 + 4 * 4  # bytes per pair of the reference cache: a key and four numbers
GATHERED = 8 * 8 + 8  # bytes per pair that margins gather: at most a handful of float64 values


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a Llama.

    Args:
        layers, hidden, inner, vocabulary: as in its config.json.
        heads, kv_heads: of the attention.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv_share(self) -> float:
        """Keys and values per query head."""
        return self.kv_heads / self.heads

    @property
    def block(self) -> int:
        """Parameters of a transformer block."""
        attention = self.hidden**2 * (2 + 2 * self.kv_share)
        return int(attention + 3 * self.hidden * self.inner + 2 * self.hidden)

    @property
    def parameters(self) -> int:
        """All parameters; embedding and head are two matrices."""
        return self.layers * self.block + self.ends

    @property
    def ends(self) -> int:
        """Embedding, head and last norm."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def gathered_per_micro_batch(self) -> int:
        """Parameters that FSDP2 brings together: blocks in both passes, embedding and head once."""
        return 2 * self.layers * self.block + self.ends

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers but the head."""
        kv = self.hidden * self.kv_share
        widths = 2 * (self.hidden + self.hidden) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.inner)
        return int(self.layers * rank * widths)

    def saved_in_block(self, *, lora: bool) -> float:
        """Bytes per token that a block keeps for its backward pass in bfloat16.

        The coefficients are measured: `tests.saved.saved_bytes` on blocks of five sizes (hidden 256 and 512), of
        which they are the exact linear law. tests/integration/test_scaling.py measures them again.
        """
        if lora:  # rank 16
            return (36 + 4 * self.kv_share) * self.hidden + 10 * self.inner + 488
        return (20 + 4 * self.kv_share) * self.hidden + 8 * self.inner + 40


LLAMA_8B = Model(name="8B", layers=32, hidden=4096, inner=14336, heads=32, kv_heads=8, vocabulary=128256)
LLAMA_70B = Model(name="70B", layers=80, hidden=8192, inner=28672, heads=64, kv_heads=8, vocabulary=128256)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A way of training.

    Args:
        model: of the policy.
        gpus: processes.
        tokens: of a micro-batch on one GPU, after prefix sharing.
        lora: rank; 0 trains all weights.
        sharded: FSDP2; otherwise each GPU holds the whole model (DDP).
        micro_batches: per optimizer step and GPU.
    """

    model: Model
    gpus: int
    tokens: int = 4096
    lora: int = 0
    sharded: bool = True
    micro_batches: int = 1


class PerGpu(NamedTuple):
    """Bytes on one GPU at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # two blocks at a time, and embedding and head
    activations: float  # with gradient checkpointing
    head: float  # a chunk of logits

    @property
    def total(self) -> float:
        """The sum."""
        return sum(self)


def memory(run: Run) -> PerGpu:
    """Return what one GPU holds: float32 weights, gradients and Adam for what trains, bfloat16 for what is frozen.

    Args:
        run: with gradient checkpointing; the reference's log-probabilities come from the cache.
    """
    model, share = run.model, 1 / run.gpus if run.sharded else 1.0
    trained = model.adapters(run.lora) if run.lora else model.parameters
    frozen = model.parameters if run.lora else 0
    layer_inputs = BF16 * model.hidden * run.tokens * model.layers
    recomputed = model.saved_in_block(lora=bool(run.lora)) * run.tokens
    logits = min(CHUNK, model.vocabulary * run.tokens) * 2 * (BF16 + FLOAT32)
    return PerGpu(
        weights=share * (FLOAT32 * trained + BF16 * frozen),
        gradients=share * FLOAT32 * trained,
        optimizer=share * ADAM * FLOAT32 * trained,
        gathered=BF16 * (2 * model.block + model.ends) if run.sharded else 0,
        activations=layer_inputs + recomputed,
        head=logits,
    )


class Sent(NamedTuple):
    """Bytes that one GPU receives per optimizer step."""

    weights: float
    gradients: float
    margins: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(self)


def communication(run: Run, *, pairs: int) -> Sent:
    """Return what one GPU receives per step from the others.

    FSDP2 gathers each block in the forward pass and again in the backward pass, embedding and head once, (n-1)/n of
    the weights each time, for every micro-batch; it reduces and scatters float32 gradients of what trains, for every
    micro-batch too. DDP all-reduces what trains, twice (n-1)/n of it, once per step.

    Args:
        run: the training.
        pairs: of an optimizer step, on all GPUs.
    """
    others = (run.gpus - 1) / run.gpus
    trained = run.model.adapters(run.lora) if run.lora else run.model.parameters
    gathered = run.model.gathered_per_micro_batch * run.micro_batches if run.sharded else 0
    gradients = others * FLOAT32 * trained * (run.micro_batches if run.sharded else 2)
    return Sent(weights=others * BF16 * gathered, gradients=gradients, margins=others * GATHERED * pairs)


RUNS = [
    Run(model=LLAMA_8B, gpus=8, lora=16, sharded=False, micro_batches=16),
    Run(model=LLAMA_8B, gpus=8, lora=16, micro_batches=16),
    *(Run(model=LLAMA_8B, gpus=gpus, micro_batches=128 // min(gpus, 128)) for gpus in (8, 16, 32, 64, 128, 512)),
    Run(model=LLAMA_70B, gpus=8, lora=16, micro_batches=16),
    *(Run(model=LLAMA_70B, gpus=gpus, micro_batches=128 // min(gpus, 128)) for gpus in (16, 32, 64, 128, 256, 512)),
]


def table(runs: list[Run]) -> str:
    """Return Markdown, in GB of 10⁹ bytes."""
    lines = [
        "| model | trains | GPUs | weights | gradients | Adam | gathered | activations | head | **GB per GPU** | "
        "GB received per step: weights | gradients | margins |",
        "|---" * 13 + "|",
    ]
    for run in runs:
        held = memory(run)
        sent = communication(run, pairs=run.gpus * run.micro_batches)
        what = f"LoRA {run.lora}" if run.lora else "all"
        numbers = [f"{value / GB:.1f}" for value in held] + [f"**{held.total / GB:.0f}**"]
        numbers += [f"{sent.weights / GB:.0f}", f"{sent.gradients / GB:.1f}", f"{sent.margins / GB:.0e}"]
        where = f"{run.gpus}" if run.sharded else f"{run.gpus} (DDP)"
        lines.append(f"| {run.model.name} | {what} | {where} | {' | '.join(numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(RUNS) + "\n")
