"""Pair metrics, sampling and the comparison of samples, against definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from gamma_po.data.formatting import Preference
from gamma_po.evaluation.generation import Sampling, sample_completions
from gamma_po.evaluation.gold import VaderSentiment
from gamma_po.evaluation.on_policy import Samples, compare, distinct_bigrams, distinct_prompts, score_completions
from gamma_po.evaluation.pairs import PairMetrics, preferred
from gamma_po.evaluation.report import as_json, pair_report, report_table
from gamma_po.policies import Lora, attach_lora
from gamma_po.scorer import CompletionScorer
from gamma_po.types import Evidence, LossOutput, PairLogps, PairRewards
from tests.tiny import tiny_model, tiny_tokenizer


def output(rows: list[tuple[float, float, float, float]]) -> LossOutput:
    """Pairs given as (policy chosen, policy rejected, reference chosen, reference rejected)."""
    policy_w, policy_l, base_w, base_l = (torch.tensor(column) for column in zip(*rows, strict=True))
    lengths = torch.full((len(rows),), 3)
    rewards = PairRewards(policy_w - base_w, policy_l - base_l)
    return LossOutput(
        loss=torch.zeros(()),
        per_pair=torch.arange(len(rows)).float(),
        rewards=rewards,
        target_margin=torch.zeros(len(rows)),
        gradient_weight=torch.zeros(len(rows)),
        evidence=Evidence(PairLogps(policy_w, policy_l, lengths, lengths), PairLogps(base_w, base_l, lengths, lengths)),
    )


ROWS = [(-1.0, -2.0, -2.0, -1.0), (-3.0, -2.0, -3.0, -1.0), (-1.0, -1.0, -2.0, -2.0), (-5.0, -1.0, -4.0, -1.0)]


def test_pair_metrics_are_means_over_pairs_however_they_are_batched() -> None:
    batched, whole = PairMetrics(), PairMetrics()
    whole.update(output(ROWS), torch.arange(4))
    batched.update(output(ROWS[:1]), torch.tensor([0]))
    batched.update(output(ROWS[1:]), torch.tensor([1, 2, 3]))
    values = whole.compute()
    # policy prefers chosen in rows 0, ties in 2; reference in none, ties in 2; rewards +2, +1, 0, -1
    assert float(values["accuracy/policy"]) == (1 + 0 + 0.5 + 0) / 4
    assert float(values["accuracy/reference"]) == 0.5 / 4
    assert float(values["rewards/accuracies"]) == (1 + 1 + 0.5 + 0) / 4
    assert float(values["rewards/margins"]) == pytest.approx((2 + 1 + 0 - 1) / 4)
    assert float(values["loss"]) == (0 + 1 + 2 + 3) / 4
    for name in ("accuracy/policy", "accuracy/reference", "rewards/margins", "logps/chosen"):
        assert float(batched.compute()[name]) == float(values[name])


def test_a_row_that_comes_twice_counts_once() -> None:
    metrics = PairMetrics()
    metrics.update(output(ROWS), torch.arange(4))
    metrics.update(output(ROWS[:2]), torch.arange(2))
    assert len(metrics.table()["index"]) == 4
    assert float(metrics.compute()["loss"]) == 1.5


def test_the_report_has_the_metrics_with_intervals_and_is_json() -> None:
    metrics = PairMetrics()
    metrics.update(output(ROWS), torch.arange(4))
    report = pair_report(metrics.table(), ["a", "a", "b", "c"])
    assert report.num_pairs == 4 and report.accuracy_policy.mean == 0.375 and report.reward_margin.mean == 0.5
    again = json.loads(json.dumps(as_json(report)))
    assert again["reward_accuracy"]["mean"] == 0.625
    table = report_table(report, None, 0, starts_at_zero=True)
    assert table.row_count == 4
    assert report.accuracy_gain.mean == pytest.approx(0.375 - 0.125)


def test_preferred_counts_ties_half() -> None:
    assert preferred(torch.tensor([2.0, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]


class Counted(list):
    """Pairs that remember how many of them were read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("number", "places", "read"), [(0, [], 0), (1, [0], 1), (3, [0, 2, 3], 4), (9, [0, 2, 3, 5], 6)]
)
def test_distinct_prompts_are_the_first_and_nothing_behind_them_is_read(
    number: int, places: list[int], read: int
) -> None:
    pairs = Counted(Preference(prompt, "x", "y", None, "row") for prompt in "aabcad")
    assert distinct_prompts(pairs, number) == places and pairs.read == read


def test_distinct_bigrams_by_hand() -> None:
    assert distinct_bigrams(["a b a b"]) == 2 / 3
    assert distinct_bigrams(["one"]) == 0.0


def test_vader_ranks_plain_cases() -> None:
    good, neutral, bad = VaderSentiment()([""] * 3, ["I love this wonderful day", "The table", "I hate this awful day"])
    assert good > 0.5 and neutral == 0 and bad < -0.5


@pytest.fixture(scope="module")
def scorer() -> CompletionScorer:
    """A tiny model in eval mode."""
    return CompletionScorer(tiny_model()).eval()


def prompts(count: int) -> list[torch.Tensor]:
    tokenizer = tiny_tokenizer()
    texts = ["the cat", "a very happy dog runs", "rain"]
    return [torch.tensor(tokenizer.encode(texts[i % 3])) for i in range(count)]


def test_sampling_repeats_with_its_seed_and_leaves_the_global_random_state_alone(scorer: CompletionScorer) -> None:
    before = torch.get_rng_state()
    draws = [
        sample_completions(scorer.model, prompts(5), Sampling(max_new_tokens=6, seed=seed, batch_size=2))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))


def test_a_completion_ends_with_the_first_end_of_sequence_token_or_at_the_limit(scorer: CompletionScorer) -> None:
    eos = tiny_tokenizer().eos_token_id
    sampling = Sampling(max_new_tokens=40, temperature=3.0, batch_size=64)
    completions = sample_completions(scorer.model, prompts(64), sampling)
    ended = [completion for completion in completions if eos in completion]
    assert ended and all(int(completion[-1]) == eos and (completion[:-1] != eos).all() for completion in ended)
    assert all(len(completion) == 40 for completion in completions if eos not in completion)


@pytest.mark.parametrize("lora", [False, True])
def test_the_models_own_generation_settings_change_no_sample_and_are_kept(lora: bool) -> None:
    plain, changed = tiny_model(), tiny_model()
    own = changed.generation_config
    own.repetition_penalty, own.min_p, own.suppress_tokens = 5.0, 0.5, list(range(3, 200))
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    wrapped = attach_lora(changed, Lora(r=2), seed=0).eval() if lora else changed
    got, expected = (sample_completions(model, prompts(6), sampling) for model in (wrapped, plain))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert changed.generation_config is own


def test_a_model_without_an_end_of_sequence_token_samples_to_the_limit() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    completions = sample_completions(model, prompts(5), Sampling(max_new_tokens=9, temperature=3.0, batch_size=2))
    assert [len(completion) for completion in completions] == [9] * 5


def test_samples_follow_the_tempered_distribution_of_the_model(scorer: CompletionScorer) -> None:
    temperature, count = 0.5, 4000
    prompt = prompts(1)[0]
    sampling = Sampling(max_new_tokens=1, temperature=temperature, batch_size=1000)
    first = torch.tensor([int(c[0]) for c in sample_completions(scorer.model, [prompt] * count, sampling)])
    with torch.no_grad():
        logits = scorer.model(prompt[None].long()).logits[0, -1].double()
    probabilities = torch.softmax(logits / temperature, dim=0)
    likely = probabilities.argsort(descending=True)[:5]
    for token in likely:
        p = float(probabilities[token])
        share = float((first == token).double().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_log_probabilities_of_samples_are_those_of_the_tempered_model(scorer: CompletionScorer) -> None:
    completions = [torch.tensor([5, 9, 2]), torch.tensor([7])]
    got = score_completions(scorer, prompts(2), completions, batch_size=1, description="", temperature=0.7)
    for prompt, completion, value in zip(prompts(2), completions, got, strict=True):
        with torch.no_grad():
            logits = scorer.model(torch.cat([prompt, completion])[None].long()).logits[0].double() / 0.7
        by_hand = sum(
            float(torch.log_softmax(logits[len(prompt) - 1 + t], 0)[token]) for t, token in enumerate(completion)
        )
        assert float(value) == pytest.approx(by_hand, abs=1e-5)


def test_the_comparison_by_hand() -> None:
    policy = Samples([torch.zeros(2), torch.zeros(4)], ["a b", "a b c d"], torch.tensor([1.0, 0.5]))
    reference = Samples([torch.zeros(1), torch.zeros(1)], ["a", "a"], torch.tensor([0.0, 0.5]))
    got = compare(policy, reference, torch.tensor([1.0, 3.0]))
    assert got.win_rate.mean == 0.75 and got.kl.mean == 2.0
    assert (got.gold_policy.mean, got.gold_reference.mean) == (0.75, 0.25)
    assert (got.length_policy, got.length_reference) == (3.0, 1.0)
    assert (got.distinct2_policy, got.distinct2_reference) == (3 / 4, 0.0)


def test_without_a_judge_there_is_no_gold_reward_and_no_win_rate() -> None:
    samples = Samples([torch.zeros(2)], ["a b"], None)
    got = compare(samples, samples, torch.tensor([0.0]))
    assert got.win_rate is None and got.gold_policy is None and got.kl.mean == 0
