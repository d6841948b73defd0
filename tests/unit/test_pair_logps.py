"""Log-probabilities with and without the fields that only some losses read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gamma_po.data.dataset import PairDataset, Slot, collate
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.errors import ConfigError
from gamma_po.reference import check_agreement
from gamma_po.types import Evidence, PairLogps, PreferenceBatch
from tests.contracts import random_evidence


def fields_of(logps: PairLogps) -> list[list[float] | None]:
    """Plain numbers."""
    return [None if field is None else field.tolist() for field in logps]


def numbered(count: int) -> PairLogps:
    """Field k of pair i is 10 k + i; the fields after `count` are not there."""
    return PairLogps(*(torch.arange(3.0) + 10 * k for k in range(count)))


@pytest.mark.parametrize("count", [4, 6, 8])
def test_swapping_exchanges_every_field_that_is_there_and_twice_is_nothing(count: int) -> None:
    logps = numbered(count)
    assert [None if field is None else int(field[0]) for field in logps.swapped()] == [
        10 * (k + 1 if k % 2 == 0 else k - 1) if k < count else None for k in range(8)
    ]
    assert fields_of(logps.swapped().swapped()) == fields_of(logps)


def test_maps_leave_absent_fields_absent() -> None:
    evidence = Evidence(numbered(4), numbered(6)).map(lambda field: field[1:])
    assert fields_of(evidence.policy) == [[1, 2], [11, 12], [21, 22], [31, 32], None, None, None, None]
    assert fields_of(evidence.reference)[4:] == [[41, 42], [51, 52], None, None]
    leaves = numbered(6).map(Tensor.requires_grad_)
    assert not any(field.requires_grad for field in leaves.detach() if field is not None)


def test_joining_keeps_the_fields_and_the_order() -> None:
    joined = PairLogps.joined([numbered(6), numbered(6).map(lambda field: field[:1] + 0.5)])
    assert joined.chosen.tolist() == [0, 1, 2, 0.5] and joined.rejected_shared.tolist() == [50, 51, 52, 50.5]
    assert joined.chosen_on_policy is None


def dataset(reference: PairLogps) -> PairDataset:
    """Three pairs of which the second is mislabelled."""
    tokens = torch.tensor([1, 2])
    pairs = [TokenizedPair(*(tokens,) * 3, False) for _ in range(3)]
    built = PairDataset(pairs, torch.tensor([False, True, False]))
    built.reference = reference
    return built


@pytest.mark.parametrize("count", [4, 6])
def test_a_mislabelled_pair_has_its_reference_swapped_field_by_field_alone_and_in_a_batch(count: int) -> None:
    data = dataset(numbered(count))
    labelled = data.labelled_reference()
    expected = [[10 * k, 10 * (k + 1 if k % 2 == 0 else k - 1) + 1, 10 * k + 2] for k in range(count)]
    assert fields_of(labelled) == [*expected, *[None] * (8 - count)]
    batch = collate([data[Slot(row)] for row in range(3)], pad_id=0)
    assert fields_of(batch.reference) == fields_of(labelled)


def test_a_batch_moves_whatever_fields_there_are() -> None:
    data = dataset(numbered(6))
    batch: PreferenceBatch = collate([data[Slot(row)] for row in range(3)], pad_id=0).to("cpu")
    assert batch.reference.rejected_shared is not None and batch.reference.chosen_on_policy is None


def test_the_evidence_of_the_contracts_is_consistent() -> None:
    """What is shared is part of the whole, and all of it where the completion is the shorter one."""
    policy = random_evidence(200).policy
    for total, shared, mine, other in (
        (policy.chosen, policy.chosen_shared, policy.chosen_length, policy.rejected_length),
        (policy.rejected, policy.rejected_shared, policy.rejected_length, policy.chosen_length),
    ):
        assert ((total <= shared) & (shared < 0)).all()
        assert torch.equal(shared[mine <= other], total[mine <= other])


def test_below_full_precision_one_token_may_be_off_by_what_many_may_not() -> None:
    lengths = torch.tensor([1.0, 100.0])
    reference = PairLogps(torch.tensor([-2.0, -200.0]), torch.tensor([-3.0, -300.0]), lengths, lengths)
    rows = torch.tensor([4, 9])
    off = reference._replace(rejected=reference.rejected + torch.tensor([0.2, 2.0]))
    check_agreement(off, reference, rows, full_precision=False)
    with pytest.raises(ConfigError, match=r"row 4 of the training split, a completion of 1 tokens"):
        check_agreement(off, reference, rows, full_precision=True)
    off = reference._replace(rejected=reference.rejected + torch.tensor([0.2, 14.0]))  # 0.14 nat per token
    with pytest.raises(ConfigError, match=r"0.14 nat per token \(pair in row 9 .* 100 tokens; allowed 0.055"):
        check_agreement(off, reference, rows, full_precision=False)
