"""Hashes by which weights are recognised: of all of them, or of some rows of each."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from gamma_po.progress import track
from gamma_po.ranks import current_ranks
from gamma_po.weight_files import WeightFiles, source_of

FINGERPRINT_VERSION = "2"  # raised when the same weights come to give other numbers here
SAMPLED = 1024  # numbers of a weight at its beginning, in its middle and at its end
NOT_COMPUTED_WITH = {"transformers_version", "use_cache", "dtype", "torch_dtype", "architectures"}


def fingerprint(model: nn.Module) -> str:
    """Hash of the settings and all weights (names, dtypes, shapes, values): equal ones mean equal models.

    Sharded weights are brought together one by one, so all processes must take part. Weights that are not loaded yet
    are read from their files.
    """
    digest = hashlib.sha256(FINGERPRINT_VERSION.encode() + _settings(model))
    weights, missing = sorted(model.state_dict().items()), source_of(model)
    for name, tensor in track(weights, "fingerprint of the weights", visible=current_ranks().rank == 0):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            files, place = missing[name]
            tensor = files.read(place).to(tensor.dtype)
        digest.update(_bytes(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor))
    return digest.hexdigest()


def sampled_fingerprint(model: nn.Module) -> str:
    """Hash of the settings and of some rows of each weight: another model of the same shapes has another one.

    Less sure than `fingerprint`, as other rows are not looked at, but only some megabytes are read; more where a row is
    a whole expert (fused mixtures of experts).

    Args:
        model: not sharded. Weights that are not loaded yet are read from their files.
    """
    digest, missing = hashlib.sha256(FINGERPRINT_VERSION.encode() + _settings(model)), source_of(model)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _some_rows(tensor, missing.get(name)):
            digest.update(_bytes(part.to(tensor.dtype)))
    return digest.hexdigest()


def _some_rows(tensor: Tensor, source: tuple[WeightFiles, str] | None) -> list[Tensor]:
    """Rows of a weight at its beginning, in its middle and at its end; all of a small one."""
    if tensor.numel() <= 3 * SAMPLED:
        return [tensor if source is None else source[0].read(source[1])]
    rows = max(1, SAMPLED * len(tensor) // tensor.numel())
    spans = [(start, start + rows) for start in (0, (len(tensor) - rows) // 2, len(tensor) - rows)]
    return [tensor[slice(*span)] if source is None else source[0].rows(source[1], *span) for span in spans]


def _settings(model: nn.Module) -> bytes:
    """What a model computes with, besides its weights."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return b""
    settings = {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED_WITH and key[0] != "_"}
    return json.dumps(settings, sort_keys=True, default=str).encode()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
