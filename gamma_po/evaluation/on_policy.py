"""What policy and reference write themselves: gold reward, win rate, KL divergence, length, variety."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gamma_po.data.formatting import Preference
from gamma_po.data.messages import Prompt
from gamma_po.evaluation.generation import Sampling, sample_completions
from gamma_po.evaluation.gold import GoldReward
from gamma_po.evaluation.intervals import Estimate, clustered_mean, clustered_share
from gamma_po.evaluation.pairs import preferred
from gamma_po.layouts import padded_sequences
from gamma_po.progress import track
from gamma_po.scorer import CompletionScorer


class Samples(NamedTuple):
    """Completions of one model, and what was measured on them."""

    tokens: list[Tensor]  # token ids [m_i] per prompt
    texts: list[str]
    gold: Tensor | None  # [prompts]


class Comparison(NamedTuple):
    """The policy's samples against the reference's, prompt by prompt."""

    gold_policy: Estimate | None
    gold_reference: Estimate | None
    win_rate: Estimate | None  # share of prompts where the policy's gold reward is higher, ties 1/2
    kl: Estimate  # nats per sequence, of the sampling distributions
    length_policy: float  # tokens
    length_reference: float
    distinct2_policy: float
    distinct2_reference: float


def draw(
    scorer: CompletionScorer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    gold: GoldReward | None,
    description: str,
) -> Samples:
    """Sample one completion per prompt and score it.

    Args:
        scorer: the model, in eval mode.
        tokenizer: decodes prompts and completions.
        prompts: token ids [n_i] each.
        sampling: how to draw.
        gold: the judge, or None.
        description: what the progress bar says.
    """
    tokens = sample_completions(scorer.model, prompts, sampling, description=description)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    if gold is None:
        return Samples(tokens, texts, None)
    prompt_texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
    return Samples(tokens, texts, torch.tensor(gold(prompt_texts, texts), dtype=torch.float32))


def score_completions(
    scorer: CompletionScorer,
    prompts: Sequence[Tensor],
    completions: Sequence[Tensor],
    *,
    batch_size: int,
    description: str,
    temperature: float = 1.0,
) -> Tensor:
    """Return log-probabilities of completions without gradient.

    Args:
        scorer: the model, in eval mode.
        prompts: token ids [n_i] each.
        completions: token ids [m_i] each.
        batch_size: sequences per forward.
        description: what the progress bar says.
        temperature: divides the logits.

    Returns:
        [sequences], float32, nats, on the CPU.
    """
    device = next(scorer.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
    logps = torch.empty(len(prompts), dtype=torch.float32)
    with torch.no_grad():
        for start in track(range(0, len(order), batch_size)[::-1], description):  # the longest first: see `generation`
            chosen = order[start : start + batch_size]
            rows = padded_sequences([prompts[i] for i in chosen], [completions[i] for i in chosen], pad_id=0)
            logps[chosen] = scorer.sequence_logps(rows.to(device), temperature).cpu()
    return logps


def compare(policy: Samples, reference: Samples, log_ratio: Tensor) -> Comparison:
    """Compare samples of both models on the same prompts.

    Args:
        policy: the policy's samples.
        reference: the reference's samples.
        log_ratio: log π(y) - log π_ref(y) of the policy's samples, [prompts], nats; its mean estimates
            KL(π, π_ref) per sequence.
    """
    prompts = torch.arange(len(policy.texts))
    win_rate = gold_policy = gold_reference = None
    if policy.gold is not None and reference.gold is not None:
        gold_policy = clustered_mean(policy.gold, prompts)
        gold_reference = clustered_mean(reference.gold, prompts)
        win_rate = clustered_share(preferred(policy.gold - reference.gold), prompts)
    return Comparison(
        gold_policy=gold_policy,
        gold_reference=gold_reference,
        win_rate=win_rate,
        kl=clustered_mean(log_ratio, prompts),
        length_policy=mean_length(policy.tokens),
        length_reference=mean_length(reference.tokens),
        distinct2_policy=distinct_bigrams(policy.texts),
        distinct2_reference=distinct_bigrams(reference.texts),
    )


def distinct_prompts(preferences: Sequence[Preference], number: int) -> list[int]:
    """Return where the first `number` different prompts stand."""
    first: dict[str, int] = {}
    for i in range(len(preferences)):
        if len(first) == number:
            break
        first.setdefault(repr(preferences[i].prompt), i)
    return list(first.values())


def shown_prompt(prompt: Prompt) -> str:
    """Return a prompt as text: itself, or its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def mean_length(completions: Sequence[Tensor]) -> float:
    """Mean number of tokens."""
    return sum(len(ids) for ids in completions) / len(completions)


def distinct_bigrams(texts: Sequence[str]) -> float:
    """Distinct-2: the share of word bigrams, over all texts, that are different (Li et al., arXiv 1510.03055).

    >>> distinct_bigrams(["a b c", "a b d"])
    0.75
    """
    bigrams = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(bigrams)) / max(1, len(bigrams))
