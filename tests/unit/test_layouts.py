"""Every layout computes what one row per completion computes: values and gradients, on several architectures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from gamma_po import attention
from gamma_po.attention import Segments, attend_in_segments
from gamma_po.errors import ConfigError
from gamma_po.layouts import LAYOUTS, packed, padded, shared_prefix
from gamma_po.policies import Lora, attach_lora
from gamma_po.scorer import CompletionScorer, check_layout, steady_positions

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE),
    "qwen2": Qwen2Config(**SIZE),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "mistral, a window of 6": MistralConfig(**SIZE, sliding_window=6),
    "gemma2, a window of 6": Gemma2Config(**SIZE, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0),
}
ROW_FREE = [name for name in LAYOUTS if name != "padded"]


def model_of(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A tiny random model whose attention is far from uniform."""
    torch.manual_seed(0)
    attention = "eager" if name.startswith("gemma2") else attention
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.3)
    return model.eval()


def pairs(seed: int = 1) -> tuple[list[Tensor], ...]:
    """Seven pairs; one-token completions on either side and on both, prompts of one token."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[Tensor]:
        lengths = torch.randint(1, 12, (7,), generator=generator)
        return [torch.randint(3, 97, (int(n),), generator=generator) for n in lengths]

    prompts, chosen, rejected = draw(), draw(), draw()
    prompts[3] = torch.tensor([5])
    chosen[0], rejected[1], chosen[2], rejected[2] = (torch.tensor([9 + i]) for i in range(4))
    return prompts, chosen, rejected


def scored(scorer: CompletionScorer, layout: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the sequences, and the gradient of their weighted sum."""
    scorer.zero_grad()
    values = scorer.sequence_logps(LAYOUTS[layout](*pairs(), 0))
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    gradients = [p.grad.flatten() for p in scorer.parameters() if p.requires_grad and p.grad is not None]
    return values.detach(), torch.cat(gradients)


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])])
@pytest.mark.parametrize("layout", ROW_FREE)
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_and_gradients_are_those_of_the_padded_layout(
    name: str, layout: str, lora: Lora | None
) -> None:
    model = model_of(name)
    if lora is not None:
        model = attach_lora(model, lora, seed=0)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
    scorer = CompletionScorer(model)
    values, gradient = scored(scorer, "padded")
    ours, our_gradient = scored(scorer, layout)
    torch.testing.assert_close(ours, values, rtol=1e-5, atol=1e-4)
    assert float((our_gradient - gradient).norm() / gradient.norm()) < 1e-4


@pytest.mark.parametrize("layout", ROW_FREE)
def test_gradient_checkpointing_changes_nothing(layout: str) -> None:
    plain = scored(CompletionScorer(model_of("llama")), layout)
    model = model_of("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(scored(CompletionScorer(model), layout), plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_sums_and_on_policy_means_are_those_of_the_single_tokens(layout: str) -> None:
    model, (prompts, chosen, rejected) = model_of("llama"), pairs()
    with torch.no_grad():
        found = CompletionScorer(model, with_on_policy=True)(LAYOUTS[layout](prompts, chosen, rejected, 0))
        for i, prompt in enumerate(prompts):
            for side, ids, other in (("chosen", chosen[i], rejected[i]), ("rejected", rejected[i], chosen[i])):
                logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1].double()
                every = logits.log_softmax(1)
                tokens = every[torch.arange(len(ids)), ids]
                collision = every.exp().square().sum(1).log()
                expected = [tokens.sum(), len(ids), tokens[: len(other)].sum(), (tokens - collision).mean()]
                fields = [getattr(found, side + end)[i] for end in ("", "_length", "_shared", "_on_policy")]
                for value, want in zip(fields, expected, strict=True):
                    assert float(value) == pytest.approx(float(want), abs=1e-4), (side, i)


def test_a_packed_row_is_the_sequences_one_after_another() -> None:
    row = packed([torch.tensor([1, 2])], [torch.tensor([3, 4])], [torch.tensor([5])], 0)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 5]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert row.predict_from.tolist() == [1, 2, 5] and row.targets.tolist() == [3, 4, 5]
    assert row.sequence.tolist() == [0, 0, 1] and row.lengths.tolist() == [2, 1]
    assert row.groups == ((4,), (3,))


def test_a_shared_prefix_row_holds_each_prompt_once() -> None:
    prompts = [torch.tensor([1, 2]), torch.tensor([6])]
    row = shared_prefix(
        prompts, [torch.tensor([3, 4]), torch.tensor([7])], [torch.tensor([5]), torch.tensor([8, 9])], 0
    )
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert row.predict_from.tolist() == [1, 2, 5, 1, 5, 7] and row.targets.tolist() == [3, 4, 7, 5, 8, 9]
    assert row.sequence.tolist() == [0, 0, 1, 2, 3, 3] and row.lengths.tolist() == [2, 1, 1, 2]
    assert row.groups == ((2, 2, 1), (1, 1, 2))


def kernel(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, longest_query: int,
    longest_key: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What variable-length FlashAttention promises, token by token; queries stand at the end of their keys."""
    assert enable_gqa and window_size[1] == 0 and query_ends.dtype == key_ends.dtype == torch.int32
    assert longest_query == int(query_ends.diff().max()) and longest_key == int(key_ends.diff().max())
    output = torch.empty_like(query)
    repeat = query.shape[1] // key.shape[1]
    for s in range(len(query_ends) - 1):
        asked, seen = int(query_ends[s + 1] - query_ends[s]), int(key_ends[s + 1] - key_ends[s])
        for i in range(asked):
            last = seen - asked + i
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            keys = slice(int(key_ends[s]) + first, int(key_ends[s]) + last + 1)
            for head in range(query.shape[1]):
                q = query[query_ends[s] + i, head]
                scores = (key[keys, head // repeat] @ q) * (scale or q.shape[0] ** -0.5)
                output[query_ends[s] + i, head] = scores.softmax(0) @ value[keys, head // repeat]
    return output


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("groups", [((3, 2, 4), (1, 1, 1)), ((4,), (2,)), ((2, 3), (5, 1, 2, 3))])
def test_one_kernel_and_one_call_per_sequence_agree(
    groups: tuple[tuple[int, ...], ...], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    torch.manual_seed(0)
    length = sum(map(sum, groups))
    query, key, value = (torch.randn(1, heads, length, 8) for heads in (4, 2, 2))
    segments = Segments.of(groups)
    in_one = attention._in_one_kernel(query, key, value, segments, 0.4, window)
    loop = attention._one_by_one(query, key, value, segments, 0.4, 0.0, window, None)
    torch.testing.assert_close(in_one, loop[0].transpose(0, 1))


@pytest.mark.parametrize("name", ["llama", "mistral, a window of 6", "gemma2, a window of 6"])
def test_ordinary_batches_and_generation_are_as_before_where_attention_is_exchanged(name: str) -> None:
    model = model_of(name)
    scorer = CompletionScorer(model)
    ids = torch.arange(3, 13)[None]

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            return scorer.sequence_logps(padded(*pairs(), 0)), written

    before = run()
    attend_in_segments(model)
    after = run()
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=2e-5)
    assert after[1].equal(before[1])


def test_a_layout_that_an_architecture_or_backend_cannot_do_is_refused_with_the_reason() -> None:
    check_layout("shared_prefix", model_of("llama"), "sdpa")
    check_layout("padded", model_of("llama"), "flash_attention_2")
    with pytest.raises(ConfigError, match=r"shared_prefix does not work.*flash_attention_2 cannot.*allowed: padded"):
        check_layout("shared_prefix", model_of("llama"), "flash_attention_2")
    recurrent = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"mamba .*allowed: padded"):
        check_layout("packed", recurrent, "sdpa")
    with_sinks = GptOssConfig(**SIZE, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with_sinks = AutoModelForCausalLM.from_config(with_sinks, attn_implementation="eager")
    for layer in with_sinks.model.layers:
        nn.init.constant_(layer.self_attn.sinks, 3.0)
    with pytest.raises(ConfigError, match=r"gpt_oss .*allowed: padded"):
        check_layout("packed", with_sinks.eval(), "eager")


def test_casting_the_scorer_leaves_the_frequencies_of_rotary_embeddings_exact() -> None:
    scorer = CompletionScorer(model_of("llama"))
    exact = scorer.model.model.rotary_emb.inv_freq.clone()
    scorer = nn.ModuleList([scorer]).to(torch.bfloat16)[0]
    assert scorer.model.lm_head.weight.dtype == torch.bfloat16
    assert scorer.model.model.rotary_emb.inv_freq.equal(exact)


def test_a_model_whose_logits_are_made_in_an_unknown_way_is_refused() -> None:
    model = model_of("llama")
    check_layout("padded", model, "sdpa")
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output)  # of its own: still the same numbers
    check_layout("padded", model, "sdpa")
    forward = model.forward

    def doubled(**inputs: object) -> object:
        output = forward(**inputs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(ConfigError, match=r"llama, as loaded, cannot be scored here.*nat per token away"):
        check_layout("padded", model, "sdpa")


SCALED = {
    "cohere": CohereConfig(**SIZE, logit_scale=0.3),
    "granite": GraniteConfig(**SIZE, logits_scaling=4.0),
    "gemma2": Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=3.0),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_and_capped_logits_are_the_models_own_over_the_temperature(name: str, temperature: float) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SCALED[name], attn_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    prompts, chosen, rejected = pairs()
    with torch.no_grad():
        found = CompletionScorer(model).sequence_logps(padded(prompts, chosen, rejected, 0), temperature)
        for value, prompt, ids in zip(found, [*prompts, *prompts], [*chosen, *rejected], strict=True):
            logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.double().log_softmax(1)[torch.arange(len(ids)), ids].sum()
            assert float(value) == pytest.approx(float(expected), abs=1e-4)


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights, as where it is going to be sharded."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def test_a_window_applied_through_the_mask_only_is_refused_in_segments() -> None:
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    window = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}
    config = Qwen2MoeConfig(**SIZE, **experts, **window, shared_expert_intermediate_size=16)
    before = torch.get_rng_state()
    for model in (on_meta(config), AutoModelForCausalLM.from_config(config).eval()):
        check_layout("padded", model, "sdpa")
        with pytest.raises(ConfigError, match=r"shared_prefix does not work here.*nat per token.*allowed: padded"):
            check_layout("shared_prefix", model, "sdpa")
        torch.set_rng_state(before)
    check_layout("shared_prefix", on_meta(CONFIGS["mistral, a window of 6"]), "sdpa")
    assert torch.get_rng_state().equal(before)


def test_logits_made_in_an_unknown_way_are_refused_also_without_weights() -> None:
    with pytest.raises(ConfigError, match=r"hyperclovax, as loaded, cannot be scored here"):
        check_layout("padded", on_meta(HyperCLOVAXConfig(**SIZE, logits_scaling=3.0)), "sdpa")


def test_rotary_embeddings_that_change_with_the_longest_row_have_a_limit() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    limit = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}
    long = Phi3Config(**SIZE, **limit, pad_token_id=0, rope_parameters=rope)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert steady_positions(long) == 32
    assert steady_positions(LlamaConfig(**SIZE, max_position_embeddings=64, rope_parameters=dynamic)) == 64
    assert steady_positions(CONFIGS["llama"]) is None
