"""Token ids of the requests that a benchmark puts to a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Protocol

from datamodules.batch import (
    IGNORE_INDEX,
    VIDEO_TOKEN_ID,
    GenerateUntilRequest,
    LoglikelihoodRequest,
    MultipleChoiceRequest,
    Request,
    TokenIds,
)
from datamodules.egobench import LoadedBenchmark
from datamodules.egobench.base import LETTERS
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.prompts import Prompts
from datamodules.egobench.samples import Sample, VideoInput
from datamodules.io.conversation import VIDEO_TAG
from datamodules.text import EncodedText, TextEncoder, UnusableText


class RequestBuilder(Protocol):
    """The part of a task type that the data workers run; ``lightning_modules.egobench.tasks`` implements it."""

    asks_for_captions: ClassVar[bool]
    cross_checks: ClassVar[bool]

    def requests(self, sample: Sample, encoder: RequestEncoder, cross_check: bool) -> dict[str, Request]:
        """Build the requests about one clip of a sample."""

    def prior_requests(self, encoder: RequestEncoder) -> dict[str, Request]:
        """Build the requests without a clip that all samples share."""


class RequestEncoder:
    """Build the requests of one benchmark as token ids.

    Args:
        loaded: the benchmark.
        config: prompts and options.
        encoder: text to token ids.
        captions: whether texts are scored as captions rather than as answers to a question.

    Raises:
        ValueError: the prompts file is invalid. All methods raise ``UnusableText`` for a text that does not fit
            ``max_text_tokens``.
    """

    def __init__(self, loaded: LoadedBenchmark, config: EgoBenchConfig, encoder: TextEncoder, captions: bool) -> None:
        self.loaded, self.config, self.encoder = loaded, config, encoder
        # The style of egocentric video would be wrong about other views.
        style = config.style if loaded.benchmark.egocentric or config.style != "ego" else "task"
        self.prompts = Prompts(config.prompts, loaded.name, style)
        self.question_of_candidates = config.caption if captions else "?"

    @cached_property
    def prefix(self) -> TokenIds:
        """Token ids before the clip."""
        ids, _ = self._encode(self.question_of_candidates, ["?"])[0]
        return ids[: ids.index(VIDEO_TOKEN_ID)]

    def prefix_of(self, shown: VideoInput) -> TokenIds:
        """Return the token ids before the last clip, with ``VIDEO_TOKEN_ID`` for each of the others."""
        if shown.text == VIDEO_TAG:
            return self.prefix
        ids = self.encoder.prompt("?", clips=shown.text).input_ids
        return tuple(ids[: len(ids) - 1 - ids[::-1].index(VIDEO_TOKEN_ID)])

    def letters(self, sample: Sample) -> MultipleChoiceRequest:
        """Ask for the letter of the right option, in every rotation of the options if ``egobench.cyclic`` is set.

        Raises:
            ValueError: the tokenizer has no tokens of one form for the letters after the prefill.
        """
        count = len(sample.options)
        contexts, choices = [], []
        for shift in range(count if self.config.cyclic else 1):
            order = [(position + shift) % count for position in range(count)]
            context, letters = self._letters(self.prompts.choice(sample, order), count)
            contexts.append(context)
            choices.append(letters)
        return MultipleChoiceRequest(tuple(contexts), tuple(choices))

    def loglikelihood(self, question: str | None, texts: Sequence[str]) -> LoglikelihoodRequest:
        """Ask how likely each text is after a question, or as a bare caption without one."""
        return LoglikelihoodRequest(*self._split(question, texts))

    def candidate_loglikelihood(self, question: str | None, without_video: bool = False) -> LoglikelihoodRequest:
        """Ask how likely each of the benchmark's candidates is."""
        context, _ = self._split(question, self._candidates[:1])
        return LoglikelihoodRequest(context, self._candidate_ids, without_video)

    def generate_until(self, question: str, max_new_tokens: int) -> GenerateUntilRequest:
        """Ask for an answer in words."""
        return GenerateUntilRequest(_after_clip(self.encoder.prompt(question).input_ids), max_new_tokens)

    @cached_property
    def _candidates(self) -> tuple[str, ...]:
        return tuple(candidate.text for candidate in self.loaded.candidates)

    @cached_property
    def _candidate_ids(self) -> tuple[TokenIds, ...]:
        """The token ids of the candidates, encoded once, since they are the same after every question."""
        return self._split(self.question_of_candidates, self._candidates)[1]

    def _letters(self, question: str, count: int) -> tuple[TokenIds, TokenIds]:
        """Return the token ids up to the letter, and the token in which each letter differs.

        A letter may be merged with the characters around it, so that the rows are compared token by token. A tokenizer
        that merges ``A)`` but not ``B)`` would favour one of them: then the letters are scored without the bracket.
        """
        letters = LETTERS[:count]
        for closing in (")", ""):
            answers = [f"{self.prompts.prefill}{letter}{closing}" for letter in letters]
            rows = [row for row, _ in self._encode(question, answers)]
            shared = next(n for n, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1)
            choices = tuple(row[shared] for row in rows)
            pieces = self.encoder.tokenizer.convert_ids_to_tokens(list(choices))
            around = {piece.replace(letter, "*", 1) for piece, letter in zip(pieces, letters, strict=True)}
            if len(set(choices)) == count and len(around) == 1:
                return _after_clip(rows[0][:shared]), choices
        raise ValueError(
            f"tokenizer: {self.encoder.name} does not tell letters A to {letters[-1]} apart by tokens of one form "
            f"after {self.prompts.prefill!r}: set egobench.prompts to a file of prompts with another prefill"
        )

    def _split(self, question: str | None, answers: Sequence[str]) -> tuple[TokenIds, tuple[TokenIds, ...]]:
        """Return the token ids between the clip and the answers, and those of each answer with its end token."""
        rows = self._encode(question, answers)
        ids, start = rows[0]
        return _after_clip(ids[:start]), tuple(tuple(row[first:]) for row, first in rows)

    def _encode(self, question: str | None, answers: Sequence[str]) -> list[tuple[TokenIds, int]]:
        """Return the row of each answer, and the index at which the answer starts."""
        encoded = []
        for answer in answers:
            row = self._encode_one(question, answer)
            if row.input_ids[-1] != self.encoder.tokenizer.eos_token_id:
                raise UnusableText(
                    f"a question and its answer do not fit max_text_tokens={self.encoder.max_text_tokens}: raise "
                    "data.init_args.max_text_tokens"
                )
            start = next(index for index, label in enumerate(row.labels) if label != IGNORE_INDEX)
            encoded.append((tuple(row.input_ids), start))
        return encoded

    def _encode_one(self, question: str | None, answer: str) -> EncodedText:
        if question is None:
            return self.encoder.plain(answer)
        return self.encoder.conversation([(question, answer)])


def _after_clip(ids: Sequence[int]) -> TokenIds:
    return tuple(ids[list(ids).index(VIDEO_TOKEN_ID) + 1 :])
