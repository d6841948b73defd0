"""A tiny chat model and data set, made from nothing in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sun",
    "rain",
    "is",
    "was",
    "very",
    "not",
    "good",
    "bad",
    "nice",
    "awful",
    "great",
    "happy",
    "sad",
    "and",
    "runs",
    "sleeps",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template in SmolLM2's manner."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_model(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A two-layer Llama with 320 tokens."""
    tokenizer = tiny_tokenizer()
    options: dict[str, object] = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).eval()


def save_tiny_model(folder: Path) -> Path:
    """Write model and tokenizer in Hugging Face format."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_rows(num_pairs: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs in which the chosen text ends well and the rejected one badly; two pairs per prompt."""
    generator = torch.Generator().manual_seed(seed)

    def text(words: list[str], low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(words[int(torch.randint(len(words), (1,), generator=generator))] for _ in range(count))

    rows = []
    for i in range(num_pairs):
        if i % 2 == 0:
            prompt = f"{text(WORDS, 2, 6)} {seed} {i}"
        rows.append(
            {
                "prompt": prompt,
                "chosen": f"{text(WORDS, 1, 5)} good nice great {i}",
                "rejected": f"{text(WORDS, 1, 5)} bad awful sad {i}",
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
