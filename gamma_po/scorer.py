"""A language model as a scorer of completions, in any layout."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gamma_po.attention import SEGMENTS, Segments, attend_in_segments
from gamma_po.errors import ConfigError
from gamma_po.layouts import LAYOUTS
from gamma_po.logps import Logits, TokenLogps, completion_token_logps
from gamma_po.miniatures import miniature
from gamma_po.types import ModelInput, PairLogps

log = logging.getLogger(__name__)

LAYERS_IN_SEGMENTS, ATTENTION_IN_SEGMENTS = {"full_attention", "sliding_attention"}, ("sdpa", "eager")
PROBE_LENGTHS = (5, 3, 4)  # of prompt, chosen, rejected
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}  # mean, nats per token


class CompletionScorer(nn.Module):
    """A language model that returns log-probabilities of completions instead of logits.

    The vocabulary is met at completion positions only. Wrapping the model in a module (rather than calling
    its parts from outside) is what lets sharding strategies gather the embedding and the head for it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, with_on_policy: bool = False) -> None:
        super().__init__()
        self.model = model
        self.with_on_policy = with_on_policy  # also fill PairLogps.chosen_on_policy and rejected_on_policy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompletionScorer:
        """Move or cast as any module, except that buffers keep their dtype: a rotary embedding's frequencies, rounded
        to 16 bits, would change log-probabilities by nats per sequence, and an exported model has exact ones."""
        before = [(module, name, value) for module in self.modules() for name, value in module._buffers.items()]
        super()._apply(fn, recurse)
        for module, name, value in before:
            now = module._buffers[name]
            if value is not None and now is not None and now.dtype != value.dtype:
                module._buffers[name] = value.to(now.device)
        return self

    def forward(self, model_input: ModelInput, temperature: float = 1.0) -> PairLogps:
        """Score P pairs.

        Args:
            model_input: rows holding S = 2P sequences.
            temperature: divides the logits; 1 is the model itself.

        Returns:
            Log-probabilities (float32, nats), summed over all tokens and over the shared length, and token counts.
        """
        tokens = self.token_logps(model_input, temperature, with_collision=self.with_on_policy)
        lengths = model_input.lengths
        shortest = torch.minimum(*lengths.chunk(2)).repeat(2)
        within = torch.arange(len(tokens.logps), device=lengths.device)
        within = within - (lengths.cumsum(0) - lengths)[model_input.sequence]
        columns = [tokens.logps, tokens.logps.where(within < shortest[model_input.sequence], 0)]
        if tokens.log_collision is not None:
            columns.append(tokens.logps.detach() - tokens.log_collision)
        summed, shared, *on_policy = _sums(torch.stack(columns, 1), model_input).unbind(1)
        pairs = [summed, lengths, shared, *(excess / lengths for excess in on_policy)]
        # Copies, because sharding hangs its backward pass on what is returned, which it cannot on views.
        return PairLogps(*(side.clone() for value in pairs for side in value.chunk(2)))

    def sequence_logps(self, model_input: ModelInput, temperature: float = 1.0) -> Tensor:
        """Summed log-probability of each sequence, [S], float32, nats."""
        return _sums(self.token_logps(model_input, temperature).logps, model_input)

    def token_logps(
        self, model_input: ModelInput, temperature: float = 1.0, *, with_collision: bool = False
    ) -> TokenLogps:
        """Log-probability of each completion token, [N], float32, nats."""
        causal = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        hidden = causal.get_decoder()(
            input_ids=model_input.input_ids,
            position_ids=model_input.position_ids,
            use_cache=False,
            **_attention_arguments(causal, model_input),
        ).last_hidden_state
        return completion_token_logps(
            hidden.flatten(0, 1).index_select(0, model_input.predict_from),
            model_input.targets,
            head=causal.get_output_embeddings(),
            logits=Logits(
                scale=_logit_scale(causal.config.get_text_config()),
                softcap=getattr(causal.config.get_text_config(), "final_logit_softcapping", None),
                temperature=temperature,
            ),
            with_collision=with_collision,
        )


def check_layout(layout: str, model: PreTrainedModel, attention: str) -> None:
    """Refuse a model or a layout whose log-probabilities would be computed wrongly.

    What is known about them comes first. Then both are tried: a short pair is scored, padded and in the layout, and
    compared with the model's own logits. That is done with the model, unless its weights are not loaded yet, and with a
    small random one of its configuration, in which a window of attention is shorter than the pair.

    Args:
        layout: name of the layout.
        model: as loaded, before adapters.
        attention: attention backend asked for.

    Raises:
        ConfigError: naming the reason and the layout that works.
    """
    reason = _why_no_segments(model, attention) if layout != "padded" else None
    tried = [] if reason is not None else _to_be_tried(model, attention)
    if reason is None and not tried:
        log.warning("%s: how it is scored was not tried, as its weights are not loaded yet", model.config.model_type)
    for candidate in tried:
        wrong = _differs_from_logits("padded", candidate)
        if wrong is not None:
            raise ConfigError(f"{model.config.model_type}, as loaded, cannot be scored here: {wrong}")
        if layout != "padded":
            reason = reason or _differs_from_logits(layout, candidate)
    if reason is not None:
        raise ConfigError(f"data.layout={layout} does not work here: {reason}; allowed: padded")


def _to_be_tried(model: PreTrainedModel, attention: str) -> list[PreTrainedModel]:
    """The model, and a small one of its kind, as far as they can run."""
    small = miniature(model, attention if attention in ATTENTION_IN_SEGMENTS else "eager")
    given = [] if next(model.parameters()).is_meta else [model]
    return given if small is None else [*given, small]


def steady_positions(config: PretrainedConfig) -> int | None:
    """Return up to how many positions a sequence's numbers do not depend on the longest one of its forward.

    Rotary embeddings of the types `dynamic` and `longrope` change all their frequencies beyond some length.

    Returns:
        None where there is no such limit.
    """
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [kind for kind in given.values() if isinstance(kind, dict)]
    limits = [text.max_position_embeddings for kind in kinds if "dynamic" in kind.get("rope_type", "")]
    limits += [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(limits, default=None)


def _why_no_segments(model: PreTrainedModel, attention: str) -> str | None:
    """What is known to keep a model from attending in segments, or None."""
    other_layers = set(getattr(model.config.get_text_config(), "layer_types", None) or []) - LAYERS_IN_SEGMENTS
    if other_layers:
        return f"{model.config.model_type} has layers of {', '.join(sorted(other_layers))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{model.config.model_type} does not let its attention be exchanged"
    if attention not in ATTENTION_IN_SEGMENTS:
        return f"attention={attention} cannot attend in segments (sdpa and eager can)"
    return None


@torch.no_grad()
def _differs_from_logits(layout: str, model: PreTrainedModel) -> str | None:
    """Score one short pair; return in what it differs from the model's own logits, or None."""
    vocabulary = model.config.get_text_config().vocab_size
    spread = torch.arange(1, sum(PROBE_LENGTHS) + 1) * 7919 % vocabulary  # a prime: all over the vocabulary
    parts = [[part] for part in spread.split(PROBE_LENGTHS)]
    rows = LAYOUTS["padded"](*parts, 0).to(model.device)
    try:
        found = CompletionScorer(model).token_logps(LAYOUTS[layout](*parts, 0).to(model.device)).logps
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"{model.config.model_type} fails: {str(error).splitlines()[0]}"
    every = logits.flatten(0, 1)[rows.predict_from].float().log_softmax(1)
    difference = float((found - every.gather(1, rows.targets[:, None]).squeeze(1)).abs().mean())
    if not difference <= PROBE_TOLERANCE[model.dtype]:
        return f"its log-probabilities are {difference:.2g} nat per token away from those of the model's own logits"
    return None


def _sums(values: Tensor, model_input: ModelInput) -> Tensor:
    """Sum over the tokens of each sequence: [N, ...] to [S, ...]."""
    sums = torch.zeros(len(model_input.lengths), *values.shape[1:], device=values.device, dtype=values.dtype)
    return sums.index_add(0, model_input.sequence, values)


def _attention_arguments(model: PreTrainedModel, model_input: ModelInput) -> dict[str, object]:
    """Mask or segments, as the model takes them."""
    if model_input.groups is None:
        return {"attention_mask": model_input.attention_mask}
    if model.config._attn_implementation != SEGMENTS:
        attend_in_segments(model)
    device = model_input.input_ids.device
    # A mask of four dimensions is handed through to the attention as it is; none would be built from position ids.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {"attention_mask": unread, "segments": Segments.of(model_input.groups, device)}


def _logit_scale(config: object) -> float:
    """What the architecture multiplies its logits by (Cohere: logit_scale, Granite: 1 / logits_scaling)."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
