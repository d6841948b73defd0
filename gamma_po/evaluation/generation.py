"""Sample completions from a model, batched, seeded, with a progress bar."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from gamma_po.errors import ConfigError, require
from gamma_po.policies import seeded
from gamma_po.progress import track

SEEDS = 2**32
UNLIMITED = 2**31  # tokens


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: completions that have not ended by then are cut.
        temperature: divides the logits; 0 takes the likeliest token. No top-k or top-p: what is drawn is the
            model's own (tempered) distribution, so that log-probability ratios of samples estimate its KL divergence.
        batch_size: prompts per forward.
        seed: seed of the draws, 0 <= seed < 2**32.
    """

    max_new_tokens: int = 64
    temperature: float = 0.7
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "an integer >= 1")
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "a number >= 0")
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "an integer >= 1")
        require(0 <= self.seed < SEEDS, "sampling.seed", self.seed, "an integer, 0 <= seed < 2**32")


def sample_completions(
    model: PreTrainedModel, prompts: Sequence[Tensor], sampling: Sampling, *, description: str = "sampling"
) -> list[Tensor]:
    """Draw one completion per prompt.

    What the model's own generation configuration would change (repetition penalty, min-p, suppressed tokens, ...)
    is left out; only its end-of-sequence tokens count.

    Args:
        model: in eval mode, or with a PEFT wrapper around it.
        prompts: token ids [n_i] each.
        sampling: how to draw.
        description: what the progress bar says.

    Returns:
        Token ids [m_i] per prompt, m_i >= 1, ending with the end-of-sequence token if it was drawn;
        of `max_new_tokens` each if the model has no such token.
    """
    completions: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch, rows in sampled_batches(model, prompts, sampling, description=description):
        for i, row in zip(batch, rows, strict=True):
            completions[i] = row
    return completions


def sampled_batches(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    *,
    description: str = "sampling",
    done: Container[int] = (),
    streamer: TextStreamer | None = None,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield batches of completions as they are drawn; see `sample_completions`.

    Which prompts share a batch, and the batch's random numbers, depend on the prompts and the seed alone: a run
    that stopped and leaves out what is done draws the same completions as one that did not stop.

    Args:
        model: as there.
        prompts: as there.
        sampling: as there.
        description: as there.
        done: prompts, by position, that have their completion; a batch of such prompts only is left out.
        streamer: gets the tokens of a single prompt one by one, instead of a progress bar.

    Yields:
        Positions of the prompts and their completions; the longest prompts first, so that what does not fit into the
        memory shows at once.
    """
    eos = eos_ids(model)
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=0 if sampling.temperature > 0 else None,
        top_p=1.0 if sampling.temperature > 0 else None,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    starts = range(0, len(order), sampling.batch_size)
    batches = [(start, order[start : start + sampling.batch_size]) for start in starts]
    todo = [(start, batch) for start, batch in reversed(batches) if not all(i in done for i in batch)]
    with _blank_generation_config(model):
        visible = streamer is None and bool(todo)
        for start, batch in track(todo, description, visible=visible, delay=0):  # a batch may take minutes
            with seeded(sampling.seed * 1_000_003 + start, model.device):
                rows = _generate(model, [prompts[i] for i in batch], config, streamer)
            yield batch, [_until_eos(row, eos) for row in rows]


@contextmanager
def _blank_generation_config(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Take the model's generation configuration away: `generate` fills what it is not told from there."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    own = causal.generation_config
    causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = own


def _generate(
    model: PreTrainedModel, prompts: list[Tensor], config: GenerationConfig, streamer: TextStreamer | None
) -> Tensor:
    """Left-pad, generate, and return only what is new, [rows, new tokens]."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            streamer=streamer,
        )
    return output[:, width:].cpu()


def _until_eos(row: Tensor, eos: list[int]) -> Tensor:
    """Cut after the first end-of-sequence token."""
    ends = torch.isin(row, torch.tensor(eos, dtype=torch.long)).nonzero()
    return row[: int(ends[0]) + 1] if len(ends) else row


def room_for_prompt(model: PreTrainedModel, max_new_tokens: int) -> int:
    """Return how many tokens a prompt may have beside an answer.

    Args:
        model: whose positions limit prompt and answer together.
        max_new_tokens: kept for the answer.

    Raises:
        ConfigError: none are left.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or UNLIMITED
    if positions <= max_new_tokens:
        raise ConfigError(
            f"sampling.max_new_tokens={max_new_tokens} leaves no room for a prompt: the model has {positions} "
            f"positions; allowed: less than {positions}"
        )
    return positions - max_new_tokens


def eos_ids(model: PreTrainedModel) -> list[int]:
    """Return the end-of-sequence tokens; none if the model has none."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = getattr(model.config, "eos_token_id", None)
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list) else [eos]
