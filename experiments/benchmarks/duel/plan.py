"""What is compared with what, and the settings that both sides share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Mode = Literal["lora", "full"]

BETA = 0.1
LORA_R, LORA_ALPHA = 16, 32.0
LEARNING_RATE = 1e-5
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training.

    Args:
        side: this project or TRL.
        title: for the tables.
        order: which batches it gets: rows at random, or rows of similar length together.
        checkpointing: recompute activations in the backward pass.
        precomputed: the reference is scored before training; otherwise in each step.
        gpu_like_head: TRL's head meets completion positions only and multiplies gradients in bfloat16, as it does
            on a GPU; on a CPU it projects every position and multiplies in float32.
        margin: class of the target margin (this project only).
    """

    side: Literal["ours", "trl"]
    title: str
    order: Literal["shuffled", "grouped"] = "shuffled"
    checkpointing: bool = False
    precomputed: bool = True
    gpu_like_head: bool = False
    margin: str = "NoMargin"


ARMS = {
    "ours": Arm(side="ours", title="ours"),
    "ours-checkpointing": Arm(side="ours", title="ours, gradient checkpointing", checkpointing=True),
    "ours-kl": Arm(side="ours", title="ours, kl margin", margin="KL"),
    "defaults": Arm(side="trl", title="TRL defaults", checkpointing=True, precomputed=False),
    "best": Arm(side="trl", title="TRL at its best"),
    "grouped": Arm(side="trl", title="TRL at its best, length grouping", order="grouped"),
    "gpu-like": Arm(side="trl", title="TRL at its best, GPU-like head", gpu_like_head=True),
    "gpu-like-grouped": Arm(
        side="trl", title="TRL at its best, GPU-like head, length grouping", order="grouped", gpu_like_head=True
    ),
}

DEFAULT_ARMS: dict[Mode, tuple[str, ...]] = {
    "lora": ("ours", "ours-checkpointing", "defaults", "best", "grouped", "gpu-like"),
    "full": ("ours", "defaults", "best", "grouped", "gpu-like"),
}
CPU_ONLY = ("gpu-like", "gpu-like-grouped")

# Asked for: time of TRL / time of ours at least; peak memory of ours / peak memory of TRL at most.
TIME_TARGETS: dict[tuple[Mode, str], float] = {
    ("lora", "defaults"): 3.5, ("lora", "best"): 2.2, ("lora", "gpu-like"): 1.9,
    ("full", "defaults"): 2.6, ("full", "best"): 1.9, ("full", "gpu-like"): 1.6,
}  # fmt: skip
MEMORY_TARGETS: dict[tuple[Mode, str], float] = {("lora", "defaults"): 0.5, ("lora", "best"): 0.5}
MARGIN_TARGET = 0.005  # share of a step


def memory_counterpart(rival: str) -> str:
    """Name the arm of ours whose memory is compared: with gradient checkpointing where the rival has it."""
    return "ours-checkpointing" if ARMS[rival].checkpointing else "ours"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides share.

    Args:
        mode: LoRA on all linear layers but the head, or all weights.
        model: as `model.policy.path`.
        dtype: of the weights; with bfloat16 both sides run under bfloat16 autocast (LoRA's adapters are float32, as
            peft makes them), with float32 neither has autocast.
        attention: transformers' attention backend.
        rows: file of the pairs.
        orders: for each kind of order, the rows of `rows` as they are trained on.
        batch_size: pairs per step.
        layout: of our side.
        fused_optimizer: AdamW in one kernel on both sides.
        device: cpu or cuda.
        threads: of torch.
        our_options: more options of our command line.
        folder: for what runs leave behind.
        logs: for what the processes print.
        max_gradient_norm: of clipping on both sides; 0 for none.
    """

    mode: Mode
    model: str
    dtype: Literal["bfloat16", "float32"]
    attention: str
    rows: Path
    orders: dict[str, tuple[int, ...]]
    batch_size: int
    layout: str
    fused_optimizer: bool
    device: Literal["cpu", "cuda"]
    threads: int
    our_options: tuple[str, ...]
    folder: Path
    logs: Path
    max_gradient_norm: float = MAX_GRADIENT_NORM

    @property
    def num_steps(self) -> int:
        """Steps that the rows are good for."""
        return len(self.orders["shuffled"]) // self.batch_size

    def batch(self, order: str, step: int) -> tuple[int, ...]:
        """Rows of a step, from 0."""
        return self.orders[order][step * self.batch_size : (step + 1) * self.batch_size]
