"""Saved LoRA adapters: load one, or merge it into the model that it was trained on; never run code for it.

Order of merging: an adapter that was trained on top of another one lies in a folder that holds the other in `start/`.
That one is merged first, W + α/r BA, and so on down to the base model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from gamma_po.errors import ConfigError

DESCRIPTION, WEIGHTS, START = "adapter_config.json", "adapter_model.safetensors", "start"
RECORD = "gamma_po.json"  # beside an exported adapter: what it was trained on and against
SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")  # by what its update is multiplied
LORA_KEY = "lora_"  # in the names of an adapter's own weights
HUB_FILES = [DESCRIPTION, WEIGHTS, RECORD, f"{START}/*", "tokenizer*", "special_tokens_map.json", "chat_template*"]
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


def adapter_folder(path: str) -> Path:
    """Return the folder of an adapter; one on the hub is downloaded.

    Args:
        path: a folder, or a hub name.

    Raises:
        ConfigError: there is no such adapter.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"adapter {path!r}: no such folder; allowed: the folder of a LoRA adapter, or its hub name")
    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"adapter {path!r}: neither a folder nor to be had from the hub: {reason}") from error


def check_adapter(folder: Path) -> dict[str, Any]:
    """Return an adapter's description, after checking that loading it runs no code.

    Raises:
        ConfigError: it is not LoRA, not in safetensors, or its description names code to import.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / DESCRIPTION}: cannot be read: {error}") from error
    kind = description.get("peft_type") if isinstance(description, dict) else None
    if kind != "LORA":
        raise ConfigError(f"{folder}: an adapter of type {kind!r}; allowed: LORA")
    if description.get("megatron_config") is not None:
        raise ConfigError(f"{folder}: the adapter's megatron_config names a module to import; allowed: none")
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder}: no {WEIGHTS}; pickled weights (.bin) are not loaded")
    return description


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on the model it was trained on, frozen.

    Args:
        model: with what is in `start/` merged already.
        folder: of the adapter.

    Raises:
        ConfigError: the adapter does not fit the model: other layers, or other shapes.
    """
    check_adapter(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            saved = {key for key in file.keys() if LORA_KEY in key}  # noqa: SIM118 - not a dict
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # said below, and refused
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"{folder}: the adapter does not fit the model: {reason}") from error
    places = {key for key in get_peft_model_state_dict(adapted, save_embedding_layers=False) if LORA_KEY in key}
    if saved != places:
        example = sorted(saved ^ places)[0]
        where = "has no place for" if example in saved else "needs"
        raise ConfigError(f"{folder}: the adapter does not fit the model, which {where} {example!r}")
    return adapted


def adapter_digest(folder: Path) -> str:
    """Return a hash of a saved adapter: of its weights and their scale, and of what is in its `start/`."""
    description, below = check_adapter(folder), folder / START
    digest = hashlib.sha256(adapter_digest(below).encode() if below.is_dir() else b"")
    digest.update(json.dumps([description.get(key) for key in SCALES], sort_keys=True).encode())
    digest.update((folder / WEIGHTS).read_bytes())
    return digest.hexdigest()


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the model with a saved adapter added to its weights, what is in its `start/` first.

    Args:
        model: the base.
        folder: of the adapter.

    Raises:
        ConfigError: an adapter does not fit, or a merged weight is not finite.
    """
    if (folder / START).is_dir():
        model = merge_adapter(model, folder / START)
    return merged(load_adapter(model, folder), str(folder))


def merged(model: PeftModel, name: str) -> PreTrainedModel:
    """Return the model with its adapter added to its weights, W + α/r BA, in the dtype of W; all weights train again.

    Args:
        model: with one adapter.
        name: of the adapter, for the error.

    Raises:
        ConfigError: a merged weight is not finite.
    """
    check_tied(model, name)
    try:
        return model.merge_and_unload(safe_merge=True).requires_grad_(True).eval()
    except ValueError as error:
        raise ConfigError(f"{name}: the adapter cannot be merged: {str(error).splitlines()[0]}") from error


def check_tied(model: PeftModel, name: str) -> None:
    """Refuse an adapter on one end of weights that embedding and head share: merging would change both ends.

    Raises:
        ConfigError: naming the layer.
    """
    base = model.get_base_model()
    ends = {"the embedding": base.get_input_embeddings(), "the head": base.get_output_embeddings()}
    if len({id(getattr(end, "weight", end)) for end in ends.values()}) == 2:
        return
    for end, layer in ends.items():
        if isinstance(layer, BaseTunerLayer):
            raise ConfigError(
                f"{name}: an adapter on {end}, which shares its weights with the other end of this model; merged, it "
                "would change both; allowed: adapters on the layers between"
            )


def keep_record(folder: Path, record: dict[str, Any]) -> None:
    """Say beside an exported adapter what it stands on, for peft and for `gamma_po`.

    Args:
        folder: of the adapter.
        record: see `saved.adapter_record`.
    """
    name_base(folder, record["policy"]["path"])
    if record["policy"]["adapter"] is not None:
        keep_start(folder, record["policy"]["adapter"])
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def name_base(folder: Path, base: str) -> None:
    """Say in an adapter's description which model it stands on, unless it says so.

    Args:
        folder: of the exported adapter.
        base: as `model.policy.path` named it.
    """
    description = json.loads((folder / DESCRIPTION).read_text())
    if not description.get("base_model_name_or_path"):
        description["base_model_name_or_path"] = base
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def keep_start(folder: Path, start: str) -> None:
    """Copy the adapter below an exported one beside it, and say in its description that it comes first.

    The description's base then names no model, so that nobody loads the adapter on the bare base by mistake.

    Args:
        folder: of the exported adapter.
        start: the adapter that the training started from.
    """
    shutil.copytree(adapter_folder(start), folder / START)
    description = json.loads((folder / DESCRIPTION).read_text())
    base = description.get("base_model_name_or_path") or "the base model"
    description["base_model_name_or_path"] = f"{base} with the adapter in {START}/ merged into it first"
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
