"""The LightningDataModule: preference triplets in, batches out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gamma_po.data.dataset import Example, PairDataset, by_length, collate
from gamma_po.data.formatting import Columns, Preference, read_preferences
from gamma_po.data.loader import ResumableLoader, SequentialBatches, ShuffledBatches
from gamma_po.data.noise import flip_mask
from gamma_po.data.tokenization import Tokenization, tokenize_preferences
from gamma_po.errors import ConfigError, require
from gamma_po.layouts import LAYOUTS
from gamma_po.ranks import current_ranks
from gamma_po.types import PreferenceBatch

SPLITS_OF_STAGE = {
    "fit": ("train", "validation", "test"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class PreferenceDataModule(LightningDataModule):
    """Preference triplets (prompt, chosen, rejected) from files or the hub.

    Args:
        train: json, jsonl, parquet or csv file, `package:NAME/inner/file`, or hub name with an optional `:split`.
        validation: likewise; its labels are never made noisy.
        test: likewise; its prompts serve the comparison of samples after training.
        columns: how the columns are called.
        tokenization: template and truncation.
        layout: how pairs become rows of the model: `padded`, a row per completion, or `shared_prefix`, a row per
            pair in which the prompt is encoded once (faster, the more so the longer the prompts).
        batch_size: pairs per step and rank.
        eval_batch_size: pairs per forward in evaluation and when the reference is scored.
        label_noise: probability in [0, 1] with which each training pair's label is flipped.
        label_noise_seed: of the flips.
        invalid_rows: what to do with empty completions, identical pairs and the like: stop, or drop and count.
        limit_train: use only the first so many training pairs.
        limit_validation: likewise for validation.
        limit_test: likewise for test.
        num_workers: processes that collate batches.
        seed: of the batch order.
        cache_dir: folder of the reference cache; by default under ~/.cache.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        tokenization: Tokenization = Tokenization(),  # noqa: B008 - frozen
        layout: Literal["padded", "shared_prefix"] = "padded",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        label_noise: float = 0.0,
        label_noise_seed: int = 0,
        invalid_rows: Literal["error", "drop"] = "error",
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        require(batch_size >= 1, "data.batch_size", batch_size, "an integer >= 1")
        require(eval_batch_size >= 1, "data.eval_batch_size", eval_batch_size, "an integer >= 1")
        require(0 <= label_noise <= 1, "data.label_noise", label_noise, "a probability in [0, 1]")
        self.sources = {"train": train, "validation": validation, "test": test}
        self.limits = {"train": limit_train, "validation": limit_validation, "test": limit_test}
        for split, limit in self.limits.items():
            require(limit is None or limit >= 1, f"data.limit_{split}", limit, "an integer >= 1, or null")
        require(layout in LAYOUTS, "data.layout", layout, ", ".join(LAYOUTS))
        self.columns, self.tokenization, self.layout = columns, tokenization, layout
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.label_noise, self.label_noise_seed = label_noise, label_noise_seed
        self.invalid_rows = invalid_rows
        self.num_workers, self.seed = num_workers, seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.datasets: dict[str, PairDataset] = {}
        self.preferences: dict[str, list[Preference]] = {}
        self.counts: dict[str, dict[str, int]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits that the stage needs; splits already there stay."""
        if self.tokenizer is None:
            assert self.trainer is not None, "without a trainer, set datamodule.tokenizer before setup"
            self.tokenizer = self.trainer.lightning_module.tokenizer
        required = SPLITS_OF_STAGE[stage][0]
        if self.sources[required] is None:
            command = str.__str__(stage)  # Lightning's stages are strings whose format is not their value
            raise ConfigError(
                f"data.{required} is not set; `{command}` needs it: a file, package:NAME/file or hub name"
            )
        for split in SPLITS_OF_STAGE[stage]:
            if self.sources[split] is not None and split not in self.datasets:
                self.datasets[split] = self._read(split)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches that resume exactly."""
        ranks = current_ranks()
        dataset = self._with_reference("train")
        batches = ShuffledBatches(
            len(dataset), self.batch_size, seed=self.seed, rank=ranks.rank, world_size=ranks.world_size
        )
        return ResumableLoader(dataset, batch_sampler=batches, **self._loader_options())

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every validation pair once, in order; nothing where no validation data is set."""
        if self.sources["validation"] is None:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Every test pair once, in order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """As test."""
        # Lightning cannot know that the batches hold every pair, and says so.
        warnings.filterwarnings("ignore", message="You are using a custom batch sampler `SequentialBatches`")
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader:
        ranks = current_ranks()
        dataset = self._with_reference(split)
        batches = SequentialBatches(
            by_length(dataset.pairs), self.eval_batch_size, rank=ranks.rank, world_size=ranks.world_size
        )
        return DataLoader(dataset, batch_sampler=batches, **self._loader_options())

    def _read(self, split: str) -> PairDataset:
        source = self.sources[split]
        assert source is not None and self.tokenizer is not None
        preferences, counts = read_preferences(
            source, self.columns, invalid_rows=self.invalid_rows, limit=self.limits[split]
        )
        pairs, kept, token_counts = tokenize_preferences(
            preferences, self.tokenizer, self.tokenization, show_progress=current_ranks().rank == 0
        )
        self.preferences[split] = [preferences[i] for i in kept]
        self.counts[split] = {**counts, **token_counts}
        rate = self.label_noise if split == "train" else 0.0
        flipped = flip_mask(len(pairs), rate, self.label_noise_seed)
        column = None
        if self.columns.margin is not None:
            column = torch.tensor([preference.column for preference in self.preferences[split]])
        return PairDataset(pairs, flipped, column)

    def _with_reference(self, split: str) -> PairDataset:
        """The dataset, with cached reference log-probabilities where the module wants them."""
        dataset = self.datasets[split]
        module = getattr(self.trainer, "lightning_module", None)
        if module is not None:
            module.attach_reference(dataset, split)
        return dataset

    @property
    def collate(self) -> Callable[[Sequence[Example]], PreferenceBatch]:
        """Lays examples out for the model."""
        assert self.tokenizer is not None
        return partial(collate, pad_id=pad_id(self.tokenizer), layout=LAYOUTS[self.layout])

    def _loader_options(self) -> dict[str, object]:
        return {
            "collate_fn": self.collate,
            "num_workers": self.num_workers,
            "generator": torch.Generator().manual_seed(self.seed),
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to fill rows with; it is masked, so the end-of-sequence token or 0 will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
