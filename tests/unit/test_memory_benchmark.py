"""The benchmark of memory: what it takes for allocated."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "memory", raising=False)
    import memory

    return memory


def test_what_is_allocated_is_the_most_there_was_at_one_time_up_to_the_last_step(memory: ModuleType) -> None:
    mib = 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = torch.ones(mib)  # 4 MiB
        passing = torch.ones(2 * mib)
        del passing  # 12 MiB at one time
        between = torch.ones(mib)
        del between
        with record_function(memory.STEPPED):
            pass
        behind = torch.ones(8 * mib)  # no step ends behind it
        del behind
    found = memory.most_allocated(profiler.profiler.kineto_results.events())
    assert 12 * mib <= found < 12 * mib + 2**16
    assert kept.sum() == mib


def test_what_is_off_is_marked(memory: ModuleType) -> None:
    parts = {"weights": 600, "libraries": 100, "holes": 500}
    given = {"point": memory.BASE, "estimate": parts, "stays": 0, "tokens": [1], "seconds": 1.0}

    def off(peak: int, allocated: int) -> tuple[bool, bool]:
        result = memory.Result(**given, peak=peak, allocated=allocated)
        assert result.estimated == 700 and result.ratio == 600 / allocated
        return result.peak_is_off, result.ratio_is_off

    assert off(700, 600) == (False, False)
    assert off(590, 700) == (True, False)
    assert off(1200, 710) == (False, True)
    assert off(1201, 520) == (True, True)
