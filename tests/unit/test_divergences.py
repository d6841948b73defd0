"""Where we differ from the authors' published code on purpose: their numbers, ours, and why.

Their code is described in words and redone here in plain Python from that description; TRL's divergences are in
tests/parity.
"""

from __future__ import annotations

import math

import pytest
import torch

from gamma_po.losses import DPO, RDPO, BetaDPO
from gamma_po.margins import build_margin
from gamma_po.types import Evidence, PairLogps

EXACT = 1e-12


def pairs(gaps: list[float], chosen_length: list[int], rejected_length: list[int]) -> Evidence:
    """Pairs whose policy prefers the chosen completion by `gaps` nats per token of it, and the reference by none."""
    lengths = [torch.tensor(length) for length in (chosen_length, rejected_length)]
    rejected = torch.full((len(gaps),), -8.0, dtype=torch.float64)
    chosen = rejected / lengths[1] * lengths[0] + torch.tensor(gaps, dtype=torch.float64) * lengths[0]
    reference = PairLogps(rejected / lengths[1] * lengths[0], rejected, *lengths)
    return Evidence(PairLogps(chosen, rejected, *lengths), reference)


def logistic_loss(z: float) -> float:
    """log(1 + e^-z)."""
    return math.log(1 + math.exp(-z))


def test_the_length_term_of_rdpo_counts_tokens_where_the_authors_count_pairs() -> None:
    """They take `len` of the log-probabilities, the number of pairs, which is the same on both sides: no term."""
    evidence = pairs([0.005, 0.02], [400, 100], [100, 300])
    h = [0.1 * 0.005 * 400, 0.1 * 0.02 * 100]  # 0.2 and 0.2
    theirs = [logistic_loss(x + 0.01 * (len(h) - len(h))) for x in h]
    ours = RDPO(beta=0.1, alpha=0.01)(evidence, torch.zeros(2, dtype=torch.float64)).tolist()
    assert theirs == pytest.approx([0.598138869, 0.598138869], abs=1e-9)
    assert ours == pytest.approx([logistic_loss(0.2 + 3.0), logistic_loss(0.2 - 2.0)], abs=EXACT)
    assert ours == pytest.approx([0.039953334, 1.952977611], abs=1e-9)
    plain = DPO(beta=0.1)(evidence, torch.zeros(2, dtype=torch.float64))
    assert plain.tolist() == pytest.approx(theirs, abs=EXACT)  # theirs is DPO under another name


def test_alpha_dpo_reads_one_deviation_as_one_where_averages_from_zero_read_fourteen() -> None:
    """Moving averages of gap and gap² that start at 0, decay 0.99, one step of gaps 0 and 2 (mean 1, deviation 1)."""
    mean, second = 0.99 * 0 + 0.01 * 1, 0.99 * 0 + 0.01 * (0**2 + 2**2) / 2
    theirs = (2 - mean) / math.sqrt(second - mean**2)
    assert theirs == pytest.approx(14.106735980, abs=1e-9)
    margin = build_margin("alpha_dpo", gamma0=0.0, beta=1.0, alpha=1.0, decay=0.99)
    ours, _ = margin(torch.zeros(2, dtype=torch.float64), pairs([0.0, 2.0], [4, 4], [4, 4]), margin.init())
    assert ours.tolist() == pytest.approx([-1.0, 1.0], abs=1e-9)


def test_beta_dpo_starts_with_beta_where_an_average_from_zero_starts_with_28_times_as_much() -> None:
    """β (1 + α (mean gap - running mean)) at the first step, gaps 40 and 60 nats."""
    running = 0.9 * 0 + 0.1 * 50
    theirs = 0.1 * (1 + 0.6 * (50 - running))
    assert theirs == pytest.approx(2.8, abs=EXACT)
    loss = BetaDPO(loss=DPO(beta=0.1), alpha=0.6, decay=0.9, keep=1.0)
    _, state = loss.step(pairs([10.0, 15.0], [4, 4], [4, 4]), loss.init())
    assert float(state.beta) == pytest.approx(0.1, abs=EXACT)


def test_beta_dpo_leaves_pairs_out_where_the_authors_filter_changes_nothing() -> None:
    """They compute which pairs to keep and average the loss over all of them. One of 20 gaps is 4.4 deviations out."""
    gaps = [-0.5] * 10 + [0.5] * 9 + [-90.0]
    evidence, zero = pairs(gaps, [4] * 20, [4] * 20), torch.zeros(20, dtype=torch.float64)
    loss = BetaDPO(loss=DPO(beta=0.1), alpha=0.0, keep=0.95)
    stepped, _ = loss.step(evidence, loss.init())
    theirs = (10 * logistic_loss(-0.2) + 9 * logistic_loss(0.2) + logistic_loss(-36.0)) / 20
    kept = (10 * logistic_loss(-0.2) + 9 * logistic_loss(0.2)) / 19
    assert stepped(evidence, zero).mean().item() == pytest.approx(kept, abs=EXACT)
    assert (theirs, kept) == pytest.approx((2.468231926, 0.703402027), abs=1e-9)


def test_label_smoothing_reaches_dpo_where_the_authors_option_stops_before_it() -> None:
    evidence, zero = pairs([5.0], [4], [4]), torch.zeros(1, dtype=torch.float64)  # h = 2
    theirs = logistic_loss(2.0)
    ours = DPO(beta=0.1, label_smoothing=0.1)(evidence, zero).item()
    assert theirs == pytest.approx(0.126928011, abs=1e-9)
    assert ours == pytest.approx(0.9 * logistic_loss(2.0) + 0.1 * logistic_loss(-2.0), abs=EXACT)
    assert ours == pytest.approx(0.326928011, abs=1e-9)
