"""TRL's side: `DPOTrainer.train` as users run it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from duel.plan import BETA, LEARNING_RATE, LORA_ALPHA, LORA_R, Arm, Setting
from duel.turns import Facts, Gate
from gamma_po.data.formatting import Columns, read_preferences
from gamma_po.data.tokenization import Tokenization, TokenizedPair, tokenize_preferences
from gamma_po.policies import ModelConfig, load_model, load_tokenizer

PARTS = ("prompt", "chosen", "rejected")
SCORES = ("ref_chosen_logps", "ref_rejected_logps")


class Trainer(DPOTrainer):
    """TRL's trainer on pairs that are token ids already; remembers what its last step was about."""

    last: Callable[[], tuple[float, int, int]]
    scores: Path  # of the reference, by row; the first of TRL's processes fills it

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's own, once for all arms and modes: their reference is the same model."""
        if not self.scores.exists():
            scored = super()._precompute_ref_logps(dataset, name, batch_size)
            by_row = {row["row"]: {key: row[key] for key in SCORES} for row in scored}
            self.scores.write_text(json.dumps(by_row))
            return scored
        by_row = json.loads(self.scores.read_text())
        for key in SCORES:
            dataset = dataset.add_column(key, [by_row[str(row)][key] for row in dataset["row"]])
        return dataset

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's own."""
        completion_mask = inputs["completion_mask"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.last = lambda: (float(loss), int(completion_mask.sum()), completion_mask.numel())
        return loss


def tokenized(setting: Setting) -> list[TokenizedPair]:
    """The pairs of the file, tokenised as on our side."""
    preferences, _ = read_preferences(str(setting.rows), Columns())
    tokenizer = load_tokenizer(ModelConfig(path=setting.model))
    pairs, kept, _ = tokenize_preferences(preferences, tokenizer, Tokenization(), show_progress=False)
    assert len(kept) == len(preferences)
    return pairs


def dataset_of(setting: Setting, order: Sequence[int]) -> Dataset:
    """The pairs as TRL holds them after tokenisation, in the order in which they are trained on."""
    pairs = tokenized(setting)
    ids = {f"{part}_ids": [getattr(pairs[i], part).tolist() for i in order] for part in PARTS}
    return Dataset.from_dict({**ids, "row": list(order)})


def make_trainer(setting: Setting, arm: Arm, order: Sequence[int], callback: TrainerCallback) -> Trainer:
    """TRL's trainer: its defaults, but for what the arm changes and what both sides share.

    Args:
        setting: shared.
        arm: what is special.
        order: rows as they are trained on.
        callback: one more.
    """
    arguments = DPOConfig(
        output_dir=str(setting.folder / "trl"),
        max_steps=len(order) // setting.batch_size,
        per_device_train_batch_size=setting.batch_size,
        train_sampling_strategy="sequential",
        gradient_checkpointing=arm.checkpointing,
        precompute_ref_log_probs=arm.precomputed,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=setting.max_gradient_norm,
        optim="adamw_torch_fused" if setting.fused_optimizer else "adamw_torch",
        bf16=setting.dtype == "bfloat16",
        use_cpu=setting.device == "cpu",
        dataloader_pin_memory=setting.device == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    config = ModelConfig(path=setting.model, dtype=setting.dtype, attention=setting.attention)
    lora = LoraConfig(
        r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    Trainer.scores = setting.folder / "trl_reference.json"
    return Trainer(
        model=load_model(config),
        args=arguments,
        train_dataset=dataset_of(setting, order),
        processing_class=load_tokenizer(config),
        callbacks=[callback],
        peft_config=lora if setting.mode == "lora" else None,
    )


def head_of(arm: Arm) -> AbstractContextManager[None]:
    """The head that the arm asks for."""
    return gpu_like_head() if arm.gpu_like_head else nullcontext()


@contextmanager
def gpu_like_head() -> Iterator[None]:
    """Let TRL's head on a CPU do what it does on a GPU: completion positions only, gradients' products in bfloat16."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    in_float32 = chunked_logprob._addmm_fp32

    def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dtype == torch.bfloat16:
            total.add_(a @ b)
        else:
            in_float32(total, a, b)

    with (
        patch.object(utils, "_use_triton", lambda device: True),  # there it only decides which positions to project
        patch.object(chunked_logprob, "_addmm_fp32", accumulate),
    ):
        yield


def train(setting: Setting, arm: Arm, gate: Gate) -> None:
    """Train, waiting at the gate after each step."""
    waiting = _Waiting(gate, setting, arm)
    with head_of(arm):
        waiting.trainer = make_trainer(setting, arm, setting.orders[arm.order], waiting)
        waiting.trainer.train()


class _Waiting(TrainerCallback):
    trainer: Trainer

    def __init__(self, gate: Gate, setting: Setting, arm: Arm) -> None:
        self.gate, self.setting, self.arm = gate, setting, arm

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = self.setting.batch(self.arm.order, state.global_step - 1)
        self.gate.after_step(lambda: Facts(rows, *self.trainer.last()), {})
