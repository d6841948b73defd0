"""One global batch of 128 pairs, cut into micro-batches and spread over processes in every way.

A process more changes nothing: values are gathered before anything is computed from them. A cut more changes
nothing either where every pair is judged alone. The KL margin judges a pair within a pool, and a cut changes the
pool, so there the losses differ, by no more than the following bound.

Let c = γ0/τ. In any pool the solution has one multiplier μ with, for each pair,

    log q_i + c s(γ_i - h_i) = μ,    γ_i = γ0 q_i,    mean q = 1.                                        (*)

1. *A pair's margin moves no more than μ.* The left side of (*) increases in log q_i with slope
   1 + c γ_i s'(γ_i - h_i), between 1 and K = 1 + c max γ / 4. So between pools A and B
   |μ_A - μ_B| / K <= |log γ_i^A - log γ_i^B| <= |μ_A - μ_B| for every pair.
2. *μ moves no more than the rewards allow.* γ increases with h within a pool and its mean is γ0, so the pair with the
   largest h has log q >= 0 and, by (*), μ >= c s(γ0 - max h); the one with the smallest has μ <= c s(γ0 - min h).
   Hence |μ_A - μ_B| <= D = c [s(γ0 - min h) - s(γ0 - max h)] < c, extremes over all pools.
3. *How far it moves says the imbalance of the cut.* Take B within A, and let m be the mean over B of γ^A / γ0: 1 if B
   were a perfect sample of A. As a function of μ, log mean_B q has slope between 1/K and 1 by 1, is log m at μ_A and
   0 at μ_B. Hence |log m| <= |μ_A - μ_B| <= K |log m|. For a random cut log m is of the order sd(γ)/γ0 / sqrt(|B|).
4. *The loss moves no more than γ.* A loss with |∂loss/∂γ| <= 1 (logistic, hinge) changes by at most
   |γ^A - γ^B| <= γ^A (exp(min(D, K |log m|)) - 1).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gamma_po.losses import LOSSES, BetaDPO, Loss, build_loss
from gamma_po.margins import KL, MARGINS, Margin, build_margin
from gamma_po.objective import StepState, train
from gamma_po.ranks import Distributed, Local, Ranks
from gamma_po.state import state_to_plain
from gamma_po.types import Evidence
from tests.contracts import on_two_ranks, random_evidence, with_gradient
from tests.processes import two_processes

PAIRS = 128
CUTS = {"1x128": 128, "4x32": 32, "16x8": 8}  # name: pairs of all processes in one micro-batch
ROUNDING = 1e-12  # relative, sums in another order
CHANCE = 1.5  # one draw of the pairs, against the expected 1/sqrt(pool)
SOLVER = 1e-9  # what the solver and the logarithms may add to a bound
STRENGTHS = [(4.0, 10.0), (1.0, 1.0), (1.0, 0.3), (2.0, 0.2)]  # γ0 and τ
ALONE = ("none", "fixed", "map", "column")  # margins that look at one pair at a time
NEEDS_OPTIONS: dict[str, dict[str, Any]] = {"with_sft": {"loss": build_loss("simpo")}}


class Step(NamedTuple):
    """What one optimizer step saw, in the order of the global batch; or one process's share of it."""

    rows: Tensor
    losses: Tensor
    target_margin: Tensor
    gradient: Tensor  # of this process's mean loss, for all 128 chosen log-probabilities
    state: Any


def global_batch(seed: int = 0) -> Evidence:
    """128 pairs; the column is a positive number per pair."""
    return random_evidence(PAIRS, seed=seed)._replace(column=torch.linspace(0.5, 3.0, PAIRS, dtype=torch.float64))


def part_of(evidence: Evidence, rows: Tensor) -> Evidence:
    """Some pairs of the batch."""
    policy, reference = (logps.map(lambda field: field[rows]) for logps in evidence[:2])
    return Evidence(policy, reference, evidence.column[rows])


def share_of_step(loss: Loss, margin: Margin, state: Any, size: int, ranks: Ranks) -> Step:
    """One process: every micro-batch in turn, this process's part of each, gradients accumulated."""
    evidence, chosen, _ = with_gradient(global_batch())
    rows, losses, margins = [], [], []
    for micro_batch in torch.arange(PAIRS).split(size):
        rows.append(micro_batch.chunk(ranks.world_size)[ranks.rank])
        part = part_of(evidence, rows[-1])
        target_margin, state = margin(loss.rewards(part).margin, part, state, ranks)
        margins.append(target_margin)
        losses.append(loss(part, target_margin, ranks))
    mean = torch.stack([part.mean() for part in losses]).mean()
    (gradient,) = torch.autograd.grad(mean, chosen, materialize_grads=True)
    return Step(torch.cat(rows), torch.cat(losses).detach(), torch.cat(margins), gradient, state)


def whole_step(shares: list[Step]) -> Step:
    """The shares of all processes in the order of the batch; gradients averaged, as DDP does."""
    order = torch.cat([share.rows for share in shares]).argsort()
    losses, margins = (torch.cat([share[field] for share in shares])[order] for field in (1, 2))
    gradient = torch.stack([share.gradient for share in shares]).mean(dim=0)
    return Step(torch.arange(PAIRS), losses, margins, gradient, shares[0].state)


def run_step(loss: Loss, margin: Margin, size: int, *, processes: int = 1, state: Any = None) -> Step:
    """One optimizer step on one process or on two simulated ones."""
    start = margin.fit(random_evidence(50, seed=3).reference) if state is None else state
    if processes == 1:
        return share_of_step(loss, margin, start, size, Local())
    shares = on_two_ranks(lambda ranks: share_of_step(loss, margin, start, size, ranks))
    assert_same_state(*(share.state for share in shares))
    return whole_step(shares)


def steps_of(loss: Loss, margin: Margin, size: int, *, processes: int = 1) -> Step:
    """One optimizer step of a loss that remembers: every micro-batch is a training step of loss and margin."""

    def share(ranks: Ranks) -> Step:
        evidence, chosen, _ = with_gradient(global_batch())
        state, rows, outputs = StepState(loss.init(), margin.init()), [], []
        for micro_batch in torch.arange(PAIRS).split(size):
            rows.append(micro_batch.chunk(ranks.world_size)[ranks.rank])
            output, state = train(loss, margin, part_of(evidence, rows[-1]), state, ranks)
            outputs.append(output)
        mean = torch.stack([output.loss for output in outputs]).mean()
        (gradient,) = torch.autograd.grad(mean, chosen)
        losses, margins = (torch.cat([output[k] for output in outputs]) for k in (1, 3))
        return Step(torch.cat(rows), losses, margins, gradient, state)

    shares = [share(Local())] if processes == 1 else on_two_ranks(share)
    assert_same_state(*(part.state for part in (shares[0], shares[-1])))
    return whole_step(shares)


def assert_same_step(ours: Step, theirs: Step) -> None:
    """Equal up to the order of summation."""
    assert ours.losses.mean().item() == pytest.approx(theirs.losses.mean().item(), rel=ROUNDING)
    for field in (1, 2, 3):
        torch.testing.assert_close(ours[field], theirs[field], rtol=ROUNDING, atol=ROUNDING)


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(state_to_plain(ours), state_to_plain(theirs), rtol=0, atol=0)


def any_loss(name: str) -> Loss:
    """A loss by its name."""
    return build_loss(name, **NEEDS_OPTIONS.get(name, {}))


def multiplier(gamma: Tensor, h: Tensor, gamma0: float, tau: float) -> Tensor:
    """μ as each pair sees it, [N]: equal within a pool, by (*)."""
    return torch.log(gamma / gamma0) + gamma0 / tau * torch.sigmoid(gamma - h)


class Cut(NamedTuple):
    """The same pairs in the pool A of the whole batch and in the pools B of the micro-batches."""

    h: Tensor  # [128]
    whole: Tensor  # [128] γ in A
    cut: Tensor  # [128] γ in B
    rise: Tensor  # [128] |μ_A - μ_B|
    imbalance: Tensor  # [128] |log m| of the micro-batch's pool
    steepness: Tensor  # [128] K of the micro-batch's pool
    extremes: tuple[Tensor, Tensor]  # min h and max h in A, which contains all B


def cut_batch(loss: Loss, margin: KL, size: int, state: Any) -> Cut:
    """Solve the pool of the whole batch and, in turn, those of the micro-batches."""
    h = loss.rewards(global_batch()).margin
    everything, _ = margin.allocate(h, global_batch(), state, Local())
    whole, past = everything.target_margin, everything.score[:-PAIRS].numel()
    parts = []
    for rows in torch.arange(PAIRS).split(size):
        pool, state = margin.allocate(h[rows], part_of(global_batch(), rows), state, Local())
        end = past + int(rows[-1]) + 1
        members = slice(end - len(pool.score), end)
        assert torch.equal(pool.score, everything.score[members])
        imbalance = (whole[members].mean() / margin.gamma0).log().abs()
        largest = torch.maximum(whole[members].max(), pool.target_margin.max())
        steepness = 1 + margin.gamma0 / margin.tau * largest / 4
        strength = (margin.gamma0, margin.tau)
        rise = multiplier(pool.target_margin, pool.score, *strength) - multiplier(
            whole[members], everything.score[members], *strength
        )
        constant = torch.ones(len(rows), dtype=torch.float64)
        parts.append((pool.target_margin[pool.position], rise.abs()[pool.position], imbalance * constant,
                      steepness * constant))  # fmt: skip
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Cut(h, whole[everything.position], *columns, everything.score.aminmax())


def reach(found: Cut, margin: KL) -> tuple[Tensor, Tensor]:
    """D and K |log m|: the two bounds on |μ_A - μ_B|."""
    low, high = found.extremes
    spread = margin.gamma0 / margin.tau * (torch.sigmoid(margin.gamma0 - low) - torch.sigmoid(margin.gamma0 - high))
    return spread, found.steepness * found.imbalance


def with_history(loss: Loss, margin: KL, count: int) -> Any:
    """The margin's state after `count` earlier pairs like those of the batch."""
    evidence = random_evidence(max(count, 1), seed=1)
    _, state = margin(loss.rewards(evidence).margin, evidence, margin.init())
    return state if count else margin.init()


@pytest.mark.parametrize("name", [name for name in LOSSES if not any_loss(name).couples_pairs])
def test_losses_that_couple_no_pairs_are_the_same_for_every_cut_and_number_of_processes(name: str) -> None:
    loss = any_loss(name)
    for margin in [build_margin("none"), build_margin("fixed", gamma=0.7)][: 2 if loss.takes_margin else 1]:
        whole = run_step(loss, margin, PAIRS)
        for size in CUTS.values():
            for processes in (1, 2):
                assert_same_step(run_step(loss, margin, size, processes=processes), whole)


@pytest.mark.parametrize("name", [name for name in LOSSES if any_loss(name).couples_pairs])
def test_losses_that_couple_pairs_depend_on_the_cut_but_not_on_the_number_of_processes(name: str) -> None:
    loss, margin = any_loss(name), build_margin("fixed", gamma=0.7)
    by_cut = [run_step(loss, margin, size) for size in CUTS.values()]
    for size, one in zip(CUTS.values(), by_cut, strict=True):
        two = run_step(loss, margin, size, processes=2)
        assert two.losses.mean().item() == pytest.approx(one.losses.mean().item(), rel=ROUNDING)
    means = [step.losses.mean().item() for step in by_cut]
    assert min(abs(means[1] - means[0]), abs(means[2] - means[1])) > 1e-4


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_is_the_same_on_one_and_on_two_processes(name: str, cut: str) -> None:
    loss = build_loss("dpo")
    margin = build_margin(name).bind(loss)
    one = run_step(loss, margin, CUTS[cut])
    two = run_step(loss, margin, CUTS[cut], processes=2)
    assert_same_step(two, one)
    torch.testing.assert_close(state_to_plain(two.state), state_to_plain(one.state), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["reverse", "shuffled"])
@pytest.mark.parametrize("inner", [name for name in MARGINS if name not in ("reverse", "shuffled")])
def test_ablations_of_every_margin_are_the_same_on_one_and_on_two_processes(inner: str, name: str, cut: str) -> None:
    loss = build_loss("dpo")
    margin = build_margin(name, inner=build_margin(inner, **({"tau": 2.0} if inner == "kl_authors" else {}))).bind(loss)
    one, two = (run_step(loss, margin, CUTS[cut], processes=processes) for processes in (1, 2))
    assert_same_step(two, one)
    torch.testing.assert_close(state_to_plain(two.state), state_to_plain(one.state), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_beta_dpo_steps_alike_on_one_and_on_two_processes(cut: str, keep: float) -> None:
    loss, margin = BetaDPO(alpha=0.05, keep=keep), build_margin("kl", tau=0.5, center=True)
    one, two = (steps_of(loss, margin, CUTS[cut], processes=processes) for processes in (1, 2))
    assert_same_step(two, one)
    torch.testing.assert_close(state_to_plain(two.state), state_to_plain(one.state), rtol=ROUNDING, atol=ROUNDING)
    betas = one.state.loss
    assert int(betas.steps) == PAIRS // CUTS[cut] and int((one.losses > 0).sum()) == round(keep * CUTS[cut]) * int(
        betas.steps
    )


def test_beta_dpo_depends_on_the_cut_and_without_its_two_rules_is_the_loss_inside() -> None:
    margin, plain = (
        build_margin("fixed", gamma=0.7),
        run_step(build_loss("dpo"), build_margin("fixed", gamma=0.7), PAIRS),
    )
    means = [steps_of(BetaDPO(alpha=0.05, keep=0.6), margin, size).losses.mean().item() for size in CUTS.values()]
    assert min(abs(means[1] - means[0]), abs(means[2] - means[1])) > 1e-4
    for size in CUTS.values():
        assert_same_step(steps_of(BetaDPO(alpha=0.0, keep=1.0), margin, size), plain)


@pytest.mark.parametrize("name", ALONE)
def test_margins_that_look_at_one_pair_at_a_time_do_not_depend_on_the_cut(name: str) -> None:
    loss, margin = build_loss("simpo"), build_margin(name)
    whole = run_step(loss, margin, PAIRS)
    for size in CUTS.values():
        assert_same_step(run_step(loss, margin, size), whole)


@pytest.mark.parametrize("history", [0, 256])
@pytest.mark.parametrize("cut", ["4x32", "16x8"])
@pytest.mark.parametrize(("gamma0", "tau"), STRENGTHS)
@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_a_kl_margin_and_its_loss_move_with_the_cut_by_no_more_than_the_bound(
    name: str, gamma0: float, tau: float, cut: str, history: int
) -> None:
    loss, margin = build_loss(name), KL(gamma0=gamma0, tau=tau, center=False, history=history)
    state = with_history(loss, margin, history)
    found = cut_batch(loss, margin, CUTS[cut], state)
    spread, sampled = reach(found, margin)
    assert spread < gamma0 / tau
    assert (found.rise <= spread + SOLVER).all() and (found.rise <= sampled + SOLVER).all()
    assert (found.rise >= found.imbalance - SOLVER).all()
    log_ratio = (found.whole / found.cut).log().abs()
    assert (log_ratio <= found.rise + SOLVER).all() and (log_ratio * found.steepness >= found.rise - SOLVER).all()
    allowed = found.whole * torch.expm1(torch.minimum(spread, sampled)) + SOLVER
    losses = [run_step(loss, margin, size, state=state).losses for size in (PAIRS, CUTS[cut])]
    assert ((losses[0] - losses[1]).abs() <= (found.whole - found.cut).abs() + SOLVER).all()
    assert ((losses[0] - losses[1]).abs() <= allowed).all()
    assert 1e-7 < abs(losses[0].mean() - losses[1].mean()) <= allowed.mean()


def test_a_history_of_like_pairs_makes_the_cut_matter_less() -> None:
    loss, moved = build_loss("simpo"), []
    for history in (0, 256):
        margin = KL(gamma0=1.0, tau=0.3, center=False, history=history)
        found = cut_batch(loss, margin, CUTS["16x8"], with_history(loss, margin, history))
        moved.append(found.rise.square().mean().sqrt())
    assert moved[1] < moved[0] * CHANCE / math.sqrt(256 / 8)  # pools of 8 against pools of 256


def write_share(folder: str) -> None:
    """Runs in each of two gloo processes: this process's share of the 4x32 step goes to a file."""
    torch.distributed.init_process_group("gloo")
    ranks = Distributed()
    margin = KL(gamma0=1.0, tau=0.3, center=True)
    share = share_of_step(build_loss("dpo"), margin, margin.init(), CUTS["4x32"], ranks)
    plain = share._replace(state=state_to_plain(share.state))
    torch.save(plain._asdict(), Path(folder) / f"rank{ranks.rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_real_processes_give_the_step_of_one(tmp_path: Path) -> None:
    script = tmp_path / "share.py"
    source = "import sys\n\nfrom tests.integration.test_micro_batches import write_share\n\nwrite_share(sys.argv[1])\n"
    script.write_text(source)
    two_processes([str(script), str(tmp_path)])
    shares = [Step(**torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)) for rank in (0, 1)]
    assert all(len(share.rows) == PAIRS // 2 for share in shares)
    one = run_step(build_loss("dpo"), KL(gamma0=1.0, tau=0.3, center=True), CUTS["4x32"])
    assert_same_step(whole_step(shares), one)
    for share in shares:
        torch.testing.assert_close(share.state, state_to_plain(one.state), rtol=0, atol=0)
