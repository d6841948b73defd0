"""Turn a checkpoint into an adapter or a whole model in Hugging Face format, with a model card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from gamma_po.adapters import merged
from gamma_po.commands.arguments import guarded, new_output, parse
from gamma_po.errors import ConfigError
from gamma_po.files import write_text
from gamma_po.model_card import model_card
from gamma_po.policies import ModelConfig, export_policy
from gamma_po.runs import find_checkpoint, read_checkpoint
from gamma_po.saved import SavedPolicy, adapter_record, from_plain, open_policy

NAMES = ((r"set `weights_only` beside the path \(e\.g\. --policy\.weights_only false\)", "add --weights_only false"),)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export.

    Args:
        policy: a checkpoint (.ckpt: a file, or a folder of shards), or a run directory (or the folder of runs of one
            name: the latest), whose last checkpoint is taken.
        output: the new folder; nothing is ever replaced.
        form: `as_trained` writes the adapter if there is one, else the whole model; `merged` adds the adapter to the
            weights of its base, W + α/r BA, and writes the whole model. If training started from an adapter
            (model.policy.adapter), that one is merged first; beside an exported adapter it lies in `start/`.
        base: the model under the checkpoint, where it is not where it was in training.
        dtype: of the weights; by default as in training. Merging rounds to it once.
        trust_remote_code: run model code from the hub. Off, whatever the checkpoint says.
        weights_only: load nothing that could run code; a sharded checkpoint needs false, and that you trust its author.
    """

    policy: str
    output: str
    form: Literal["as_trained", "merged"] = "as_trained"
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    trust_remote_code: bool = False
    weights_only: bool = True


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    options = parse(ExportOptions, arguments, "export")
    return guarded(lambda: export(options), names=NAMES)


def export(options: ExportOptions) -> int:
    """Load the checkpoint, write the folder and its card.

    Raises:
        ConfigError: there is no such checkpoint, it does not fit, or the output is there already.
    """
    output = new_output(options.output)
    path = find_checkpoint(options.policy)
    saved = SavedPolicy(
        path=str(path),
        base=options.base,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        full_precision=options.form == "merged",
        weights_only=options.weights_only,
    )
    opened = open_policy(saved)
    checkpoint = read_checkpoint(path)
    steps = int(checkpoint.get("global_step", 0))
    model = whole(opened.model) if options.form == "merged" else opened.model
    is_adapter = isinstance(model, PeftModel)
    trained = from_plain(ModelConfig, opened.hyper_parameters["policy"])
    policy = replace(opened.start, dtype=trained.dtype)  # that of the base's fingerprint
    record = adapter_record(policy, opened.hyper_parameters.get("reference_model"), checkpoint.get("base_weights"))
    folder = export_policy(model, opened.tokenizer, output, record=record)
    write_text(folder / "README.md", model_card(folder.name, opened, is_adapter=is_adapter, steps=steps))
    kind = "adapter" if is_adapter else "model"
    Console(highlight=False).print(f"{kind} and model card written to {folder}", soft_wrap=True, markup=False)
    return 0


def whole(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model with its adapter merged.

    Raises:
        ConfigError: there is no adapter, or a merged weight is not finite.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError("form=merged: the checkpoint has no adapter to merge; allowed: as_trained")
    return merged(model, "form=merged")
