"""A model without its weights, and the files that hold them: for processes of which none holds a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = [ONE_FILE, "model-*-of-*.safetensors", INDEX, "config.json", "generation_config.json"]
NOT_READ = "rotary_emb.inv_freq"  # the ending of names in older files; models compute these themselves
SOURCE = "_weight_files"  # the attribute of a model without weights


class WeightFiles:
    """The safetensors files of a model, read a tensor at a time: those that transformers reads, and no others.

    Args:
        folder: of the files.
        dtype: in which floating tensors are given.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._file_of: dict[str, Path] = {}
        for file, listed in _listed(folder).items():
            with safe_open(file, framework="pt") as opened:
                names = set(opened.keys())
            self._file_of |= dict.fromkeys(names if listed is None else names & listed, file)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        with safe_open(self._file_of[name], framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        with safe_open(self._file_of[name], framework="pt") as opened:
            return self._cast(opened.get_tensor(name))

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of a tensor; no others are read. They are copies, not pages of the file."""
        with safe_open(self._file_of[name], framework="pt") as opened:
            return self._cast(opened.get_slice(name)[start:end]).clone()

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _listed(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a model's weights, and which tensors count in each; None stands for all."""
    if (folder / ONE_FILE).is_file():
        return {folder / ONE_FILE: None}
    if not (folder / INDEX).is_file():
        return {}
    found: dict[Path, set[str] | None] = {}
    for name, file in json.loads((folder / INDEX).read_text()).get("weight_map", {}).items():
        found.setdefault(folder / Path(file).name, set()).add(name)  # by its name only: no path to follow
    return {file: names for file, names in found.items() if file.is_file()}


def source_of(model: nn.Module) -> dict[str, tuple[WeightFiles, str]]:
    """Where a model's missing weights are: names of its parameters, also under adapters, to file and name there."""
    found = {}
    for prefix, module in model.named_modules():
        files = vars(module).get(SOURCE)  # an adapter around it would give it as its own
        if files is None:
            continue
        named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if p.is_meta]
        place = {id(p): bare for name, p in named if (bare := name.replace(".base_layer.", ".")) in files}
        found |= {f"{prefix}.{name}".removeprefix("."): (files, place[id(p)]) for name, p in named}
    return found


def empty_model(location: dict[str, object], dtype: torch.dtype, attention: str) -> PreTrainedModel | None:
    """Build a model whose parameters have shapes only; its buffers are there.

    Args:
        location: arguments of `from_pretrained` that say where the model is.
        dtype: of the weights.
        attention: backend.

    Returns:
        None where the files do not name each parameter as the model does, and nothing else (other formats, quantised
        weights, or ones that transformers converts when it loads them): such a model has to be loaded whole.
    """
    config = AutoConfig.from_pretrained(**location)
    if getattr(config, "quantization_config", None) is not None:
        return None
    path = Path(str(location["pretrained_model_name_or_path"]))
    if not path.is_dir():
        path = Path(snapshot_download(str(path), revision=location.get("revision"), allow_patterns=DOWNLOADED))
    files = WeightFiles(path, dtype)
    trusted = {"trust_remote_code": location.get("trust_remote_code", False)}
    with _parameters_on_meta(), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention, **trusted)
    model.tie_weights()
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict or not _complete(model, files):
        return None
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    setattr(model, SOURCE, files)
    return model.eval()


def _complete(model: PreTrainedModel, files: WeightFiles) -> bool:
    """Whether each parameter is in the files once at least, in its shape, and nothing else is there to be read."""
    persistent = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shapes = dict(model.named_parameters(remove_duplicate=False))
    found = [next((name for name in same if name in files), None) for same in names.values()]
    if persistent or any(name not in shapes and not name.endswith(NOT_READ) for name in files):
        return False
    return all(name is not None and files.shape(name) == shapes[name].shape for name in found)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules drop the memory of each parameter as they are built; buffers stay."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Give parameters without memory a single number each for a while.

    peft puts new adapters where the weights below them are; without stand-ins that would be nowhere.
    """
    _exchange(model, lambda p: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), p.requires_grad), meta=True)
    try:
        yield
    finally:
        _exchange(model, lambda p: nn.Parameter(p.to("meta"), p.requires_grad), meta=False)


def _exchange(model: nn.Module, other: Callable[[nn.Parameter], nn.Parameter], *, meta: bool) -> None:
    """Exchange a model's parameters without memory, or those of a single number; tied ones stay tied."""
    exchanged: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta != meta or (not meta and any(parameter.stride())):
                continue
            module._parameters[name] = exchanged.setdefault(id(parameter), other(parameter))
