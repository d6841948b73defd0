"""Open what training left behind: a run directory, a checkpoint, an exported adapter or model.

Nothing in a run directory is executed: checkpoints are loaded as plain tensors and values (sharded ones, which torch
unpickles, only where the user vouches for them), adapters from safetensors only, and a `trust_remote_code` written
there does not count.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gamma_po.adapters import DESCRIPTION, RECORD, START, adapter_folder, check_adapter, load_adapter
from gamma_po.bases import check_base
from gamma_po.data.tokenization import Template, Tokenization
from gamma_po.errors import ConfigError
from gamma_po.fingerprints import Fingerprint
from gamma_po.policies import Lora, ModelConfig, attach_lora, load_model, load_tokenizer
from gamma_po.runs import (
    FORMAT,
    FORMAT_KEY,
    PREVIOUS,
    check_format,
    furthest_checkpoint,
    is_run,
    latest_run,
    read_checkpoint,
    run_config,
    run_of,
)
from gamma_po.shards import check_shards, is_sharded, read_shards, shapes_in_shards

ALLOWED = "allowed: a run directory, a checkpoint (.ckpt), an exported adapter or model, a hub name, package:NAME"
Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class SavedPolicy:
    """Where a policy is, and how to load it.

    Args:
        path: a run directory (or the folder of runs of one name: the latest), a checkpoint (.ckpt: a file, or a folder
            of shards), a folder written by `export`, or any model.
        base: the model under an adapter or a checkpoint, where it is not where it was in training. Another one is
            refused.
        dtype: of the weights in memory; by default as in training, for exported models float32.
        attention: transformers' attention backend.
        trust_remote_code: run model code from the hub. Off, whatever a checkpoint says.
        full_precision: load a base that was quantised in training as it was before.
        weights_only: load nothing that could run code; a sharded checkpoint needs false, and that you trust its author.
    """

    path: str
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None
    trust_remote_code: bool = False
    full_precision: bool = False
    weights_only: bool = True


class Opened(NamedTuple):
    """A policy in memory, in eval mode."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    start: ModelConfig | None  # what training started from; None for a model of which that is not known
    hyper_parameters: dict[str, Any]  # of the checkpoint; the reference_model of an adapter's record; empty for others
    run: Path | None  # the run directory, where there is one
    source: Path | None  # the checkpoint or the exported folder itself


def open_policy(saved: SavedPolicy) -> Opened:
    """Load a policy.

    Raises:
        ConfigError: nothing is there, it is not what it should be, or its base model cannot be found or is another one.
    """
    path = Path(saved.path).expanduser()
    if path.name.removesuffix(PREVIOUS).endswith(".ckpt") or is_sharded(path):
        return _from_checkpoint(path, saved)
    if not path.is_dir():
        return _from_elsewhere(saved)
    if (path / DESCRIPTION).is_file():
        return _from_adapter(path, saved)
    if (path / "config.json").is_file():
        config = _adjusted(ModelConfig(path=str(path.resolve())), saved)
        start = start_of_run(path.parent)
        return Opened(load_model(config), load_tokenizer(config), start, {}, run_of(path), path)
    return open_policy(dataclasses.replace(saved, path=str(_inside_run(path))))


def on_device(opened: Opened, device: str | None) -> Opened:
    """Move a policy to the device that is asked for, or to the GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return opened._replace(model=opened.model.to(torch.device(name)))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from error


def adapter_record(
    policy: ModelConfig, reference_model: dict[str, Any] | None, base_weights: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what is kept beside an exported adapter (`gamma_po.json`): plain values, named as in a checkpoint.

    Args:
        policy: what training started from, as it was loaded there.
        reference_model: the settings of a reference of its own.
        base_weights: the fingerprint of the base, as the checkpoint has it.
    """
    known = {"policy": dataclasses.asdict(policy), "reference_model": reference_model, "base_weights": base_weights}
    return {FORMAT_KEY: FORMAT, **known}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what is kept beside an exported adapter; None for those that have no `gamma_po.json`.

    Raises:
        ConfigError: it is damaged, or of another format.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    record = record if isinstance(record, dict) else {}
    check_format(record, str(file))
    models = [record.get("policy"), record.get("reference_model") or {"path": ""}]
    if not all(isinstance(model, dict) and isinstance(model.get("path"), str) for model in models):
        raise ConfigError(f"{file}: it does not say what the adapter was trained on; allowed: as `export` wrote it")
    return record


def check_start(config: ModelConfig) -> None:
    """Refuse to start from an exported adapter on another base than its own; some rows of the base's weights are read.

    Args:
        config: of the policy or the reference. Where its adapter does not say its base, any is taken.

    Raises:
        ConfigError: it is another one.
    """
    folder = None if config.adapter is None else adapter_folder(config.adapter)
    record = None if folder is None else read_record(folder)
    if record is None:
        return
    trained = from_plain(ModelConfig, {**record["policy"], "quantization": None})
    below = str(folder / START) if (folder / START).is_dir() else None
    saved = Fingerprint.of(record.get("base_weights"))
    named = "as the path beside `adapter` (e.g. model.policy.path)"
    check_base(dataclasses.replace(config, adapter=below), None, trained.dtype, saved, str(folder), named=named)


def template_of(opened: Opened) -> Template:
    """Return how a policy's run made text of prompts, by its `config.yaml`; outside of a run: auto.

    Raises:
        ConfigError: the `config.yaml` is not valid.
    """
    data = run_config(opened.run).get("data") if opened.run is not None else None
    tokenization = data.get("tokenization") if isinstance(data, dict) else None
    return "auto" if not tokenization else from_plain(Tokenization, tokenization).template


def start_of_run(run: Path) -> ModelConfig | None:
    """Return the model that a run started from, by its `config.yaml`; None outside of a run."""
    if not is_run(run):
        return None
    policy = run_config(run).get("model", {}).get("policy")
    return None if policy is None else from_plain(ModelConfig, policy)


def from_plain(kind: type[Built], plain: dict[str, Any]) -> Built:
    """Build a dataclass of settings from the plain values of a checkpoint or of a `config.yaml`.

    Names of classes that stand in the values are not looked up: `kind` decides what is built.

    Raises:
        ConfigError: a setting that `kind` does not have, or a value of another type.
    """
    plain = plain.get("init_args", plain)
    hints, values = get_type_hints(kind), {}
    unknown = set(plain) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise ConfigError(f"{kind.__name__} has no option {', '.join(sorted(unknown))}: written by another version?")
    for name, value in plain.items():
        inner = [option for option in (hints[name], *get_args(hints[name])) if dataclasses.is_dataclass(option)]
        values[name] = from_plain(inner[0], value) if inner and isinstance(value, dict) else value
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {plain} cannot be read: {error}") from error


# --- the kinds of places ------------------------------------------------------------------------------------------


def _inside_run(folder: Path) -> Path:
    """The exported policy of a run directory, or its furthest checkpoint; of several runs, those of the latest."""
    folder = latest_run(folder) or folder
    if (folder / "policy").is_dir():
        return folder / "policy"
    found = furthest_checkpoint(folder)
    if found is not None:
        return found.path
    there = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(f"{str(folder)!r} holds no policy (there: {there}); {ALLOWED}")


def _from_elsewhere(saved: SavedPolicy) -> Opened:
    """A model of the hub, a package or a file."""
    config = _adjusted(ModelConfig(path=saved.path), saved)
    try:
        model = load_model(config)
    except ConfigError as error:
        raise ConfigError(f"{error}; nor is there a folder {saved.path!r}; {ALLOWED}") from error
    return Opened(model, load_tokenizer(config), None, {}, None, None)


def _from_checkpoint(path: Path, saved: SavedPolicy) -> Opened:
    if path.is_dir():
        check_shards(path, weights_only=saved.weights_only)
    elif not path.is_file():
        raise ConfigError(f"{saved.path!r}: no such checkpoint; {ALLOWED}")
    checkpoint = read_checkpoint(path)
    hyper_parameters = checkpoint["hyper_parameters"]
    trained = from_plain(ModelConfig, hyper_parameters["policy"])
    config = _adjusted(trained, saved, base=saved.base)
    model = load_model(config)
    if hyper_parameters.get("lora") is not None:
        check_base(config, model, trained.dtype, Fingerprint.of(checkpoint.get("base_weights")), str(path))
        model = attach_lora(model, from_plain(Lora, hyper_parameters["lora"]), seed=0)
    _load_trained(model, checkpoint, path)
    return Opened(model.eval(), load_tokenizer(config), config, hyper_parameters, run_of(path), path)


def _load_trained(model: PreTrainedModel | PeftModel, checkpoint: dict[str, Any], path: Path) -> None:
    """Put the trained weights into the model; they must be all that was trainable, and nothing else.

    Shards are read straight into the model: beside it, no more than a part of one weight is in memory.
    """
    into = {f"policy.model.{name}": value for name, value in model.state_dict().items()}
    trainable = {f"policy.model.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = checkpoint.get("state_dict", {})
    shapes = shapes_in_shards(path) if is_sharded(path) else {name: value.shape for name, value in weights.items()}
    strange = {name for name, shape in shapes.items() if name not in into or into[name].shape != shape}
    differing = strange | trainable - set(shapes)
    if differing:
        example = min(differing).removeprefix("policy.model.")
        raise ConfigError(f"{path}: its weights do not fit the model it names; the first difference is {example!r}")
    if is_sharded(path):
        read_shards(path, into)
    else:
        state = {name.removeprefix("policy.model."): value for name, value in weights.items()}
        model.load_state_dict(state, strict=False)


def _from_adapter(folder: Path, saved: SavedPolicy) -> Opened:
    description, record = check_adapter(folder), read_record(folder)
    trained = None if record is None else from_plain(ModelConfig, {**record["policy"], "quantization": None})
    start = start_of_run(folder.parent)
    below = str((folder / START).resolve()) if (folder / START).is_dir() else None
    recorded = (trained and trained.path) if below else description.get("base_model_name_or_path")
    if start is None and (path := saved.base or recorded):
        start = ModelConfig(path=path, revision=trained.revision if trained and path == trained.path else None)
    if start is None:
        raise ConfigError(
            f"{folder}: the adapter does not say which model it belongs to; name it as `base` beside the path (e.g. "
            "--policy.base): package:NAME, a folder or a hub name"
        )
    config = dataclasses.replace(_adjusted(start, saved, base=saved.base), adapter=below)
    base = load_model(config)
    if trained is not None:
        check_base(config, base, trained.dtype, Fingerprint.of(record.get("base_weights")), str(folder))
    model = load_adapter(base, folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(ModelConfig(path=str(folder.resolve())) if has_tokenizer else config)
    against = {} if record is None else {"reference_model": record.get("reference_model")}
    return Opened(model.eval(), tokenizer, config, against, run_of(folder), folder)


def _adjusted(config: ModelConfig, saved: SavedPolicy, *, base: str | None = None) -> ModelConfig:
    """The configuration with what the user has said about this machine."""
    changes: dict[str, Any] = {"trust_remote_code": saved.trust_remote_code}
    if base is not None:
        changes |= {"path": base, "revision": None}
    if saved.full_precision:
        changes |= {"quantization": None}
    changes |= {name: value for name in ("dtype", "attention") if (value := getattr(saved, name)) is not None}
    return dataclasses.replace(config, **changes)
