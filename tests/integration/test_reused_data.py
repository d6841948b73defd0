"""A data module that serves one module after another gives each its own tokens and its own reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from gamma_po.data.columns import Columns
from gamma_po.data.datamodule import PreferenceDataModule
from gamma_po.data.dataset import Slot
from gamma_po.losses import build_loss
from gamma_po.margins import build_margin
from gamma_po.module import PreferenceModule
from gamma_po.policies import ModelConfig
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_rows, tiny_tokenizer, write_rows

MARKED = CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|>the ")


def saved(folder: Path, *, seed: int, template: str = CHAT_TEMPLATE) -> str:
    """A tiny model of its own, with a template of its own."""
    tiny_model(seed).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def fit(folder: Path, path: str, data: PreferenceDataModule) -> None:
    module = PreferenceModule(ModelConfig(path=path), build_loss("dpo"), build_margin("none"))
    options = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(default_root_dir=folder, enable_checkpointing=False, enable_model_summary=False, **options)
    trainer.fit(module, datamodule=data)


def fresh(folder: Path, source: str) -> PreferenceDataModule:
    return PreferenceDataModule(train=source, batch_size=2, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_the_second_module_trains_against_its_own_reference_on_its_own_tokens(template: str, tmp_path: Path) -> None:
    source = str(write_rows(tmp_path / "pairs.jsonl", tiny_rows(6)))
    first = saved(tmp_path / "first", seed=0)
    second = saved(tmp_path / "second", seed=1, template=template)
    reused, alone = fresh(tmp_path / "a", source), fresh(tmp_path / "b", source)
    fit(tmp_path, first, reused)
    before = reused.datasets["train"].reference.chosen.clone()
    fit(tmp_path, second, reused)
    fit(tmp_path, second, alone)
    found, expected = (data.datasets["train"] for data in (reused, alone))
    assert [pair.prompt.tolist() for pair in found.pairs] == [pair.prompt.tolist() for pair in expected.pairs]
    torch.testing.assert_close(found.reference.chosen, expected.reference.chosen, rtol=0, atol=1e-4)
    assert not torch.allclose(found.reference.chosen, before, atol=0.1)


def test_a_wrong_label_turns_the_margin_column_around_with_the_completions(tmp_path: Path) -> None:
    rows = [row | {"gap": float(number)} for number, row in enumerate(tiny_rows(8), start=1)]
    source = str(write_rows(tmp_path / "pairs.jsonl", rows))
    data = PreferenceDataModule(
        train=source, label_noise=0.5, columns=Columns(margin="gap"), cache_dir=str(tmp_path / "cache")
    )
    data.tokenizer = tiny_tokenizer()
    data.setup("fit")
    dataset = data.datasets["train"]
    batch = data.collate([dataset[Slot(index)] for index in range(8)])
    assert batch.flipped.any() and not batch.flipped.all()
    expected = [-gap if flipped else gap for gap, flipped in zip(range(1, 9), batch.flipped.tolist(), strict=True)]
    assert batch.column.tolist() == expected
