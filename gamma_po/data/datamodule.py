"""The LightningDataModule: preference triplets in, batches out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gamma_po.data.batching import TokenCosts, check_layout
from gamma_po.data.columns import Columns
from gamma_po.data.dataset import Example, PairDataset, by_length, collate, cut_by_tokens
from gamma_po.data.formatting import Preference
from gamma_po.data.lengths import check_forwards, check_positions
from gamma_po.data.loader import (
    ResumableLoader,
    SequentialBatches,
    ShuffledBatches,
    TokenBatches,
    loader_options,
)
from gamma_po.data.margin_column import check_column, check_margin
from gamma_po.data.mixtures import (
    Rules,
    Source,
    Split,
    Treatment,
    as_sources,
    select,
    shared_prompts,
    sources_of_splits,
)
from gamma_po.data.noise import check_label_noise, flip_mask
from gamma_po.data.pair_files import Reading, pair_file, tokenizer_facts
from gamma_po.data.reference_cache import default_cache_dir
from gamma_po.data.tokenization import Tokenization
from gamma_po.data.vocabulary import check_padding, check_vocabulary, pad_id
from gamma_po.errors import ConfigError, require
from gamma_po.layouts import LAYOUTS
from gamma_po.margins.base import Margin
from gamma_po.ranks import as_one, current_ranks
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
        train: json, jsonl, parquet or csv file, `package:NAME/inner/file`, or hub name with an optional `:split`; or a
            list of sources, each with a path and perhaps a weight, a limit and columns of its own.
        validation: one such source; its labels are never made noisy.
        test: likewise; its prompts serve the comparison of samples after training.
        columns: how the columns are called.
        tokenization: template and truncation.
        layout: how pairs become rows of the model: `padded`, a row per completion; `packed`, all completions in one
            row without padding; `shared_prefix`, likewise with each prompt encoded once for its two completions
            (the fastest, the more so the longer the prompts).
        batch_size: pairs per micro-batch and rank; an optimizer step holds
            `batch_size × trainer.accumulate_grad_batches × processes` pairs.
        length_window: how a step's pairs fall into its micro-batches. null: at random, equally many in each. 1: by
            tokens, so that little is padded and the largest micro-batch is small; the step's pairs stay the same, and
            so does the mean over them. n > 1: the pairs of n steps are sorted by length before they are cut into
            steps, which pads less, but puts pairs of like length into the same step.
        max_tokens_per_forward: what a forward may hold, padding included. A batch that holds more is computed in
            several forwards; loss and gradient stay those of the whole batch. In training this costs these pairs
            a second forward, so where most batches are cut, a lower batch_size with a higher
            trainer.accumulate_grad_batches is faster. null: no limit.
        eval_batch_size: pairs per forward in evaluation and when the reference is scored.
        label_noise: probability in [0, 1] with which each training pair's label is flipped. Its margin column, by how
            much chosen is better than rejected, then changes its sign: the label is wrong, the ratings stay true.
        label_noise_seed: of the flips.
        invalid_rows: what to do with empty completions, identical pairs and the like: stop, or drop and count.
        validation_share: of the training prompts, held out with all their pairs as validation data.
        split_seed: of the held-out prompts, and of weights that are not whole numbers.
        duplicates: what to do with training pairs that repeat another: keep (and count), drop, or error.
        contradictions: likewise with pairs whose reverse is there too; drop takes out both sides.
        limit_train: use only the first so many training pairs (of each source).
        limit_validation: likewise for validation.
        limit_test: likewise for test.
        num_workers: processes that collate batches.
        tokenizing_processes: processes that tokenise sets of more than 20 480 pairs; null for one per core.
        seed: of the batch order.
        cache_dir: folder of the caches of tokens and of the reference; by default under ~/.cache.
    """

    def __init__(
        self,
        train: str | list[Source] | None = None,
        validation: str | None = None,
        test: str | None = None,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        tokenization: Tokenization = Tokenization(),  # noqa: B008 - frozen
        layout: Literal["padded", "packed", "shared_prefix"] = "padded",
        batch_size: int = 8,
        length_window: int | None = None,
        max_tokens_per_forward: int | None = None,
        eval_batch_size: int = 16,
        label_noise: float = 0.0,
        label_noise_seed: int = 0,
        invalid_rows: Literal["error", "drop"] = "error",
        validation_share: float = 0.0,
        split_seed: int = 0,
        duplicates: Treatment = "keep",
        contradictions: Treatment = "keep",
        limit_train: int | None = None,
        limit_validation: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        tokenizing_processes: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.limits = {"train": limit_train, "validation": limit_validation, "test": limit_test}
        optional = {
            "length_window": length_window,
            "max_tokens_per_forward": max_tokens_per_forward,
            "tokenizing_processes": tokenizing_processes,
            **{f"limit_{split}": limit for split, limit in self.limits.items()},
        }
        require(batch_size >= 1, "data.batch_size", batch_size, "an integer >= 1")
        require(eval_batch_size >= 1, "data.eval_batch_size", eval_batch_size, "an integer >= 1")
        for name, number in optional.items():
            require(number is None or number >= 1, f"data.{name}", number, "an integer >= 1, or null")
        check_label_noise(label_noise, label_noise_seed)
        check_layout(layout, length_window)
        self.rules = Rules(
            duplicates=duplicates, contradictions=contradictions, validation_share=validation_share, seed=split_seed
        )
        self.sources = sources_of_splits(train, validation, test, self.rules, columns)
        self.columns, self.tokenization, self.layout = columns, tokenization, layout
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.length_window, self.max_tokens_per_forward = length_window, max_tokens_per_forward
        self.label_noise, self.label_noise_seed = label_noise, label_noise_seed
        self.invalid_rows = invalid_rows
        self.num_workers, self.seed = num_workers, seed
        self.tokenizing_processes = tokenizing_processes or os.cpu_count() or 1
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.datasets: dict[str, PairDataset] = {}
        self.preferences: dict[str, Sequence[Preference]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self._splits: dict[str, Split] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits that the stage needs; splits already there stay."""
        self._take_tokenizer()
        required = SPLITS_OF_STAGE[stage][0]
        if self.sources[required] is None:
            command = str.__str__(stage)  # Lightning's stages are strings whose format is not their value
            raise ConfigError(
                f"data.{required} is not set; `{command}` needs it: a file, package:NAME/file or hub name"
            )
        _check_equal_forwards(self.trainer, self.max_tokens_per_forward)
        with as_one(current_ranks()):
            for split in SPLITS_OF_STAGE[stage]:
                if self.sources[split] is not None and split not in self.datasets:
                    self.datasets[split] = self._read(split)
        for split in self._splits.keys() - {"train"} if "train" in self._splits else ():
            shared = shared_prompts(self._splits[split], self._splits["train"])
            self.counts[split]["prompts_also_in_training"] = shared

    def _take_tokenizer(self) -> None:
        """Take the tokenizer of the module at hand; what another one made of the data is forgotten."""
        assert self.tokenizer is not None or self.trainer is not None, (
            "without a trainer, set datamodule.tokenizer before setup"
        )
        own = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", self.tokenizer)
        if self.tokenizer is not None and own is not self.tokenizer:
            if tokenizer_facts(own) == tokenizer_facts(self.tokenizer):
                return
            self.datasets, self.preferences, self.counts, self._splits = {}, {}, {}, {}
        self.tokenizer = own

    def check_vocabulary(self, num_embeddings: int) -> None:
        """Refuse token ids for which a model has no embedding, as far as the data is read."""
        if self.tokenizer is None:
            return
        if self.layout == "padded":
            check_padding(self.tokenizer, num_embeddings)
        for read in self._splits.values():
            check_vocabulary(read, self.tokenizer, num_embeddings)

    def check_positions(self, limit: int) -> None:
        """Refuse pairs beyond the position from which on a model's numbers depend on the longest row of a forward."""
        for read in self._splits.values():
            check_positions(read, limit)

    def check_margin(self, margin: Margin) -> None:
        """Refuse a margin that does not fit the options of its column; the data need not be there."""
        check_margin(margin, self.columns.margin, self.label_noise)

    def check_column(self, margin: Margin) -> None:
        """Refuse a row of any split whose number the margin cannot take; to be called after `setup`."""
        for split, dataset in self.datasets.items():
            check_column(margin, dataset, self.preferences[split])

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches that resume exactly."""
        ranks = current_ranks()
        dataset = self._with_reference("train")
        batches = self.training_batches(ranks.rank, ranks.world_size)
        resume = getattr(getattr(self.trainer, "lightning_module", None), "resume", "exact")
        position = {"resume": resume, "accumulate": self._accumulate}
        return ResumableLoader(dataset, batch_sampler=batches, **position, **self._loader_options)

    def training_batches(self, rank: int, world_size: int) -> ShuffledBatches:
        """Return the rows of each micro-batch of one process, in the order of training."""
        dataset = self.datasets["train"]
        common = {"seed": self.seed, "rank": rank, "world_size": world_size}
        if self.length_window is None:
            return ShuffledBatches(len(dataset), self.batch_size, **common)
        cut = {"accumulate": self._accumulate, "window": self.length_window}
        return TokenBatches(TokenCosts.of(dataset.pairs, self.layout), self.batch_size, **cut, **common)

    @property
    def _accumulate(self) -> int:
        """Micro-batches per optimizer step; the module refuses a callback that would change them between epochs."""
        return getattr(self.trainer, "accumulate_grad_batches", 1)

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
        return DataLoader(dataset, batch_sampler=batches, **self._loader_options)

    def _read(self, split: str) -> PairDataset:
        chosen = self._select(split)
        self._splits[split] = chosen
        self.preferences[split], self.counts[split] = chosen.preferences, chosen.counts
        if self.max_tokens_per_forward is not None:
            check_forwards(chosen, self.layout, self.max_tokens_per_forward)
        rate = self.label_noise if split == "train" else 0.0
        flipped = flip_mask(int(chosen.origin.max()) + 1, rate, self.label_noise_seed)[chosen.origin]
        column = None if self.columns.margin is None else chosen.column
        return PairDataset(chosen.pairs, flipped, column)

    def _select(self, split: str) -> Split:
        """Read the split's sources, or find them in the cache, and choose its pairs."""
        held_out = split == "validation" and self.rules.validation_share > 0
        part = split if split == "train" or held_out else "all"
        given, limit = self.sources[split], self.limits["train" if held_out else split]
        assert given is not None and self.tokenizer is not None
        sources = as_sources(given, limit)
        folder = (self.cache_dir or default_cache_dir().parent) / "tokens"
        how = {"processes": self.tokenizing_processes, "show_progress": current_ranks().rank == 0}
        files = []
        for source in sources:
            reading = Reading(source.columns or self.columns, self.tokenization, self.invalid_rows, source.limit)
            files.append(pair_file(source.path, self.tokenizer, reading, folder, **how))
        weights = [source.weight for source in sources]
        return select(files, weights, self.rules, part, self.limits["validation"])

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
        limit, cut = self.max_tokens_per_forward, None
        if limit is not None:
            cut = partial(cut_by_tokens, layout=self.layout, limit=limit)
        return partial(collate, pad_id=pad_id(self.tokenizer), layout=LAYOUTS[self.layout], cut=cut)

    @property
    def _loader_options(self) -> dict[str, Any]:
        return {"collate_fn": self.collate, **loader_options(self.num_workers, self.seed)}


def _check_equal_forwards(trainer: Trainer | None, max_tokens: int | None) -> None:
    """Sharded weights are gathered in each forward, so all ranks need equally many: there a batch cannot be cut."""
    strategy = getattr(trainer, "strategy", None)
    if max_tokens is not None and isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise ConfigError(
            f"data.max_tokens_per_forward={max_tokens} does not work with {type(strategy).__name__}: ranks would run "
            "different numbers of forwards and wait for each other forever; lower data.batch_size and raise "
            "trainer.accumulate_grad_batches instead, and set data.length_window: 1"
        )
