"""What tokenised pairs look like, and whether that is right: lengths, repeats, beginnings and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gamma_po.data.dataset import PairDataset
from gamma_po.data.tokenization import TokenizedPair
from gamma_po.inspection.findings import Finding

MANY_CUT = 0.2  # share of pairs that lost tokens
MANY_DROPPED = 0.2  # share of rows
MANY_CONTRADICTIONS = 0.05  # share of pairs
LEAK = 0.01  # prompts seen in training per held-out pair
REPEATS = {"duplicates": "repeat an earlier one", "contradictions": "contradict another one (A > B and B > A)"}


class Ends(NamedTuple):
    """How prompts begin and completions end, counted over all pairs."""

    double_bos: int  # prompts
    missing_bos: int  # prompts; 0 where the tokenizer by itself puts none
    unended: int  # completions without EOS or end-of-turn, out of twice the pairs
    double_eos: int  # completions


def ends(pairs: Sequence[TokenizedPair], tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Count doubled or missing BOS tokens, and missing or doubled EOS tokens."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = torch.tensor(sorted(added | set(tokenizer.all_special_ids)))
    expects_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    starts = [pair.prompt[:2].tolist() for pair in pairs]
    completions = [completion for pair in pairs for completion in (pair.chosen, pair.rejected)]
    last = torch.tensor([int(completion[-1]) for completion in completions])
    return Ends(
        double_bos=sum(start == [bos, bos] for start in starts) if bos is not None else 0,
        missing_bos=sum(start[0] != bos for start in starts) if expects_bos else 0,
        unended=int((~torch.isin(last, special)).sum()),
        double_eos=sum(completion[-2:].tolist() == [eos, eos] for completion in completions),
    )


def lengths(pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
    """Tokens of each part, [N] each."""
    names = ("prompt", "chosen", "rejected")
    return {name: torch.tensor([len(getattr(pair, name)) for pair in pairs]) for name in names}


def dropped_rows(counts: dict[str, int]) -> int:
    """Return how many rows were read and are not used: what is counted by a problem, or as dropped.

    >>> dropped_rows({"pairs": 9, "kept": 8, "dropped_overlong": 1, "rejected is empty": 2, "prompt_truncated": 3})
    3
    """
    return sum(number for name, number in counts.items() if name.startswith("dropped_") or " " in name)


def data_findings(dataset: PairDataset, counts: dict[str, int], marks: Ends, *, dropped: set[str]) -> list[Finding]:
    """Judge what was counted in the training split.

    Args:
        dataset: the training pairs.
        counts: of the reading and the tokenisation.
        marks: how prompts begin and completions end.
        dropped: which of duplicates and contradictions the configuration drops.
    """
    total, findings = len(dataset), []
    cut = sum(pair.truncated for pair in dataset.pairs)
    unused = dropped_rows(counts)
    longer = "raise data.tokenization's max_prompt_length, max_completion_length or max_length, or set overlong: drop"
    if cut:
        level = "likely wrong" if cut > MANY_CUT * total else "note"
        findings.append(Finding(level, f"{cut} of {total} pairs lose tokens to the length limits", longer))
    if unused:
        level = "likely wrong" if unused > MANY_DROPPED * (total + unused) else "note"
        findings.append(Finding(level, f"{unused} of {total + unused} rows are not used", "look at the counts above"))
    for name, meaning in REPEATS.items():
        number = counts.get(name, 0)
        if number and name not in dropped:
            many = name == "contradictions" and number > MANY_CONTRADICTIONS * total
            change = f"data.{name}: drop, unless that is meant"
            findings.append(Finding("likely wrong" if many else "note", f"{number} of {total} pairs {meaning}", change))
    return findings + end_findings(marks, total, cut)


def end_findings(marks: Ends, total: int, cut: int) -> list[Finding]:
    """Judge how prompts begin and completions end.

    Args:
        marks: the counts.
        total: pairs.
        cut: pairs that lost tokens, whose completions may lack their end.
    """
    template = "check the chat template and the data for special tokens written out as text"
    findings = []
    if marks.double_bos:
        findings.append(Finding("likely wrong", f"{marks.double_bos} of {total} prompts have two BOS", template))
    if marks.missing_bos:
        problem = f"{marks.missing_bos} of {total} prompts lack the BOS that this tokenizer puts before a text"
        findings.append(Finding("likely wrong", problem, template))
    if marks.double_eos:
        findings.append(Finding("likely wrong", f"{marks.double_eos} completions end with EOS twice", template))
    if marks.unended > 2 * cut:
        problem = f"{marks.unended} of {2 * total} completions do not end with EOS or an end-of-turn token"
        findings.append(Finding("likely wrong", problem, template))
    return findings


def split_findings(counts: dict[str, dict[str, int]], sizes: dict[str, int]) -> list[Finding]:
    """Judge the splits against one another.

    Args:
        counts: of each split.
        sizes: pairs of each split.
    """
    findings = []
    for split in ("validation", "test"):
        if split not in sizes:
            findings.append(Finding("note", f"there is no {split} split", f"set data.{split} to see what changes"))
            continue
        shared = counts[split].get("prompts_also_in_training", 0)
        if shared:
            level = "likely wrong" if shared > LEAK * sizes[split] else "note"
            problem = f"{shared} prompts of the {split} split are also in the training split"
            findings.append(Finding(level, problem, "split the data by prompt (data.validation_share does)"))
    return findings
