"""What a target margin costs per step: the algebra behind the forward pass, timed with each margin.

    python experiments/benchmarks/overhead.py

The forward and backward pass of the language model are not in it: they are the same for every margin.
"""

from __future__ import annotations

import sys
import time

import torch

from gamma_po.losses import DPO
from gamma_po.margins import KL, Fixed, KLDual, Map, Margin, NoMargin, Reverse
from gamma_po.objective import StepState, train
from gamma_po.ranks import Local
from gamma_po.types import Evidence, PairLogps

MARGINS: dict[str, Margin] = {
    "none": NoMargin(),
    "fixed": Fixed(),
    "kl": KL(center=True),
    "kl, history 4096": KL(center=True, history=4096),
    "kl_dual": KLDual(center=True),
    "map": Map(),
    "reverse of kl": Reverse(inner=KL(center=True)),
}
BATCHES = (8, 128, 1024)
REPEATS = 100


def pairs(count: int) -> Evidence:
    """Random log-probabilities of completions of 100 tokens."""
    values = [-100 + 5 * torch.randn(count) for _ in range(4)]
    length = torch.full((count,), 100.0)
    return Evidence(PairLogps(*values[:2], length, length), PairLogps(*values[2:], length, length))


def fastest_ms(margin: Margin, batch: int) -> float:
    """Shortest time of a step's algebra with its gradient, ms: what other work on the machine adds is left out."""
    loss = DPO()
    margin = margin.bind(loss)
    state = StepState(loss.init(), margin.fit(pairs(4096).reference) if margin.needs_fit else margin.init())
    times = []
    for _ in range(REPEATS):
        evidence = pairs(batch)
        evidence.policy.chosen.requires_grad_()
        start = time.perf_counter()
        output, state = train(loss, margin, evidence, state, Local())
        output.loss.backward()
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def main() -> None:
    """Print a table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sys.stdout.write(f"{'ms per step':18}" + "".join(f"{batch:>8} pairs" for batch in BATCHES) + "\n")
    for name, margin in MARGINS.items():
        cells = "".join(f"{fastest_ms(margin, batch):>14.2f}" for batch in BATCHES)
        sys.stdout.write(f"{name:18}{cells}\n")


if __name__ == "__main__":
    main()
