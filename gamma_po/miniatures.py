"""A model of the same architecture and the same settings, small enough to be tried in a moment."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

HEADS, VOCABULARY, INNER, SPAN = 2, 128, 64, 4
LARGEST = 50_000_000  # parameters; more would take seconds
INNER_SIZES = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "ffn_dim",
)  # fmt: skip
SPANS = ("sliding_window", "window_size", "index_topk")  # how many tokens a layer looks at
# What configurations and models raise where a size does not suit another one.
UNSUITED = (
    TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError,
    StrictDataclassError,
)  # fmt: skip


def miniature(model: PreTrainedModel, attention: str) -> PreTrainedModel | None:
    """Build a small random model from a model's configuration.

    It has one layer of each kind (two at least), two heads of the given size, 128 tokens and, where a layer looks at
    the last tokens only, a window of 4, so that a short sequence goes beyond it. All that scales or caps is as given.
    Its weights are large enough for attention and logits to be far from uniform.

    Args:
        model: any; its weights are not read. They may be on the meta device.
        attention: backend of the small model, in which its own forward runs.

    Returns:
        In float32 on the CPU, in eval mode; None where the architecture cannot be built or run in such a size. The
        global random state is left alone.
    """
    config = copy.deepcopy(model.config)
    try:
        _shrink(config.get_text_config())
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            size = sum(p.numel() for p in _build(model, config, attention).parameters())
        if size > LARGEST:
            log.debug("%s: %d parameters are too many to be tried", model.config.model_type, size)
            return None
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            small = _build(model, config, attention)
            _fill(small)
            with torch.no_grad():
                small(input_ids=torch.arange(1, 2 * SPAN)[None], use_cache=False)
    except UNSUITED as error:
        log.debug("%s cannot be tried in small: %r", model.config.model_type, error)
        return None
    return small


def _build(model: PreTrainedModel, config: PretrainedConfig, attention: str) -> PreTrainedModel:
    built = type(model)._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)
    return built.eval()


def _shrink(config: PretrainedConfig) -> None:
    """Make sizes small that none of the others depends on, or all together."""
    kept = _layers_of_each_kind(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, name, [value[layer] for layer in kept])
    changes: dict[str, Any] = {"num_hidden_layers": len(kept), "vocab_size": min(config.vocab_size, VOCABULARY)}
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int):
        changes["hidden_size"] = HEADS * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        changes["num_attention_heads"] = HEADS
        changes |= dict.fromkeys((n for n in INNER_SIZES if isinstance(getattr(config, n, None), int)), INNER)
        changes |= {"num_key_value_heads": HEADS if groups == heads else 1} if isinstance(groups, int) else {}
    changes |= {name: SPAN for name in SPANS if isinstance(getattr(config, name, None), int)}
    changes |= {"pad_token_id": 0} if getattr(config, "pad_token_id", None) is not None else {}
    for name, value in changes.items():
        setattr(config, name, value)


def _layers_of_each_kind(config: PretrainedConfig) -> list[int]:
    """The first layer of each kind, by all lists with an entry per layer; at least two layers where there are."""
    count = config.num_hidden_layers
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) == count]
    first: dict[str, int] = {}
    for layer in range(count):
        first.setdefault(repr([value[layer] for value in lists]), layer)
    kept = list(first.values())
    return kept if len(kept) > 1 else list(range(min(count, 2)))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random weights: products of unit variance times 2, other numbers a little off what they are."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=2 * parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
