"""Features of an answer's text: layout, length, words shared with the instruction, and hashed words.

Nothing says which model wrote the answer.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor

WORD = re.compile(r"[a-z0-9']+")
HASHED = 16


def text_features(prompt: str, answer: str) -> list[float]:
    """Return 12 counts and shares, and 16 hashed word frequencies.

    >>> len(text_features("Name two fruits.", "1. Apple\\n2. Pear"))
    28
    """
    words, asked = WORD.findall(answer.lower()), set(WORD.findall(prompt.lower()))
    lines = answer.splitlines()
    listed = sum(bool(re.match(r"\s*([-*•]|\d+[.)])\s", line)) for line in lines)
    count = max(1, len(words))
    counted = [
        math.log1p(len(answer)),
        math.log1p(len(words)),
        math.log1p(len(lines)),
        math.log1p(answer.count("\n\n")),
        math.log1p(listed),
        math.log1p(answer.count("```") + answer.count("#")),
        math.log1p(answer.count("**")),
        sum(map(len, words)) / count,
        len(set(words)) / count,
        sum(word in asked for word in words) / count,
        len(asked & set(words)) / max(1, len(asked)),
        float(answer.rstrip().endswith((".", "!", "?", "`", ")"))),
    ]
    return counted + _hashed(words)


def standardised(features: Tensor) -> Tensor:
    """Return features with mean 0 and standard deviation 1 over all answers, at most 4 away; [N, F] -> [N, F]."""
    spread = features.std(0)
    scaled = (features - features.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))
    return scaled.clamp(-4, 4)


def _hashed(words: list[str]) -> list[float]:
    """Frequencies of words in buckets, with signs, so that they say something about the topic and style."""
    buckets = [0.0] * HASHED
    for word in words:
        digest = hashlib.blake2b(word.encode(), digest_size=4).digest()
        buckets[digest[0] % HASHED] += 1.0 if digest[1] % 2 else -1.0
    return [value / math.sqrt(max(1, len(words))) for value in buckets]
