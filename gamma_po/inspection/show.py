"""Pairs, lengths and costs for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gamma_po.data.dataset import Example

BARS = " ▁▂▃▄▅▆▇█"
BINS = 32
HEAD, TAIL = 48, 16  # tokens shown of a long text
STYLES = {"prompt": ("cyan", "blue"), "chosen": ("green", "bright_green"), "rejected": ("red", "bright_magenta")}
UNFINISHED = "\ufffd"  # what a part of a character decodes to


def token_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, styles: tuple[str, str]) -> Text:
    """Return decoded tokens in alternating colours; special tokens stand out, line breaks are marked.

    Args:
        ids: token ids.
        tokenizer: decodes them.
        styles: two of them, so that neighbouring tokens differ.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    text, pending = Text(), []
    for number, token in enumerate(ids):
        pending.append(token)
        piece = tokenizer.decode(pending)
        if piece.endswith(UNFINISHED) and len(pending) < 4 and number + 1 < len(ids):
            continue  # the rest of the character is in the next token
        style = "bold reverse yellow" if token in special else styles[number % 2]
        text.append(piece.replace("\n", "⏎\n"), style=style)
        pending = []
    return text


def shortened(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, styles: tuple[str, str]) -> Text:
    """Return the beginning and the end of a long text, and how much was left out."""
    if len(ids) <= HEAD + TAIL:
        return token_text(ids, tokenizer, styles)
    between = Text(f" … {len(ids) - HEAD - TAIL} tokens … ", style="dim italic")
    start, end = token_text(ids[:HEAD], tokenizer, styles), token_text(ids[-TAIL:], tokenizer, styles)
    return Text.assemble(start, between, end)


def pair_table(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Table:
    """Return a few pairs as the model will see them: every token, its role, and the label."""
    table = Table(title="pairs as the model sees them", box=box.SIMPLE_HEAD, show_lines=True)
    table.add_column("row")
    table.add_column("part")
    table.add_column("tokens", justify="right")
    table.add_column("decoded, token by token", overflow="fold")
    for example in examples:
        row = f"{example.slot.index}" + ("\nflipped by label_noise" if example.flipped else "")
        for part, styles in STYLES.items():
            ids = getattr(example, part).tolist()
            trained = "" if part == "prompt" else "\n(scored)"
            table.add_row(row, part + trained, str(len(ids)), shortened(ids, tokenizer, styles))
            row = ""
    return table


def length_table(lengths: dict[str, Tensor]) -> Table:
    """Return quantiles and a histogram of the lengths of each part, on one axis."""
    longest = max(int(values.max()) for values in lengths.values())
    table = Table(title="lengths, tokens", box=box.SIMPLE_HEAD)
    for column in ("part", "min", "median", "p90", "p99", "max", f"histogram, 0 to {longest}"):
        table.add_column(column, justify="left" if column.startswith(("part", "hist")) else "right")
    for part, values in lengths.items():
        quantiles = torch.quantile(values.double(), torch.tensor([0, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64))
        numbers = [f"{value:.0f}" for value in quantiles.tolist()]
        table.add_row(part, *numbers, histogram_line(values, longest))
    return table


def histogram_line(values: Tensor, longest: int) -> str:
    """Return a histogram over [0, longest] as one line of bars; what is not empty is never blank.

    >>> len(histogram_line(torch.tensor([1, 5, 9]), 9))
    32
    """
    counts = torch.histc(values.float(), bins=BINS, min=0, max=max(1, longest))
    heights = (counts / counts.max() * (len(BARS) - 1)).ceil().long()
    return "".join(BARS[height] for height in heights.tolist())


def facts_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Return names and values as a table without a header."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def size(number: float) -> str:
    """Return bytes for a reader.

    >>> size(3 * 2**30), size(5 * 2**20)
    ('3.0 GiB', '5 MiB')
    """
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return a duration for a reader.

    >>> duration(4.21), duration(90), duration(7300)
    ('4.2 s', '1.5 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
