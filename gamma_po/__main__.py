"""`python -m gamma_po COMMAND ...`; heavy imports happen only once the command is known."""

from __future__ import annotations

import importlib
import sys
import warnings

USAGE = """\
usage: python -m gamma_po COMMAND [options]

γ-PO: preference optimization with per-pair target margins.

Before training (takes the options of `fit`):
  inspect    what the run would do: tokens, data, reference, memory, time; exit status 1 if it looks wrong

Training (options from YAML with --config FILE, or --model.loss DPO --data.train pairs.jsonl ...):
  fit        tune a policy on preference pairs, then compare it with its reference
  validate   metrics on the validation split          (--ckpt_path FILE)
  test       metrics and samples on the test split    (--ckpt_path FILE)
  predict    per-pair scores of the test split to Parquet

After training (a policy is a run directory, a checkpoint, an exported folder, or any model):
  generate   answers in AlpacaEval 2 and Arena-Hard formats; a chat with --interactive
  export     a checkpoint as an adapter or a merged model, with a model card
  evaluate   pair accuracy of implicit rewards by subset; win rates from a judge's annotations

Studies:
  study      does γ help? `study bandit`, `alpacaeval`, `lm`, `tune`: arms, controls, verdicts; `study calibrate`

Looking things up:
  losses     the losses: formula, options with defaults, paper
  margins    the target margins, likewise
  presets    ready-made pairs of loss and margin

`python -m gamma_po fit --help` lists every option of `fit`; `--print_config` prints the configuration in force.
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
TABLE_COMMANDS = ("losses", "margins", "presets")
OWN_COMMANDS = ("inspect", "generate", "export", "evaluate", "study")  # a file each in gamma_po/commands

OF_LIBRARIES = (  # what they say about each other: nobody who runs a command can do anything about it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 about torch 2.13
    "`is_gradient_checkpointing` is deprecated",  # peft 0.21 about transformers 5.23
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    command = arguments[0]
    for message in OF_LIBRARIES:
        warnings.filterwarnings("ignore", message=message)
    if command in TABLE_COMMANDS:
        from gamma_po.tables import write_table

        return write_table(command)
    if command in OWN_COMMANDS:
        return importlib.import_module(f"gamma_po.commands.{command}").main(arguments[1:])
    if command in TRAINER_COMMANDS:
        from gamma_po.cli import run

        return run(arguments)
    allowed = ", ".join(TRAINER_COMMANDS + OWN_COMMANDS + TABLE_COMMANDS)
    sys.stderr.write(f"unknown command {command!r}; allowed: {allowed}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
