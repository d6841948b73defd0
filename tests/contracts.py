"""The contracts that every loss, margin and way of running must pass."""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gamma_po.data.dataset import PairDataset, Slot, collate
from gamma_po.data.formatting import Columns, read_preferences
from gamma_po.data.tokenization import Tokenization, tokenize_preferences
from gamma_po.errors import ConfigError
from gamma_po.layouts import LAYOUTS
from gamma_po.losses import LOSSES, Loss, build_loss, gradient_weight, require_margin_fits
from gamma_po.margins import Margin, build_margin
from gamma_po.module import PreferenceModule
from gamma_po.ranks import Gathered, Ranks
from gamma_po.state import state_from_plain, state_to_plain
from gamma_po.types import Evidence, PairLogps, PreferenceBatch
from tests import oracle
from tests.tiny import tiny_tokenizer

LOSS_TOLERANCE = 1e-5  # absolute, float32 against float64
GRADIENT_TOLERANCE = 1e-4  # relative L2
STRICT = 1e-12  # float64 against float64


def random_evidence(num_pairs: int = 6, seed: int = 0, *, reference: bool = True) -> Evidence:
    """Plausible float64 log-probabilities of policy and reference, with different lengths; every field is there."""
    generator, extra = (torch.Generator().manual_seed(number) for number in (seed, seed + 1000))

    def lengths() -> Tensor:
        return torch.randint(1, 40, (num_pairs,), generator=generator)

    chosen_length, rejected_length = lengths(), lengths()

    def logps(*, on_policy: bool) -> PairLogps:
        per_token = torch.rand(2, num_pairs, generator=generator, dtype=torch.float64) + 0.2
        chosen, rejected = -per_token[0] * chosen_length, -per_token[1] * rejected_length
        shared = torch.minimum(chosen_length, rejected_length)
        bend, drift = torch.rand(2, 2, num_pairs, generator=extra, dtype=torch.float64)  # later tokens are likelier
        chosen_shared = chosen * (shared / chosen_length) ** (0.5 + bend[0] / 2)
        rejected_shared = rejected * (shared / rejected_length) ** (0.5 + bend[1] / 2)
        sums = chosen, rejected, chosen_length, rejected_length, chosen_shared, rejected_shared
        return PairLogps(*sums, *(drift - 0.7)) if on_policy else PairLogps(*sums)

    return Evidence(logps(on_policy=True), logps(on_policy=False) if reference else None)


def with_gradient(evidence: Evidence) -> tuple[Evidence, Tensor, Tensor]:
    """The same evidence with leaves for the policy's chosen and rejected log-probabilities."""
    chosen = evidence.policy.chosen.clone().requires_grad_()
    rejected = evidence.policy.rejected.clone().requires_grad_()
    return evidence._replace(policy=evidence.policy._replace(chosen=chosen, rejected=rejected)), chosen, rejected


class LossContract:
    """Subclass with `name`, `options` and `expected(evidence, γ, options)`: float64 textbook formula, [P].

    `undoes` says how a margin is undone, so that the loss is as without one: by lowering the `rejected` reward
    by γ, or by moving `both` rewards apart by γ/2. `positive` names the options that must be > 0, `fixed_statistics`
    says that the gradient leaves out a batch statistic.
    """

    name: str
    options: tuple[dict[str, Any], ...]
    undoes: Literal["rejected", "both"] = "rejected"
    positive: tuple[str, ...] = ("beta",)
    fixed_statistics: bool = False

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        """The loss by its paper."""
        raise AssertionError("give the formula")

    def evidence(self, num_pairs: int = 6, seed: int = 0, *, reference: bool = True) -> Evidence:
        """What the loss is tried on."""
        return random_evidence(num_pairs, seed, reference=reference)

    def moved(self, loss: Loss, evidence: Evidence, chosen: Tensor | float, rejected: Tensor | float) -> Evidence:
        """The evidence after adding to the chosen and rejected rewards; they are linear in the log-probabilities."""
        leaves, *logps = with_gradient(evidence)
        slopes = torch.autograd.grad(sum(side.sum() for side in loss.rewards(leaves)), logps)
        policy = evidence.policy
        policy = policy._replace(chosen=policy.chosen + chosen / slopes[0])
        return evidence._replace(policy=policy._replace(rejected=policy.rejected + rejected / slopes[1]))

    def _cases(self) -> list[tuple[Loss, dict[str, Any]]]:
        return [(build_loss(self.name, **options), options) for options in self.options]

    def test_equals_the_textbook_formula_in_value_and_gradient(self) -> None:
        target_margin = torch.linspace(-0.5, 2.0, 6, dtype=torch.float64)
        for loss, options in self._cases():
            ours, *our_leaves = with_gradient(self.evidence())
            theirs, *their_leaves = with_gradient(self.evidence())
            value, formula = loss(ours, target_margin), self.expected(theirs, target_margin, **options)
            torch.testing.assert_close(value, formula, rtol=STRICT, atol=STRICT)
            weights = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
            if loss.couples_pairs:
                weights = torch.ones(6, dtype=torch.float64)
            for a, b in zip(
                torch.autograd.grad((value * weights).sum(), our_leaves, materialize_grads=True),
                torch.autograd.grad((formula * weights).sum(), their_leaves, materialize_grads=True),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=STRICT)

    def test_without_a_margin_it_is_the_base_loss(self) -> None:
        none = torch.zeros(6, dtype=torch.float64)
        for loss, options in self._cases():
            formula = self.expected(self.evidence(seed=1), none, **options)
            torch.testing.assert_close(loss(self.evidence(seed=1), none), formula, rtol=STRICT, atol=STRICT)

    def test_one_loss_per_pair_in_the_dtype_of_the_evidence(self) -> None:
        for loss, _ in self._cases():
            for count in (1, 5):
                for dtype in (torch.float32, torch.float64):
                    value = loss(_cast(self.evidence(count), dtype), torch.zeros(count, dtype=dtype))
                    assert value.shape == (count,) and value.dtype == dtype

    def test_no_gradient_reaches_the_margin_or_the_reference(self) -> None:
        for loss, _ in self._cases():
            target_margin = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
            evidence, chosen, _ = with_gradient(self.evidence())
            assert evidence.reference is not None
            sums = (evidence.reference[k].requires_grad_() for k in (0, 1, 4, 5))  # both sides, whole and shared
            reference = dict(zip(("chosen", "rejected", "chosen_shared", "rejected_shared"), sums, strict=True))
            loss(evidence, target_margin * 1.0).sum().backward()
            assert target_margin.grad is None
            assert [name for name, leaf in reference.items() if leaf.grad is not None] == []
            assert chosen.grad is not None

    def test_calling_twice_gives_the_same_bits(self) -> None:
        for loss, _ in self._cases():
            target_margin = torch.ones(6, dtype=torch.float64)
            assert torch.equal(loss(self.evidence(), target_margin), loss(self.evidence(), target_margin))

    def test_a_reference_is_read_only_where_the_loss_says_so(self) -> None:
        for loss, _ in self._cases():
            if not loss.needs_reference:
                none = torch.zeros(6, dtype=torch.float64)
                assert torch.equal(loss(self.evidence(reference=False), none), loss(self.evidence(), none))

    def test_the_margin_shifts_the_reward_margin(self) -> None:
        """loss(h, γ) = loss(h - γ, 0): move the rewards apart by γ and the margin is undone."""
        target_margin = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)  # mean 0: batch means stay where they are
        chosen, rejected = {"rejected": (0.0, -target_margin), "both": (target_margin / 2, -target_margin / 2)}[
            self.undoes
        ]
        for loss, _ in self._cases():
            shifted = loss(self.moved(loss, self.evidence(), chosen, rejected), target_margin)
            plain = loss(self.evidence(), torch.zeros(6, dtype=torch.float64))
            torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-10)

    def test_the_order_of_the_pairs_does_not_matter(self) -> None:
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        target_margin = torch.linspace(-0.5, 2.0, 6, dtype=torch.float64)
        for loss, _ in self._cases():
            permuted = loss(rows_of(self.evidence(), order), target_margin[order])
            plain = loss(self.evidence(), target_margin)[order]
            torch.testing.assert_close(permuted, plain, rtol=STRICT, atol=STRICT)

    def test_pairs_are_coupled_exactly_where_the_loss_says_so(self) -> None:
        target_margin = torch.linspace(-0.5, 2.0, 6, dtype=torch.float64)
        for loss, _ in self._cases():
            parts = [
                loss(rows_of(self.evidence(), rows), target_margin[rows]) for rows in torch.arange(6).split([1, 3, 2])
            ]
            difference = (torch.cat(parts) - loss(self.evidence(), target_margin)).abs().max()
            assert (difference > 1e-3) if loss.couples_pairs else (difference == 0)

    def test_two_ranks_give_the_losses_and_gradients_of_one(self) -> None:
        target_margin = torch.linspace(-0.5, 2.0, 6, dtype=torch.float64)
        for loss, _ in self._cases():
            one, *leaves = with_gradient(self.evidence())
            whole = loss(one, target_margin)
            gradients = torch.autograd.grad(whole.sum(), leaves, materialize_grads=True)
            pieces = torch.arange(6).split([2, 4])

            def step(ranks: Ranks, loss: Loss = loss, pieces: Any = pieces) -> tuple[Tensor, ...]:
                rows = pieces[ranks.rank]
                part, *leaves = with_gradient(rows_of(self.evidence(), rows))
                value = loss(part, target_margin[rows], ranks)
                return value.detach(), *torch.autograd.grad(value.sum(), leaves, materialize_grads=True)

            both = on_two_ranks(step)
            for ours, theirs in zip(zip(*both, strict=True), (whole.detach(), *gradients), strict=True):
                torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-10, atol=STRICT)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_log_probabilities_give_finite_values_gradients_and_weights(self, dtype: torch.dtype) -> None:
        values = torch.tensor([-1e5, -30.0, -1.0, -1e-6, -1e-12, 0.0], dtype=dtype)
        grid = torch.cartesian_prod(values, values, values[[0, 2, 5]], values[[0, 2, 5]])
        one = torch.ones(len(grid), dtype=torch.long)
        chosen, rejected, reference_chosen, reference_rejected = grid.T
        of_reference = reference_chosen, reference_rejected
        reference = PairLogps(*of_reference, one, one, *of_reference)
        target_margin = torch.linspace(-1, 20, len(grid), dtype=dtype)
        for loss, _ in self._cases():
            certain = torch.zeros_like(chosen), torch.zeros_like(chosen)
            policy = PairLogps(chosen, rejected, one, one, chosen, rejected, *certain)
            evidence, *leaves = with_gradient(Evidence(policy, reference))
            value = loss(evidence, target_margin)
            gradients = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
            for result in (value, *gradients, gradient_weight(loss, evidence, target_margin)):
                assert result.isfinite().all()

    def test_gradient_weight_is_the_slope_of_the_summed_loss_in_the_chosen_reward(self) -> None:
        step, target_margin = 1e-6, torch.full((6,), 0.4, dtype=torch.float64)
        for loss, _ in self._cases():
            if self.fixed_statistics and loss.couples_pairs:
                continue
            numeric = torch.empty(6, dtype=torch.float64)
            for pair in range(6):
                up = torch.zeros(6, dtype=torch.float64).index_fill(0, torch.tensor([pair]), step)
                sums = [
                    loss(self.moved(loss, self.evidence(), sign * up, 0.0), target_margin).sum() for sign in (1, -1)
                ]
                numeric[pair] = -(sums[0] - sums[1]) / (2 * step)
            weight = gradient_weight(loss, self.evidence(), target_margin)
            torch.testing.assert_close(weight, numeric, rtol=1e-5, atol=1e-6)

    def test_a_margin_is_refused_exactly_where_the_loss_takes_none(self) -> None:
        for loss, _ in self._cases():
            require_margin_fits(loss, "none")
            if loss.takes_margin:
                require_margin_fits(loss, "kl")
            else:
                with pytest.raises(ConfigError, match=rf"the margin 'kl' is not allowed with the loss '{self.name}'"):
                    require_margin_fits(loss, "kl")

    def test_a_margin_of_another_shape_is_refused_instead_of_broadcast(self) -> None:
        for loss, _ in self._cases():
            for shape in ((6, 1), (1, 6), (1,), (), (5,)):
                with pytest.raises(ValueError, match=rf"'{self.name}' has shape {re.escape(str(shape))}; .*\(6,\)"):
                    loss(self.evidence(), torch.zeros(shape, dtype=torch.float64))

    def test_a_missing_reference_is_refused_exactly_where_the_loss_needs_one(self) -> None:
        for loss, _ in self._cases():
            if loss.needs_reference:
                with pytest.raises(ConfigError, match=rf"the loss '{self.name}' needs the reference"):
                    loss(self.evidence(reference=False), torch.zeros(6, dtype=torch.float64))

    def test_unknown_options_are_refused_by_name(self) -> None:
        known = ", ".join(field.name for field in dataclasses.fields(LOSSES[self.name])) or "none"
        with pytest.raises(
            ConfigError, match=f"{self.name} does not use the option 'temperature'; its options: {known}"
        ):
            build_loss(self.name, temperature=1.0)

    def test_options_that_must_be_positive_are_checked(self) -> None:
        for option in self.positive:
            for value in (0, math.nan, math.inf):
                with pytest.raises(ConfigError, match=rf"{self.name}.{option}={value}"):
                    build_loss(self.name, **{**self.options[0], option: value})


def rows_of(evidence: Evidence, rows: Tensor) -> Evidence:
    """Policy and reference of the given pairs."""
    return evidence.map(lambda field: field[rows])


def _cast(evidence: Evidence, dtype: torch.dtype) -> Evidence:
    return evidence.map(lambda field: field.to(dtype) if field.is_floating_point() else field)


class _Thread(Ranks):
    """One of two ranks, each in its own thread."""

    world_size = 2

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.board, self.barrier = rank, board, barrier

    def gather(self, values: Tensor) -> Gathered:
        self.board[self.rank] = values.detach()
        self.barrier.wait()
        both = list(self.board)
        self.barrier.wait()
        return Gathered(torch.cat(both), self.rank * len(both[0]))


def on_two_ranks(step: Callable[[Ranks], Any]) -> list[Any]:
    """Run `step` on two ranks that see each other's values; results in rank order."""
    board, barrier = [None, None], threading.Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(step, [_Thread(rank, board, barrier) for rank in range(2)]))


class MarginContract:
    """Subclass with `margins()`: the margins to check, ready for use with `evidence`."""

    def margins(self) -> list[tuple[Margin, Any]]:
        """Margin and fitted state."""
        raise AssertionError("give the margins")

    def evidence(self, seed: int = 0) -> Evidence:
        """Six pairs with a number each from the data."""
        column = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 2000)) + 0.5
        return random_evidence(seed=seed)._replace(column=column)

    def test_there_are_margins_to_check(self) -> None:
        assert self.margins()

    def _call(
        self, margin: Margin, state: Any, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Any]:
        evidence = self.evidence(seed)
        reward_margin = (evidence.policy.margin - evidence.reference.margin).to(dtype) * 0.1
        return margin(reward_margin, evidence, state)

    def test_one_margin_per_pair_in_the_dtype_of_the_rewards_without_graph(self) -> None:
        for margin, state in self.margins():
            for dtype in (torch.float32, torch.float64):
                target_margin, _ = self._call(margin, state, dtype=dtype)
                assert target_margin.shape == (6,) and target_margin.dtype == dtype
                assert not target_margin.requires_grad

    def test_rewards_and_evidence_with_a_graph_give_a_margin_without(self) -> None:
        for margin, state in self.margins():
            reward_margin = torch.randn(6, dtype=torch.float64, requires_grad=True)
            evidence = self.evidence().map(
                lambda field: field.clone().requires_grad_() * 1 if field.is_floating_point() else field
            )
            target_margin, new = margin(reward_margin * 2, evidence, state)
            assert not target_margin.requires_grad
            assert not any(value.requires_grad for value in _tensors(new))

    def test_the_given_state_is_not_changed_and_calls_repeat(self) -> None:
        for margin, state in self.margins():
            before = [value.clone() for value in _tensors(state)]
            first, first_state = self._call(margin, state)
            second, second_state = self._call(margin, state)
            assert torch.equal(first, second)
            for a, b in zip(_tensors(first_state), _tensors(second_state), strict=True):
                assert torch.equal(a, b)
            for a, b in zip(before, _tensors(state), strict=True):
                assert torch.equal(a, b)

    def test_state_survives_a_round_trip_through_plain_values(self) -> None:
        for margin, state in self.margins():
            _, state = self._call(margin, state)
            again = state_from_plain(margin.init(), state_to_plain(state))
            assert torch.equal(self._call(margin, state, seed=1)[0], self._call(margin, again, seed=1)[0])

    def test_the_global_random_state_is_left_alone(self) -> None:
        for margin, state in self.margins():
            before = torch.get_rng_state()
            self._call(margin, state)
            assert torch.equal(before, torch.get_rng_state())

    def test_the_order_of_the_pairs_does_not_matter(self) -> None:
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        for margin, state in self.margins():
            evidence = self.evidence()
            reward_margin = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            plain, _ = margin(reward_margin, evidence, state)
            permuted, _ = margin(reward_margin[order], rows_of(evidence, order), state)
            torch.testing.assert_close(permuted, plain[order], rtol=0, atol=1e-10)

    def test_unknown_options_are_refused_by_name(self) -> None:
        for margin, _ in self.margins():
            with pytest.raises(ConfigError, match=rf"{margin.name} does not use the option 'temperature'"):
                build_margin(margin.name, temperature=1.0)


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [tensor for item in state for tensor in _tensors(item)] if isinstance(state, tuple) else []


# --- the whole step -------------------------------------------------------------------------------------------


def tiny_dataset(source: str, *, flips: tuple[int, ...] = ()) -> PairDataset:
    """The pairs of a file, tokenised with the tiny tokenizer; the rows in `flips` are mislabelled."""
    preferences, _ = read_preferences(source, Columns())
    pairs, _, _ = tokenize_preferences(preferences, tiny_tokenizer(), Tokenization(), show_progress=False)
    flipped = torch.zeros(len(pairs), dtype=torch.bool)
    flipped[list(flips)] = True
    return PairDataset(pairs, flipped)


def batch_of(dataset: PairDataset, rows: range, layout: str = "padded") -> PreferenceBatch:
    """The given rows as one batch."""
    return collate([dataset[Slot(row)] for row in rows], pad_id=0, layout=LAYOUTS[layout])


def perturb(module: PreferenceModule, scale: float = 0.05) -> None:
    """Move the trainable weights off the reference, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def gradient_vector(parameters: list[Tensor]) -> Tensor:
    """All gradients in one float64 vector."""
    return torch.cat([parameter.grad.double().flatten() for parameter in parameters])


def assert_same_step(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Compare (loss, gradient vector) with the contract's tolerances."""
    assert abs(float(ours[0]) - float(theirs[0])) < LOSS_TOLERANCE
    relative = (ours[1] - theirs[1]).norm() / theirs[1].norm()
    assert float(theirs[1].norm()) > 1e-3, "a vanishing gradient would prove nothing"
    assert float(relative) < GRADIENT_TOLERANCE


def oracle_logps(module: PreferenceModule, pairs: list[Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The policy's chosen and rejected log-probabilities by the oracle, and its float64 trainable weights."""
    model = oracle.double(module.policy.model)
    chosen, rejected = oracle.pair_logps(model, pairs)
    return chosen, rejected, [parameter for parameter in model.parameters() if parameter.requires_grad]
