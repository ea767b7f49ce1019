"""Samples of a benchmark by clip: each clip is decoded once, with all requests about it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.batch import (
    IGNORE_INDEX,
    VIDEO_TOKEN_ID,
    BenchmarkBatch,
    GenerateUntilRequest,
    Instance,
    LoglikelihoodRequest,
    MultipleChoiceRequest,
    Request,
    TokenIds,
)
from datamodules.clips.dataset import ClipConfig
from datamodules.egobench import LoadedBenchmark
from datamodules.egobench.official import LETTERS
from datamodules.egobench.prompts import Prompts
from datamodules.egobench.samples import Clip, Sample
from datamodules.text import EncodedText, TextEncoder, UnusableText
from datamodules.video.errors import ClipDecodeError
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import segment_midpoints

CROSS_CHECK_TOKENS, ANSWER_TOKENS = 8, 32
LEAST_SHARE = 0.5
"""Of a span, that a file must cover to stand for it: official spans may reach past the end of a recording. Where the
last picture is asked about, all of it."""


@dataclass(frozen=True)
class EgoBenchConfig:
    """Benchmarks of an experiment, and how they are asked.

    Attributes:
        benchmarks: each a ``name``, ``annotations``, ``videos`` and further keys of the class of that name.
        prompts: file of wordings; null for those that come with this repository.
        style: how much a question says, ``base``, ``task``, or ``ego`` (the paper's best).
        caption: what is asked for where texts are ranked as captions; null for the bare caption, as in stage 2's data.
        cyclic: ask choices in every rotation of the options, which takes out a model's liking for a letter.
        cross_check: choices of each benchmark that are also answered in words, to see whether both agree.
        invented: the samples are of a generated world, beside which no published number is shown.
        fast: names of benchmarks of which a fixed part is scored whenever a stage validates.
    """

    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    prompts: str | None = None
    style: Literal["base", "task", "ego"] = "ego"
    caption: str | None = None
    cyclic: bool = False
    cross_check: int = 200
    invented: bool = False
    fast: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Unit:
    clip: Clip | None
    asked: tuple[tuple[int, int], ...]


class BenchmarkDataset(Dataset[BenchmarkBatch]):
    """One entry for each distinct clip, and one without a clip for the priors of shared candidates.

    Args:
        loaded: the benchmark.
        config: how it is asked.
        clips: frames of a clip.
        encoder: text to tokens.
        timeout_s: longest wait for one video file.

    Raises:
        ValueError: a question does not fit ``max_text_tokens``, or letters are no single tokens; names the sample.
    """

    def __init__(
        self,
        loaded: LoadedBenchmark,
        config: EgoBenchConfig,
        clips: ClipConfig,
        encoder: TextEncoder,
        timeout_s: float | None = None,
    ) -> None:
        self.loaded, self.config, self.clips, self.encoder = loaded, config, clips, encoder
        self.prompts = Prompts(config.prompts, loaded.name, config.style)
        self.timeout_s, self.reader = timeout_s, ClipReader(timeout_s=timeout_s)
        units: dict[Clip, list[tuple[int, int]]] = {}
        for number, sample in enumerate(loaded.samples):
            for place, clip in enumerate(sample.clips):
                units.setdefault(clip, []).append((number, place))
        self.units = [_Unit(clip, tuple(asked)) for clip, asked in units.items()]
        if loaded.task == "rank_texts":
            self.units.append(_Unit(None, ()))
        checked = np.random.default_rng(0).permutation(len(loaded.samples))[: config.cross_check]
        self.cross_checked = frozenset(checked.tolist()) if loaded.task == "choice" else frozenset()

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.units)

    def left(self, done: Collection[tuple[str, int]]) -> list[int]:
        """Return the clips with an instance that is not done; done ones are (sample id, index of the clip) pairs."""
        names = [[(self.loaded.samples[n].id, place) for n, place in unit.asked] or [("", 0)] for unit in self.units]
        return [number for number, asked in enumerate(names) if not all(key in done for key in asked)]

    def fast(self) -> BenchmarkDataset:
        """The benchmark's fixed part for curves while training."""
        return BenchmarkDataset(
            self.loaded.fast(), replace(self.config, cross_check=0), self.clips, self.encoder, self.timeout_s
        )

    def settings(self) -> dict[str, Any]:
        """What answers depend on beside the model and the samples, as JSON."""
        c = self.config
        asked = {"prompts": self.prompts.wordings(), "caption": c.caption, "cyclic": c.cyclic}
        return {**asked, "cross_check": len(self.cross_checked), "clips": asdict(self.clips)}

    def check(self) -> None:
        """Encode every question once, so that what does not fit is known before anything is computed.

        Raises:
            ValueError: see the class.
        """
        for sample in self.loaded.samples:
            self._requests_of(sample, 0, cross_check=False)

    def __getitem__(self, index: int) -> BenchmarkBatch:
        """Read a clip and encode what is asked about it; a clip that cannot be read says why."""
        unit = self.units[index]
        if unit.clip is None:
            context, answers = self._captions
            return BenchmarkBatch(
                self._lead, [Instance("", 0, {"priors": LoglikelihoodRequest(context, answers, without_video=True)})]
            )
        requests = [
            self._requests_of(self.loaded.samples[n], place, n in self.cross_checked) for n, place in unit.asked
        ]
        batch = BenchmarkBatch(self._lead, requests)
        try:
            batch.video = self._read(unit.clip)
        except ClipDecodeError as error:
            batch.error = " ".join(str(error).split())
        return batch

    def _read(self, clip: Clip) -> torch.Tensor:
        path, c = self.loaded.videos / clip.video, self.clips
        file_end_s = self.reader.usable_end_s(path, clip.start_s, math.inf)
        end_s = min(clip.end_s, file_end_s)
        least = 1.0 if clip.last_at_end else LEAST_SHARE
        if math.isfinite(clip.end_s) and end_s - clip.start_s < least * (clip.end_s - clip.start_s):
            self.reader.usable_end_s(path, clip.start_s, clip.end_s)
        times_s = segment_midpoints(clip.start_s, end_s, c.num_frames)
        if clip.last_at_end:
            times_s[-1] = end_s
        return self.reader.read(path, times_s, c.image_size, c.frame_fit, (clip.start_s, end_s)).frames[None]

    def _requests_of(self, sample: Sample, place: int, cross_check: bool) -> Instance:
        try:
            return Instance(sample.id, place, self._asks(sample, cross_check))
        except UnusableText as error:
            raise ValueError(f"{self.loaded.name}: sample {sample.id}: {error}") from None

    def _asks(self, sample: Sample, cross_check: bool) -> dict[str, Request]:
        match self.loaded.task:
            case "choice":
                return self._choice(sample, cross_check)
            case "open":
                return {"prediction": GenerateUntilRequest(self._context(self.prompts.open(sample)), ANSWER_TOKENS)}
            case "vocabulary":
                question = self.prompts.open(sample)
                context, answers = self._answers(question, self._texts[:1])[0], self._vocabulary
                return {
                    "scores": LoglikelihoodRequest(context, answers),
                    "priors": LoglikelihoodRequest(context, answers, without_video=True),
                    "prediction": GenerateUntilRequest(self._context(question), ANSWER_TOKENS),
                }
            case "rank_texts":
                return {"scores": LoglikelihoodRequest(*self._captions)}
            case "rank_clips":
                return {"scores": LoglikelihoodRequest(*self._answers(self.config.caption, (sample.text,)))}

    def _choice(self, sample: Sample, cross_check: bool) -> dict[str, Request]:
        count = len(sample.options)
        orders = [tuple((p + s) % count for p in range(count)) for s in range(count if self.config.cyclic else 1)]
        questions = [self.prompts.choice(sample, order) for order in orders]
        rotations = [self._letters(question, count) for question in questions]
        asks: dict[str, Request] = {
            "letters": MultipleChoiceRequest(
                tuple(context for context, _ in rotations), tuple(ids for _, ids in rotations)
            ),
            "likelihood": LoglikelihoodRequest(*self._answers(self.prompts.open(sample), sample.options)),
        }
        if cross_check:
            asks["said"] = GenerateUntilRequest(self._context(questions[0]), CROSS_CHECK_TOKENS)
        return asks

    def _letters(self, question: str, count: int) -> tuple[TokenIds, TokenIds]:
        """Tokens up to the letter, whatever tokens it merges with, and the token in which each letter differs."""
        openings = [f"{self.prompts.prefill}{letter})" for letter in LETTERS[:count]]
        rows = [row for row, _ in self._encoded(question, openings)]
        shared = next(n for n, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1)
        letters = tuple(row[shared] for row in rows)
        if len(set(letters)) < count:
            raise ValueError(
                f"tokenizer: {self.encoder.name} does not tell letters A to {openings[-1][-2]} apart behind "
                f"{self.prompts.prefill!r}: give a file of prompts with another prefill as egobench.prompts"
            )
        return self._behind_clip(rows[0])[: shared - rows[0].index(VIDEO_TOKEN_ID) - 1], letters

    def _answers(self, question: str | None, texts: Sequence[str]) -> tuple[TokenIds, tuple[TokenIds, ...]]:
        """Tokens before the answers, and each answer's with its end."""
        rows = self._encoded(question, texts)
        ids, first = rows[0]
        return self._behind_clip(ids[:first]), tuple(tuple(row[start:]) for row, start in rows)

    def _encoded(self, question: str | None, answers: Sequence[str]) -> list[tuple[TokenIds, int]]:
        """Each row, and where its answer begins."""
        encode = self.encoder.plain if question is None else lambda text: self.encoder.conversation([(question, text)])
        rows: list[EncodedText] = [encode(answer) for answer in answers]
        if any(row.input_ids[-1] != self.encoder.tokenizer.eos_token_id for row in rows):
            raise UnusableText(
                f"a question and its answer do not fit max_text_tokens={self.encoder.max_text_tokens}: raise "
                "data.init_args.max_text_tokens"
            )
        return [(tuple(r.input_ids), next(n for n, y in enumerate(r.labels) if y != IGNORE_INDEX)) for r in rows]

    def _context(self, question: str) -> TokenIds:
        return self._behind_clip(self.encoder.prompt(question).input_ids)

    @staticmethod
    def _behind_clip(ids: Sequence[int]) -> TokenIds:
        return tuple(ids[list(ids).index(VIDEO_TOKEN_ID) + 1 :])

    @cached_property
    def _lead(self) -> TokenIds:
        ids = self._encoded(self.config.caption if self.loaded.task.startswith("rank_") else "?", ["?"])[0][0]
        return ids[: ids.index(VIDEO_TOKEN_ID)]

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        return tuple(text.text for text in self.loaded.candidates)

    @cached_property
    def _vocabulary(self) -> tuple[TokenIds, ...]:
        """Answers are tokenised alike behind every question."""
        return self._answers("?", self._texts)[1]

    @cached_property
    def _captions(self) -> tuple[TokenIds, tuple[TokenIds, ...]]:
        return self._answers(self.config.caption, self._texts)
