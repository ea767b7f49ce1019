"""Conversations to token ids and label masks, through the chat template of whatever tokenizer is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, TextBatch

VIDEO_TAG = "<video>"
Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class EncodedText:
    """One row of text: token ids with ``VIDEO_TOKEN_ID`` for the clip, and labels of equal length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def label_tokens(self) -> int:
        """Supervised tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer by folder or hub name.

    Raises:
        ValueError: the folder holds none, or it has no end token.
    """
    if name.startswith((".", "/")) or "/" not in name or Path(name).exists():
        if not (Path(name) / "tokenizer_config.json").is_file():
            raise ValueError(
                f"tokenizer: {name} holds no tokenizer_config.json: run `make data`, or name another folder"
            )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name} has no end token (eos_token), so answers could never end")
    return tokenizer


class TextEncoder:
    """Turns questions and answers about a clip into rows of tokens.

    The clip's tag stands at the front of the first question, as in VideoLLaMA2. Text is tokenised piece by piece at
    the borders of tag and answers, in training and evaluation alike, so that both see the same tokens. Labels cover
    the answers and the end token after each.

    Args:
        tokenizer: folder or hub name of a Hugging Face tokenizer with a chat template.
        max_text_tokens: rows are cut to this many tokens, the clip counted as one.
    """

    def __init__(self, tokenizer: str, max_text_tokens: int) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self.max_text_tokens = max_text_tokens
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"tokenizer: {tokenizer} has no chat template: put one in chat_template.jinja or tokenizer_config.json"
            )

    def conversation(self, turns: Sequence[Turn]) -> EncodedText:
        """Rows for instruction tuning: several questions and answers about one clip.

        Raises:
            ValueError: no answer token is left within ``max_text_tokens``, or the chat template rewrites earlier turns.
        """
        ids, labels, shown = [], [], ""
        messages: list[dict[str, str]] = []
        for question, answer in turns:
            messages.append({"role": "user", "content": question if messages else f"{VIDEO_TAG}\n{question}"})
            asked = self._render(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": answer})
            answered = self._render(messages, add_generation_prompt=False)
            if not (asked.startswith(shown) and answered.startswith(asked)):
                raise ValueError(
                    f"tokenizer: its chat template rewrites what comes before or in turn {len(messages) // 2}, so its "
                    "answers cannot be located: mend chat_template, or use conversations of one turn"
                )
            question_ids = self._tokenise(asked[len(shown) :])
            answer_ids = self._tokenise(answered[len(asked) :])
            ids += question_ids + answer_ids
            labels += [IGNORE_INDEX] * len(question_ids) + answer_ids
            shown = answered
        return self._cut(ids, labels)

    def plain(self, caption: str) -> EncodedText:
        """A clip and its caption without any instruction; the caption and the end token are supervised."""
        bos = self.tokenizer.bos_token or ""
        before = self._tokenise(f"{bos}{VIDEO_TAG}\n")
        answer = [*self._tokenise(caption), int(self.tokenizer.eos_token_id)]
        return self._cut(before + answer, [IGNORE_INDEX] * len(before) + answer)

    def prompt(self, question: str) -> EncodedText:
        """What generation starts from; nothing is supervised."""
        messages = [{"role": "user", "content": f"{VIDEO_TAG}\n{question}"}]
        ids = self._tokenise(self._render(messages, add_generation_prompt=True))
        return EncodedText(ids, [IGNORE_INDEX] * len(ids))

    @staticmethod
    def batch(rows: Sequence[EncodedText]) -> TextBatch:
        """Pad rows to a batch."""
        length = max((len(row.input_ids) for row in rows), default=0)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)
        for index, row in enumerate(rows):
            count = len(row.input_ids)
            ids[index, :count] = torch.tensor(row.input_ids)
            mask[index, :count] = True
            labels[index, :count] = torch.tensor(row.labels)
        return TextBatch(ids, mask, labels)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return str(text)

    def _tokenise(self, text: str) -> list[int]:
        before, tag, after = text.partition(VIDEO_TAG)
        ids = self.tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
        if tag:
            ids = [*ids, VIDEO_TOKEN_ID, *(self._tokenise(after) if after else [])]
        return list(ids)

    def _cut(self, ids: list[int], labels: list[int]) -> EncodedText:
        row = EncodedText(ids[: self.max_text_tokens], labels[: self.max_text_tokens])
        if not row.label_tokens:
            raise ValueError(
                f"no answer token within max_text_tokens={self.max_text_tokens} of {len(ids)} tokens: "
                "raise data.init_args.max_text_tokens or shorten the question"
            )
        return row
