"""Talk to a policy: the conversation so far, and its next answer as it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from gamma_po.data.formatting import UNPAIRED_SURROGATE
from gamma_po.data.tokenization import Template, Tokenization, make_encoder, prompt_ids
from gamma_po.errors import DataError
from gamma_po.evaluation.generation import SEEDS, UNLIMITED, Sampling, room_for_prompt, sampled_batches


class _Pieces(TextStreamer):
    """Hands the text on as it comes, a word at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece."""
        self.show(text)


@dataclass
class Conversation:
    """A chat with a policy.

    Args:
        model: in eval mode.
        tokenizer: the policy's.
        sampling: how answers are drawn; every turn has its own seed.
        template: how a conversation becomes text, as in training; without a chat template, each message stands alone.

    Raises:
        ConfigError: no message can fit beside an answer, or the tokenizer has no such template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    template: Template = "auto"
    messages: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0  # messages left out of the last prompt, the oldest first, because it had no room

    def __post_init__(self) -> None:
        """Check now what every message would need."""
        self._options = Tokenization(template=self.template, max_prompt_length=UNLIMITED)
        self._alone = not make_encoder(self.tokenizer, self._options).chat
        self._room = room_for_prompt(self.model, self.sampling.max_new_tokens)

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Return the policy's answer to a message, after showing it piece by piece.

        Raises:
            DataError: the message cannot be read by the model; the conversation is as before it.
        """
        if UNPAIRED_SURROGATE.search(text):
            raise DataError("this message is not valid Unicode")
        ids = self._prompt([*self.messages, {"role": "user", "content": text}])
        self.messages.append({"role": "user", "content": text})
        turn = replace(self.sampling, seed=(self.sampling.seed + len(self.messages)) % SEEDS, batch_size=1)
        streamer = _Pieces(self.tokenizer, show)
        ((_, (completion,)),) = sampled_batches(self.model, [ids], turn, streamer=streamer)
        answer = self.tokenizer.decode(completion, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def reset(self) -> None:
        """Start anew."""
        self.messages.clear()
        self.forgotten = 0

    def _prompt(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """Token ids of as much of the conversation, from its end, as there is room for."""
        starts = [len(messages) - 1] if self._alone else range(0, len(messages), 2)
        for start in starts:
            prompt = messages[-1]["content"] if self._alone else tuple(messages[start:])
            ids = prompt_ids(prompt, self.tokenizer, self._options)
            if len(ids) <= self._room:
                self.forgotten = 0 if self._alone else start
                return ids
        raise DataError(
            f"this message is too long: {len(ids)} tokens, and beside an answer of sampling.max_new_tokens="
            f"{self.sampling.max_new_tokens} the model has room for {self._room}"
        )
