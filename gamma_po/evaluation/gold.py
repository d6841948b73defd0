"""Gold rewards: programmatic judges of a completion, for experiments that need no human and no model judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


class GoldReward(ABC):
    """Scores completions; higher is better."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return one score per completion."""


class VaderSentiment(GoldReward):
    """VADER's compound sentiment in [-1, 1] (Hutto and Gilbert, ICWSM 2014): very negative to very positive."""

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return the compound score of each completion; the prompt does not count."""
        return [self._analyzer.polarity_scores(completion)["compound"] for completion in completions]
