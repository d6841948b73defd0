"""The base under adapters: by what it is recognised, and the refusal of another one."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from transformers import PreTrainedModel

from gamma_po.adapters import adapter_digest, adapter_folder
from gamma_po.errors import ConfigError
from gamma_po.fingerprints import Fingerprint, difference, sampled_fingerprint
from gamma_po.policies import DTYPES, ModelConfig, load_model, without_weights


def base_fingerprint(config: ModelConfig, model: PreTrainedModel | None = None) -> Fingerprint | None:
    """Fingerprint of what adapters are trained on: of its weights in `config.dtype`, as they are in their files.

    That is before they are quantised, which rounds otherwise on a GPU than on a CPU, and before an adapter is merged
    into them, which rounds otherwise on another processor: that adapter comes into the hash as it is.

    Args:
        config: of the base.
        model: the base as loaded with `config`, or in float32; without it, or where it is no longer as it was in its
            files, these are read once more: some rows of each weight, or the whole model where they cannot be read in
            parts.

    Returns:
        None for a quantised base of which no part can be read alone: whole and not quantised it may not fit anywhere.
    """
    bare = replace(config, quantization=None, adapter=None)
    if model is None or bare != config:
        model = without_weights(bare)
        if model is None and config.quantization is None:
            model = load_model(bare)
    if model is None:
        return None
    found = sampled_fingerprint(model, DTYPES[config.dtype])
    if config.adapter is None:
        return found
    both = found.weights + adapter_digest(adapter_folder(config.adapter))
    return found._replace(weights=hashlib.sha256(both.encode()).hexdigest())


AS_BASE = "named as `base` beside the path (e.g. --policy.base) where it lies elsewhere now"


def check_base(
    config: ModelConfig,
    model: PreTrainedModel | None,
    trained_dtype: str,
    saved: Fingerprint | None,
    place: str,
    *,
    named: str = AS_BASE,
) -> None:
    """Refuse to put trained adapters on another base than theirs.

    The base is compared in the dtype of the training, whatever it is loaded in here, and before it is quantised.

    Args:
        config: of the base as it is loaded here.
        model: that base, where it is in memory.
        trained_dtype: that of the weights in training.
        saved: the fingerprint of the base in training; None where it is not known (older checkpoints and adapters, and
            see `base_fingerprint`): then any base is taken.
        place: of the checkpoint or the adapter.
        named: how the user says which base it is, for the error.

    Raises:
        ConfigError: it is another one.
    """
    if saved is None:
        return
    fits = config.dtype in (trained_dtype, "float32")  # else its weights are rounded otherwise than in training
    here = base_fingerprint(replace(config, dtype=trained_dtype), model if fits else None)
    different = difference(saved, here)
    if different is not None:
        raise ConfigError(
            f"{place} was written with a base of {different}; the base here is {config.path!r}; allowed: the model "
            f"that it was trained on, {named}"
        )
