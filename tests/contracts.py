"""The contracts that every loss, margin and way of running must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gamma_po.data.dataset import PairDataset, Slot, collate
from gamma_po.data.formatting import Columns, read_preferences
from gamma_po.data.tokenization import Tokenization, tokenize_preferences
from gamma_po.errors import ConfigError
from gamma_po.losses import Loss, build_loss, gradient_weight
from gamma_po.margins import Margin, build_margin
from gamma_po.margins.base import state_from_plain, state_to_plain
from gamma_po.module import PreferenceModule
from gamma_po.types import Evidence, PairLogps, PreferenceBatch
from tests import oracle
from tests.tiny import tiny_tokenizer

LOSS_TOLERANCE = 1e-5  # absolute, float32 against float64
GRADIENT_TOLERANCE = 1e-4  # relative L2
STRICT = 1e-12  # float64 against float64


def random_evidence(num_pairs: int = 6, seed: int = 0, *, reference: bool = True) -> Evidence:
    """Plausible float64 log-probabilities of policy and reference, with different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def lengths() -> Tensor:
        return torch.randint(1, 40, (num_pairs,), generator=generator)

    chosen_length, rejected_length = lengths(), lengths()

    def logps() -> PairLogps:
        per_token = torch.rand(2, num_pairs, generator=generator, dtype=torch.float64) + 0.2
        return PairLogps(-per_token[0] * chosen_length, -per_token[1] * rejected_length, chosen_length, rejected_length)

    return Evidence(logps(), logps() if reference else None)


def with_gradient(evidence: Evidence) -> tuple[Evidence, Tensor, Tensor]:
    """The same evidence with leaves for the policy's chosen and rejected log-probabilities."""
    chosen = evidence.policy.chosen.clone().requires_grad_()
    rejected = evidence.policy.rejected.clone().requires_grad_()
    return evidence._replace(policy=evidence.policy._replace(chosen=chosen, rejected=rejected)), chosen, rejected


class LossContract:
    """Subclass with `name`, `options` and `expected(evidence, γ, options)`: float64 textbook formula, [P]."""

    name: str
    options: list[dict[str, Any]]

    def expected(self, evidence: Evidence, target_margin: Tensor, **options: Any) -> Tensor:
        """The loss by its paper."""
        raise AssertionError("give the formula")

    def _cases(self) -> list[tuple[Loss, dict[str, Any]]]:
        return [(build_loss(self.name, **options), options) for options in self.options]

    def test_equals_the_textbook_formula_in_value_and_gradient(self) -> None:
        target_margin = torch.linspace(-0.5, 2.0, 6, dtype=torch.float64)
        for loss, options in self._cases():
            ours, *our_leaves = with_gradient(random_evidence())
            theirs, *their_leaves = with_gradient(random_evidence())
            value, formula = loss(ours, target_margin), self.expected(theirs, target_margin, **options)
            torch.testing.assert_close(value, formula, rtol=STRICT, atol=STRICT)
            weights = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
            for a, b in zip(
                torch.autograd.grad((value * weights).sum(), our_leaves),
                torch.autograd.grad((formula * weights).sum(), their_leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=STRICT)

    def test_one_loss_per_pair_in_the_dtype_of_the_evidence(self) -> None:
        for loss, _ in self._cases():
            for count in (1, 5):
                value = loss(random_evidence(count), torch.zeros(count, dtype=torch.float64))
                assert value.shape == (count,) and value.dtype == torch.float64

    def test_no_gradient_reaches_the_margin_or_the_reference(self) -> None:
        for loss, _ in self._cases():
            target_margin = torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
            evidence, chosen, _ = with_gradient(random_evidence())
            reference = evidence.reference.chosen.requires_grad_() if loss.needs_reference else target_margin
            loss(evidence, target_margin * 1.0).sum().backward()
            assert target_margin.grad is None and reference.grad is None
            assert chosen.grad is not None

    def test_calling_twice_gives_the_same_bits(self) -> None:
        for loss, _ in self._cases():
            target_margin = torch.ones(6, dtype=torch.float64)
            assert torch.equal(loss(random_evidence(), target_margin), loss(random_evidence(), target_margin))

    def test_the_margin_shifts_the_reward_margin(self) -> None:
        """loss(h, γ) = loss(h - γ, 0): raise the chosen reward by γ and the margin is undone."""
        for loss, _ in self._cases():
            target_margin = torch.linspace(-0.5, 2.0, 6, dtype=torch.float64)
            evidence, chosen, _ = with_gradient(random_evidence())
            (slope,) = torch.autograd.grad(loss.rewards(evidence).chosen.sum(), chosen)
            raised = evidence.policy._replace(chosen=(chosen + target_margin / slope).detach())
            shifted = loss(evidence._replace(policy=raised), target_margin)
            plain = loss(random_evidence(), torch.zeros(6, dtype=torch.float64))
            torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-10)

    def test_gradient_weight_is_the_slope_in_the_chosen_reward(self) -> None:
        step = 1e-6
        for loss, _ in self._cases():
            evidence, chosen, _ = with_gradient(random_evidence())
            target_margin = torch.full((6,), 0.4, dtype=torch.float64)
            (slope,) = torch.autograd.grad(loss.rewards(evidence).chosen.sum(), chosen)
            values = []
            for sign in (1, -1):
                moved = evidence.policy._replace(chosen=(chosen + sign * step / slope).detach())
                values.append(loss(evidence._replace(policy=moved), target_margin))
            numeric = -(values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradient_weight(loss, evidence, target_margin), numeric, rtol=1e-5, atol=1e-6)

    def test_unknown_options_are_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match=rf"{self.name} does not use the option 'temperature'.*beta"):
            build_loss(self.name, temperature=1.0)

    def test_beta_must_be_positive(self) -> None:
        with pytest.raises(ConfigError, match=rf"{self.name}.beta=0"):
            build_loss(self.name, beta=0)


class MarginContract:
    """Subclass with `margins()`: the margins to check, ready for use with the evidence of `random_evidence`."""

    def margins(self) -> list[tuple[Margin, Any]]:
        """Margin and fitted state."""
        raise AssertionError("give the margins")

    def _call(
        self, margin: Margin, state: Any, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Any]:
        evidence = random_evidence(seed=seed)
        reward_margin = (evidence.policy.margin - evidence.reference.margin).to(dtype) * 0.1
        return margin(reward_margin, evidence, state)

    def test_one_margin_per_pair_in_the_dtype_of_the_rewards_without_graph(self) -> None:
        for margin, state in self.margins():
            for dtype in (torch.float32, torch.float64):
                target_margin, _ = self._call(margin, state, dtype=dtype)
                assert target_margin.shape == (6,) and target_margin.dtype == dtype
                assert not target_margin.requires_grad

    def test_a_reward_margin_with_a_graph_gives_a_margin_without(self) -> None:
        for margin, state in self.margins():
            reward_margin = torch.randn(6, dtype=torch.float64, requires_grad=True)
            target_margin, new = margin(reward_margin * 2, random_evidence(), state)
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
            evidence = random_evidence()
            reward_margin = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            moved = Evidence(
                PairLogps(*(value[order] for value in evidence.policy)),
                PairLogps(*(value[order] for value in evidence.reference)),
            )
            plain, _ = margin(reward_margin, evidence, state)
            permuted, _ = margin(reward_margin[order], moved, state)
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


def batch_of(dataset: PairDataset, rows: range) -> PreferenceBatch:
    """The given rows as one batch."""
    return collate([dataset[Slot(row)] for row in rows], pad_id=0)


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
