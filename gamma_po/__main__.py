"""`python -m gamma_po COMMAND ...`; heavy imports happen only once the command is known."""

from __future__ import annotations

import sys

USAGE = """\
usage: python -m gamma_po COMMAND [options]

γ-PO: preference optimization with per-pair target margins.

Training (options from YAML with --config FILE, or --model.loss DPO --data.train pairs.jsonl ...):
  fit        tune a policy on preference pairs, then compare it with its reference
  validate   metrics on the validation split          (--ckpt_path FILE)
  test       metrics and samples on the test split    (--ckpt_path FILE)
  predict    per-pair scores of the test split to Parquet

Looking things up:
  losses     the losses: formula, options with defaults, paper
  margins    the target margins, likewise
  presets    ready-made pairs of loss and margin

`python -m gamma_po fit --help` lists every option of `fit`; `--print_config` prints the configuration in force.
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
TABLE_COMMANDS = ("losses", "margins", "presets")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0
    command = arguments[0]
    if command in TABLE_COMMANDS:
        from gamma_po.tables import write_table

        return write_table(command)
    if command in TRAINER_COMMANDS:
        from gamma_po.cli import run

        return run(arguments)
    sys.stderr.write(f"unknown command {command!r}; allowed: {', '.join(TRAINER_COMMANDS + TABLE_COMMANDS)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
