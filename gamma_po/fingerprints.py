"""Fingerprints by which models are recognised: hashes of all weights or of some rows of each, and the settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from gamma_po.errors import ConfigError
from gamma_po.progress import track
from gamma_po.ranks import current_ranks
from gamma_po.weight_files import WeightFiles, source_of

VERSION = 3  # raised when the same model comes to give another fingerprint here
SAMPLED = 1024  # numbers of a weight at its beginning, in its middle and at its end
NOT_COMPUTED_WITH = {"transformers_version", "use_cache", "dtype", "torch_dtype", "architectures"}


class Fingerprint(NamedTuple):
    """By what a model is recognised, also under another version of transformers.

    The settings are those of its config without bookkeeping (`NOT_COMPUTED_WITH`, and names that begin with `_`). They
    are no part of the hash, as versions of transformers differ in which ones there are; see `difference`.
    """

    weights: str  # hash of their names, dtypes, shapes and values
    settings: dict[str, Any]  # plain values
    version: int = VERSION

    @classmethod
    def of(cls, plain: object) -> Fingerprint | None:
        """Read what `_asdict` gave; None where there is none, or one that another version computed in its own way.

        Raises:
            ConfigError: it is damaged.
        """
        if not isinstance(plain, dict) or plain.get("version") != VERSION:
            return None
        if not isinstance(plain.get("weights"), str) or not isinstance(plain.get("settings"), dict):
            raise ConfigError(
                f"a damaged fingerprint of a model: {str(plain)[:80]}; allowed: as it was written, or none"
            )
        return cls(plain["weights"], plain["settings"])

    @property
    def digest(self) -> str:
        """Hash of all of it: equal ones mean equal models, under one version of transformers."""
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()


def difference(saved: Fingerprint | None, here: Fingerprint | None) -> str | None:
    """Say how a model differs from that of a training; None where it does not, or where one is not known.

    A setting counts where both have it: a key that one version of transformers does not know yet, or no longer, is no
    difference.
    """
    if saved is None or here is None:
        return None
    if saved.weights != here.weights:
        return f"other weights (fingerprint {saved.weights[:12]} in training, {here.weights[:12]} here)"
    found = list(_differing(saved.settings, here.settings))
    return f"other settings ({'; '.join(found)})" if found else None


def fingerprint(model: nn.Module) -> Fingerprint:
    """Fingerprint with all weights in it: equal ones mean equal models.

    Sharded weights are brought together one by one, so all processes must take part. Weights that are not loaded yet
    are read from their files.
    """
    weights, missing = sorted(model.state_dict().items()), source_of(model)

    def parts(name: str, tensor: Tensor) -> list[Tensor]:
        if tensor.is_meta:
            files, place = missing[name]
            return [files.read(place)]
        return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor]

    seen = track(weights, "fingerprint of the weights", visible=current_ranks().rank == 0)
    return Fingerprint(_hash((name, tensor, parts(name, tensor)) for name, tensor in seen), _settings(model))


def sampled_fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> Fingerprint:
    """Fingerprint with some rows of each weight in it: another model of the same shapes has another one.

    Less sure than `fingerprint`, as other rows are not looked at, but only some megabytes are read; more where a row is
    a whole expert (fused mixtures of experts).

    Args:
        model: not sharded. Weights that are not loaded yet are read from their files.
        dtype: hash the weights as they would be in it; by default as they are. float32 gives those of every other.
    """
    weights, missing = sorted(model.state_dict().items()), source_of(model)
    rows = ((name, tensor, _some_rows(tensor, missing.get(name))) for name, tensor in weights)
    return Fingerprint(_hash(rows, dtype), _settings(model))


def _hash(weights: Iterable[tuple[str, Tensor, list[Tensor]]], dtype: torch.dtype | None = None) -> str:
    """Hash of weights: name, the weight itself (for its dtype and shape), and what of it is looked at."""
    digest = hashlib.sha256()
    for name, tensor, parts in weights:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        digest.update(f"{name} {kind} {tuple(tensor.shape)}".encode())
        for part in parts:
            digest.update(_bytes(part.to(kind)))
    return digest.hexdigest()


def _some_rows(tensor: Tensor, source: tuple[WeightFiles, str] | None) -> list[Tensor]:
    """Rows of a weight at its beginning, in its middle and at its end; all of a small one."""
    if tensor.numel() <= 3 * SAMPLED:
        return [tensor if source is None else source[0].read(source[1])]
    rows = max(1, SAMPLED * len(tensor) // tensor.numel())
    spans = [(start, start + rows) for start in (0, (len(tensor) - rows) // 2, len(tensor) - rows)]
    return [tensor[slice(*span)] if source is None else source[0].rows(source[1], *span) for span in spans]


def _settings(model: nn.Module) -> dict[str, Any]:
    """What a model computes with, besides its weights."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return {}
    return _without_bookkeeping(json.loads(json.dumps(config.to_dict(), default=str)))


def _without_bookkeeping(value: Any) -> Any:
    """The settings, also those of models inside a model."""
    if not isinstance(value, dict):
        return value
    kept = {key: inner for key, inner in value.items() if key not in NOT_COMPUTED_WITH and not key.startswith("_")}
    return {key: _without_bookkeeping(inner) for key, inner in kept.items()}


def _differing(saved: Any, here: Any, key: str = "") -> Iterator[str]:
    """Settings that both have, with different values."""
    if isinstance(saved, dict) and isinstance(here, dict):
        for name in sorted(saved.keys() & here.keys()):
            yield from _differing(saved[name], here[name], f"{key}.{name}".removeprefix("."))
    elif saved != here:
        yield f"{key}: {saved} in training, {here} here"


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
