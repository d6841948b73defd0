"""Intervals: right by hand, right in coverage, and wide enough where pairs share a prompt."""

from __future__ import annotations

import pytest
import torch

from gamma_po.evaluation.intervals import clustered_mean, clustered_share


def test_without_clusters_the_interval_is_the_usual_standard_error() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    estimate = clustered_mean(values, torch.arange(4))
    error = float(values.std(unbiased=True)) / 2
    assert estimate == pytest.approx((4.0, 4.0 - 1.959964 * error, 4.0 + 1.959964 * error))


def test_copies_of_a_value_within_a_cluster_add_no_certainty() -> None:
    values, clusters = torch.randn(30, dtype=torch.float64), torch.arange(30)
    once = clustered_mean(values, clusters)
    thrice = clustered_mean(values.repeat(3), clusters.repeat(3))
    assert thrice == pytest.approx(once)


def test_the_interval_covers_the_truth_about_95_percent_of_the_time_with_clustered_data() -> None:
    generator = torch.Generator().manual_seed(0)
    hits, trials = 0, 800
    clusters = torch.arange(40).repeat_interleave(4)
    for _ in range(trials):
        shared = torch.randn(40, generator=generator).repeat_interleave(4)
        values = 1.0 + shared + torch.randn(160, generator=generator)
        estimate = clustered_mean(values, clusters)
        hits += estimate.low <= 1.0 <= estimate.high
    assert 0.92 <= hits / trials <= 0.97  # 40 clusters; three binomial standard errors are 0.023


def test_a_share_covers_the_truth_and_stays_within_0_and_1() -> None:
    generator = torch.Generator().manual_seed(0)
    hits, trials, truth = 0, 800, 0.9
    for _ in range(trials):
        values = (torch.rand(60, generator=generator) < truth).float()
        estimate = clustered_share(values, torch.arange(60))
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
        hits += estimate.low <= truth <= estimate.high
    assert 0.92 <= hits / trials <= 0.98


def test_a_share_of_independent_values_is_wilsons_interval() -> None:
    values = torch.tensor([1.0] * 7 + [0.0] * 3)
    estimate = clustered_share(values, torch.arange(10))
    # the effective size is that of the unbiased variance, n - 1; Wilson's interval for 7/10 with n = 9
    n, p, z = 9.0, 0.7, 1.959964
    centre = (p * n + z * z / 2) / (n + z * z)
    half = z * (n * p * (1 - p) + z * z / 4) ** 0.5 / (n + z * z)
    assert estimate == pytest.approx((p, centre - half, centre + half))


def test_a_single_cluster_gives_no_width_to_a_mean_and_the_widest_to_a_share() -> None:
    values, clusters = torch.tensor([0.0, 1.0]), torch.zeros(2)
    assert clustered_mean(values, clusters) == (0.5, 0.5, 0.5)
    share = clustered_share(values, clusters)
    assert share.low < 0.1 and share.high > 0.9
