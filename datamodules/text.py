"""Encode conversations as token ids and label masks, in the prompt style of the language model."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, TextBatch
from datamodules.io.conversation import VIDEO_TAG, Turn
from datamodules.io.hub import download_command, is_hub_name, use_cache_without_network


def _template(question: str, answer: str) -> str:
    """Return a chat template with the Jinja expressions of a question and an answer, both called ``text``."""
    return (
        "{{ bos_token }}{% for message in messages %}{% set text = message.content %}"
        "{% if message.role == 'user' %}{{ " + question + " }}"
        "{% elif message.role == 'assistant' %}{{ " + answer + " }}{% endif %}{% endfor %}"
    )


_PLAIN = _template(r"text + ('' if text[-1] == '\n' else ' ')", "text + eos_token")
_TEMPLATES = {
    "chat": None,
    "mistral": _template("'[INST] ' + text + ' [/INST]'", "text + eos_token"),
    "mistral_sys": _template(
        r"'[INST] ' + ('<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if loop.index == 2 else '')"
        " + text + ' [/INST]'",
        "' ' + text + ' ' + eos_token",
    ),
    "plain": _PLAIN,
}
_UNKNOWN_SHOWN = 8
_ANSWER = "\ue000{}\ue001"  # stands for an answer in a rendered template; private characters, refused in texts


@dataclass(frozen=True)
class PromptConfig:
    r"""The form in which the language model reads questions and answers.

    Attributes:
        style: ``chat``: the tokenizer's own chat template.
            ``mistral``: ``<s>[INST] <video>\n{q} [/INST]{a}</s>``, then ``[INST] {q} [/INST]{a}</s>`` for each turn.
            ``mistral_sys``: ``<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n<video>\n{q} [/INST] {a} </s>``, then
            ``[INST] {q} [/INST] {a} </s>``; the form of VideoLLaMA2's first release, for comparing with its numbers.
            ``plain``: ``<s><video>\n{q} {a}</s>``, then ``{q} {a}</s>``; without a question ``<s><video>\n{a}</s>``.
            ``<s>`` and ``</s>`` stand for the tokenizer's begin and end tokens; without a begin token there is none.
        system: text of the system message; ``mistral_sys`` needs one, ``mistral`` and ``plain`` have no place for it.
    """

    style: Literal["chat", "mistral", "mistral_sys", "plain"] = "chat"
    system: str | None = None

    def __post_init__(self) -> None:
        """Check that a system text is given if and only if the style has a place for it."""
        if self.style == "mistral_sys" and not (self.system or "").strip():
            raise ValueError(
                f"data.prompt.system: got {self.system!r}, but style mistral_sys needs a system text and none comes "
                "with this repository: set data.init_args.prompt.system to the one the model was trained with"
            )
        if self.style in ("mistral", "plain") and self.system is not None:
            raise ValueError(
                f"data.prompt.system: style {self.style} has no place for a system text: remove it, or set "
                "data.init_args.prompt.style to chat or mistral_sys"
            )


CHAT = PromptConfig()
"""The tokenizer's own chat template, without a system text."""


def unknown_words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> str:
    """Describe the words that a tokenizer does not know, and reads as its unknown token.

    Args:
        tokenizer: one without an unknown token knows every word.
        texts: as a person writes them.

    Returns:
        One line with their share of all words and the most frequent ones; empty if there are none.
    """
    if tokenizer.unk_token_id is None:
        return ""
    counts = Counter(word for text in texts for word in text.split())
    words = list(counts)
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    found = [word for word, ids in zip(words, encoded, strict=True) if tokenizer.unk_token_id in ids]
    if not found:
        return ""
    found.sort(key=lambda word: -counts[word])
    share = sum(counts[word] for word in found) / counts.total()
    shown = ", ".join(f"{word!r} ({counts[word]}x)" for word in found[:_UNKNOWN_SHOWN])
    return (
        f"{max(share, 1e-4):.2%} of the words ({len(found):,} different ones) are unknown to the tokenizer "
        f"{tokenizer.name_or_path}, which reads {tokenizer.unk_token} for them, e.g. {shown}"
    )


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hexadecimal digits that change with the vocabulary, the special tokens and the chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class UnusableText(ValueError):
    """A row is unusable: no answer token below the limit, an empty answer, or a special token's name in a text."""


@dataclass(frozen=True)
class EncodedText:
    """A row of text: token ids with ``VIDEO_TOKEN_ID`` for the clip, and labels of equal length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def label_tokens(self) -> int:
        """Return the number of supervised tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer from a local folder or by its hub name, see ``datamodules.io.hub.is_hub_name``.

    Raises:
        ValueError: the folder is missing or holds no valid tokenizer, the hub cannot be reached or has no repository
            of that name, or the tokenizer has no end token.
    """
    from_hub, folder = is_hub_name(name), Path(name)
    if not from_hub and not (folder / "tokenizer_config.json").is_file():
        problem = f"{name} holds no tokenizer_config.json" if folder.is_dir() else f"no folder {name}"
        raise ValueError(
            f"tokenizer: {problem}: run `{download_command(folder) or 'make data'}`, or name another folder"
        )
    unreachable = use_cache_without_network() if from_hub else None
    try:
        # The configuration of a model next to the tokenizer may name code, which the tokenizer does not need.
        config = PreTrainedConfig() if _names_code(folder / "config.json") else None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, local_files_only=not from_hub, trust_remote_code=False, config=config
        )
    except Exception as error:  # the libraries raise many kinds of errors, some with pages of text
        reason = unreachable or " ".join(str(error).split())[:200]
        if not from_hub:
            raise ValueError(f"tokenizer: {name} cannot be read ({reason}): fix it, or name another folder") from error
        raise ValueError(
            f"tokenizer: {name} is no folder and cannot be fetched from the hub ({reason}): correct the name, or run "
            f"`{download_command(Path('weights') / name)}` where there is a network and give weights/{name} instead"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name} has no end token (eos_token), so answers could never end")
    return tokenizer


def _names_code(config_file: Path) -> bool:
    return config_file.is_file() and '"auto_map"' in config_file.read_text(encoding="utf-8")


class TextEncoder:
    """Encodes questions and answers about a clip as rows of tokens.

    The clip's tag stands at the front of the first question, as in VideoLLaMA2. A conversation is rendered by a chat
    template in which a mark stands for each answer, so templates may treat a turn by its place among the others. The
    text in front of the mark is the prefix that generation continues. Text is tokenised piece by piece at the borders
    of tag and answers, in training and evaluation alike, so that both see the same tokens.

    Labels cover each answer up to and with the end token after it. They begin at the spaces (not line breaks) that the
    template puts right before the answer, since a space belongs to the token of the word behind it; a SentencePiece
    tokenizer writes a space in front of every piece itself, so there the template's is left out. White space around
    texts is dropped; otherwise they stay unchanged.

    Args:
        tokenizer: folder or hub name of a Hugging Face tokenizer.
        max_text_tokens: rows are cut at the end to this many tokens of text; the clip's tokens do not count and are
            never cut. Prompts are not cut.
        prompt: form of questions and answers.

    Raises:
        ValueError: the tokenizer is missing or its chat template does not fit; the message gives the reason.
    """

    def __init__(self, tokenizer: str, max_text_tokens: int, prompt: PromptConfig = CHAT) -> None:
        if max_text_tokens < 1:
            raise ValueError(f"data.max_text_tokens: got {max_text_tokens}, allowed: 1 or more")
        self.name, self.tokenizer = tokenizer, load_tokenizer(tokenizer)
        self.max_text_tokens, self.prompt_config = max_text_tokens, prompt
        if prompt.style == "chat" and self.tokenizer.chat_template is None:
            raise ValueError(
                f"tokenizer: {tokenizer} has no chat template: put one in chat_template.jinja or "
                "tokenizer_config.json, or set data.init_args.prompt.style"
            )
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted({*self.tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._end = re.compile(rf"\s*({'|'.join(map(re.escape, special))})")
        self._reserved = re.compile("|".join(map(re.escape, [VIDEO_TAG, *_ANSWER.split("{}"), *special])))
        self._prefixes_space = "".join(self.tokenizer.tokenize("a")).startswith("▁")  # as SentencePiece does
        self._template = _TEMPLATES[prompt.style]
        self._system = None if prompt.system is None else self._accept(prompt.system)
        self._frames(["?"], self._template, self._system)  # so that an unfit template stops a run at its start

    def conversation(self, turns: Sequence[Turn], clips: str = VIDEO_TAG) -> EncodedText:
        """Return a row for instruction tuning: several questions and answers about one clip.

        Args:
            turns: questions and answers.
            clips: text at the front of the first question, with a tag for each clip; "" for text without video.

        Raises:
            UnusableText: no answer token is left within ``max_text_tokens``, or an answer is empty, or a text holds
                the clip's tag or a special token.
            ValueError: the chat template does not fit.
        """
        return self._row(turns, self._template, self._system, clips)

    def plain(self, caption: str) -> EncodedText:
        """Return a row with a clip and its caption without an instruction, always in style ``plain``.

        Raises:
            UnusableText: the caption is empty, or holds the clip's tag or a special token.
        """
        return self._row([("", caption)], _PLAIN, None, VIDEO_TAG)

    def prompt(self, question: str, earlier: Sequence[Turn] = (), clips: str = VIDEO_TAG) -> EncodedText:
        """Return the prefix that generation continues: a conversation up to its last answer, without labels.

        Args:
            question: the last question.
            earlier: questions and answers before it.
            clips: text at the front of the first question, with a tag for each clip.

        Raises:
            UnusableText: a text holds the clip's tag or a special token.
        """
        frames = self._frames([*(asked for asked, _ in earlier), question], self._template, self._system, clips)
        ids: list[int] = []
        for (before, space, end), (_, answer) in zip(frames, earlier, strict=False):
            ids += self._tokenise(before) + self._tokenise(space + self._accept(answer) + end)
        ids += self._tokenise(frames[-1][0])
        return EncodedText(ids, [IGNORE_INDEX] * len(ids))

    @staticmethod
    def batch(rows: Sequence[EncodedText], multiple: int = 1) -> TextBatch:
        """Pad rows to a batch, int64 [R, L], on the right; L is a multiple of a number."""
        length = max((len(row.input_ids) for row in rows), default=0)
        length += -length % multiple
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)
        for index, row in enumerate(rows):
            count = len(row.input_ids)
            ids[index, :count] = torch.tensor(row.input_ids)
            mask[index, :count] = True
            labels[index, :count] = torch.tensor(row.labels)
        return TextBatch(ids, mask, labels)

    def _row(self, turns: Sequence[Turn], template: str | None, system: str | None, clips: str) -> EncodedText:
        ids: list[int] = []
        labels: list[int] = []
        frames = self._frames([question for question, _ in turns], template, system, clips)
        for number, ((before, space, end), (_, given)) in enumerate(zip(frames, turns, strict=True), start=1):
            answer = self._accept(given)
            if not answer:
                raise UnusableText(f"the answer of turn {number} is empty, so there is nothing to learn: give one")
            unsupervised = self._tokenise(before)
            supervised = self._tokenise(space + answer + end)
            ids += unsupervised + supervised
            labels += [IGNORE_INDEX] * len(unsupervised) + supervised
        # A row without a supervised token would only dilute the batch.
        first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
        of_clips = clips.count(VIDEO_TAG)
        if first - of_clips >= self.max_text_tokens:
            raise UnusableText(
                f"the first answer begins after {first - of_clips} of {len(ids) - of_clips} text tokens, beyond "
                f"max_text_tokens={self.max_text_tokens}: raise data.init_args.max_text_tokens, or shorten the question"
            )
        length = self.max_text_tokens + of_clips
        assert ids[:first].count(VIDEO_TOKEN_ID) == of_clips, "clips stand in front of the first answer"
        return EncodedText(ids[:length], labels[:length])

    def _frames(
        self, questions: Sequence[str], template: str | None, system: str | None, clips: str = VIDEO_TAG
    ) -> list[tuple[str, str, str]]:
        """Return for each answer the text before it, the spaces right before it, and the end token after it.

        The first text before an answer holds the tags of the clips.
        """
        # Render the conversation with a mark in the place of each answer.
        messages = [] if system is None else [{"role": "system", "content": system}]
        for index, question in enumerate(questions):
            text = self._accept(question)
            messages.append({"role": "user", "content": text if index or not clips else f"{clips}\n{text}"})
            messages.append({"role": "assistant", "content": _ANSWER.format(index)})
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                date_string="26 Jul 2024",  # Llama 3's default: with today's, training and evaluation would differ
            )
        except TemplateError as error:
            advice = "" if system is None else " or remove data.init_args.prompt.system"
            raise self._unfit(f"refuses a conversation ({' '.join(str(error).split())})", advice) from error
        # Split at the marks, and check that the template kept everything in its place.
        before, *rest = re.split(_ANSWER.format(r"(\d+)"), str(rendered))
        if rest[::2] != [str(index) for index in range(len(questions))]:
            raise self._unfit("leaves out, repeats or reorders answers")
        if before.count(VIDEO_TAG) != clips.count(VIDEO_TAG) or any(VIDEO_TAG in text for text in rest):
            raise self._unfit(f"does not show the first question once, in front of its answer, with its {VIDEO_TAG}")
        if system is not None and system not in before:
            raise self._unfit("leaves out the system text", " or remove data.init_args.prompt.system")
        # The end token after an answer belongs to it; the spaces before it too.
        frames = []
        for after in rest[1::2]:
            end, eos = self._end.match(after), self.tokenizer.eos_token
            if end is None:
                raise self._unfit(f"puts no end token after an answer, such as {eos}, so answers could never end")
            if end[1] != eos:
                raise self._unfit(
                    f"ends answers with {end[1]}, but generation stops at eos_token {eos}",
                    f" or set eos_token to {end[1]} in tokenizer_config.json",
                )
            asked = before.rstrip(" ")
            space = before[len(asked) :]
            frames.append((asked, space[1:] if self._prefixes_space else space, end[0]))
            before = after[end.end() :]
        return frames

    def _unfit(self, problem: str, advice: str = "") -> ValueError:
        return ValueError(
            f"tokenizer: the chat template of {self.name} {problem}: fix chat_template{advice}, or set "
            "data.init_args.prompt.style to mistral or plain"
        )

    def _accept(self, text: str) -> str:
        if reserved := self._reserved.search(text):
            raise UnusableText(
                f"text holds {reserved[0]!r}, which stands for the clip or is a special token of {self.name}: "
                f"remove or respell it in {text[:80]!r}"
            )
        return text.strip()

    def _tokenise(self, text: str) -> list[int]:
        before, *rest = text.split(VIDEO_TAG)
        ids = self._ids(before)
        for after in rest:
            ids += [VIDEO_TOKEN_ID, *self._ids(after)]
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
