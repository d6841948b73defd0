"""Talk to a policy: the conversation so far, and its next answer as it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from gamma_po.data.tokenization import Template, Tokenization, prompt_ids
from gamma_po.evaluation.generation import Sampling, sampled_batches


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
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    template: Template = "auto"
    messages: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0  # messages left out of the last prompt, the oldest first, because it had no room

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Return the policy's answer to a message, after showing it piece by piece."""
        self.messages.append({"role": "user", "content": text})
        ids = self._prompt()
        turn = replace(self.sampling, seed=self.sampling.seed + len(self.messages), batch_size=1)
        streamer = _Pieces(self.tokenizer, show)
        ((_, (completion,)),) = sampled_batches(self.model, [ids], turn, streamer=streamer)
        answer = self.tokenizer.decode(completion, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def reset(self) -> None:
        """Start anew."""
        self.messages.clear()
        self.forgotten = 0

    def _prompt(self) -> torch.Tensor:
        """Token ids of as much of the conversation, from its end, as there is room for."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        room = max(1, positions - self.sampling.max_new_tokens)
        if self.template == "text" or (self.template == "auto" and not self.tokenizer.chat_template):
            options = Tokenization(template="text", max_prompt_length=room)
            return prompt_ids(self.messages[-1]["content"], self.tokenizer, options)
        options = Tokenization(template=self.template, max_prompt_length=2**31)
        for start in range(0, len(self.messages), 2):
            ids = prompt_ids(tuple(self.messages[start:]), self.tokenizer, options)
            if len(ids) <= room:
                break
        self.forgotten = start
        return ids[-room:]
