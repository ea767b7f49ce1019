"""Batches that the datamodules pass to the stages: clips as raw pixels, text as tokens.

Letters: ``B`` clips, ``T`` frames, ``S`` side of the square frame in pixels, ``R`` rows of text, ``L`` text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor

VIDEO_TOKEN_ID = -201
"""Placeholder of the clip's visual tokens in the token ids; no tokenizer has it."""
IGNORE_INDEX = -100


class _Movable:
    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Move every tensor to ``device``, in place, without waiting for those in page-locked memory."""
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, (Tensor, _Movable)):
                setattr(self, item.name, value.to(device, non_blocking=non_blocking))
        return self

    def pin_memory(self) -> Self:
        """Move every tensor to page-locked memory, in place."""
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, (Tensor, _Movable)):
                setattr(self, item.name, value.pin_memory())
        return self


def supervised_places(labels: Tensor) -> Tensor:
    """Return the places of the supervised tokens in flattened rows; a row's first is none, as nothing predicts it.

    Args:
        labels: int64 [R, L], ``IGNORE_INDEX`` where not supervised. On a GPU the host waits for their number.

    Returns:
        int64 [M].
    """
    marked = labels != IGNORE_INDEX
    marked[:, :1] = False
    return marked.flatten().nonzero().flatten()


@dataclass
class TextBatch(_Movable):
    """Right-padded rows of text.

    Attributes:
        input_ids: int64 [R, L] with one ``VIDEO_TOKEN_ID`` per row, none for text without video; 0 where padded.
        attention_mask: bool [R, L].
        labels: int64 [R, L]: the token itself where it is supervised, else ``IGNORE_INDEX``.
        supervised: int64 [M], places of the supervised tokens in the flattened rows. Found from ``labels`` when the
            batch leaves the host, so that a stage need not ask a GPU how many there are.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    supervised: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Move every tensor to ``device``, in place, without waiting for those in page-locked memory."""
        self._find_supervised()
        return super().to(device, non_blocking)

    def pin_memory(self) -> Self:
        """Move every tensor to page-locked memory, in place."""
        self._find_supervised()
        return super().pin_memory()

    def _find_supervised(self) -> None:
        if self.labels.is_cpu and not self.labels.is_pinned():
            self.supervised = supervised_places(self.labels)


@dataclass
class Demonstration(_Movable):
    """Answers of the demonstrator about the clips of a micro-batch, read from files.

    Attributes:
        answers: R = B rows with M supervised tokens: narrations, or captions where there are none.
        likeliest: int64 [M, K], the likeliest tokens in the place of each.
        log_probs: float32 [M, K], of these.
        log_rest: float32 [M], of all other tokens together.
    """

    answers: TextBatch
    likeliest: Tensor
    log_probs: Tensor
    log_rest: Tensor


@dataclass
class ClipBatch(_Movable):
    """One micro-batch of clip-text samples, a row of text for each clip.

    Attributes:
        ids: B sample names, for messages.
        text: R = B rows.
        label_tokens: supervised tokens of the whole global batch divided by its number of micro-batches, counted over
            all ranks. A sum of token losses divided by it averages over the global batch's tokens once gradients are
            averaged over ranks and accumulated micro-batches. Texts that are too long are left out; the tokens of clips
            that cannot be read are counted, because no other rank knows of them: their losses are missing from the sum,
            the other samples keep their weight.
        ego_video, exo_video: uint8 [B, T, S, S, 3], RGB, the same instants in both; None if a stage does not use it.
        source_names: names of the mixed sources, the same in every batch; empty if nothing is mixed.
        source: int64 [B], each sample's place among them; None if nothing is mixed.
        valid: bool [B]. Where false, the frames are zeros, no token is supervised, and the sample takes no part in
            any loss. By default all are.
        corrupt: a line for each sample that is not valid: its name and the reason.
        prompt: int64 [L], the tokens before a caption, with the clip's ``VIDEO_TOKEN_ID``; None where texts differ.
        narrated: bool [B], the samples whose text is used; None if that of every sample in the dataset is.
        demonstration: the demonstrator's answers about the clips, where they were computed before.
        other_exo_video: uint8 [B, V, T, S, S, 3], the same instants from the other exocentric cameras, zeros where
            there are fewer than V; None if they are not used.
        other_exo: bool [B, V], the videos that there are; None without ``other_exo_video``.
    """

    ids: list[str]
    text: TextBatch
    label_tokens: float
    ego_video: Tensor | None = None
    exo_video: Tensor | None = None
    source_names: tuple[str, ...] = ()
    source: Tensor | None = None
    valid: Tensor = None  # type: ignore[assignment]
    corrupt: list[str] = field(default_factory=list)
    prompt: Tensor | None = None
    narrated: Tensor | None = None
    demonstration: Demonstration | None = None
    other_exo_video: Tensor | None = None
    other_exo: Tensor | None = None

    def __post_init__(self) -> None:
        """Without a mask, all samples are valid."""
        if self.valid is None:
            self.valid = torch.ones(len(self.ids), dtype=torch.bool, device=self.text.input_ids.device)

    @property
    def num_frames(self) -> int:
        """Frames in the batch, over both views."""
        videos = [video for video in (self.ego_video, self.exo_video) if video is not None]
        if self.other_exo_video is not None:
            videos.append(self.other_exo_video.flatten(0, 1))
        return sum(video.shape[0] * video.shape[1] for video in videos)


@dataclass(frozen=True)
class Question:
    """A question about a validation clip.

    Attributes:
        clip: row of the clip in the batch.
        task: ``caption``, ``choice`` or ``qa_<kind>``.
        question, answer: as a person would write them.
        options: candidates of a choice; empty else.
        parts: words of the answer that are scored separately, by name.
    """

    clip: int
    task: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class QuestionBatch(_Movable):
    """Validation clips with questions.

    Attributes:
        ids: B clip names.
        ego_visible: B flags, true if the egocentric camera sees the action.
        questions: all questions of the clips.
        prompts: a row for each question without options, ends where the answer begins.
        prompt_clip: int64 [R], row of the clip.
        options: a row for each option of each choice, labels on the option.
        option_clip: int64 [R], row of the clip.
        ego_video, exo_video: as in ``ClipBatch``.
    """

    ids: list[str]
    ego_visible: list[bool]
    questions: list[Question]
    prompts: TextBatch
    prompt_clip: Tensor
    options: TextBatch
    option_clip: Tensor
    ego_video: Tensor | None = None
    exo_video: Tensor | None = None


TokenIds = tuple[int, ...]
"""Token ids of a text that follows the clip."""


@dataclass(frozen=True)
class MultipleChoiceRequest:
    """Ask which of a few tokens comes next, by their log-probabilities among themselves.

    Attributes:
        contexts: the texts before the token, one for each order of the options.
        choices: for each context the tokens to choose from, such as those of the letters A to E.
    """

    contexts: tuple[TokenIds, ...]
    choices: tuple[TokenIds, ...]


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """Ask how likely each of some continuations is, by its mean log-likelihood per token.

    Attributes:
        context: the text before each of them.
        continuations: with their end tokens.
        without_video: leave the clip out, which measures how likely a text is whatever the clip shows.
    """

    context: TokenIds
    continuations: tuple[TokenIds, ...]
    without_video: bool = False


@dataclass(frozen=True)
class GenerateUntilRequest:
    """Ask for an answer, decoded greedily until the end token.

    Attributes:
        context: the text before the answer.
        max_new_tokens: longest answer.
    """

    context: TokenIds
    max_new_tokens: int


Request = MultipleChoiceRequest | LoglikelihoodRequest | GenerateUntilRequest


@dataclass(frozen=True)
class Instance:
    """All requests about one clip for one sample of a benchmark.

    Attributes:
        sample_id: the sample; "" for requests that all samples share.
        clip: index of the video input among those of the sample.
        requests: by the name of the field that the result is written to.
    """

    sample_id: str
    clip: int
    requests: dict[str, Request]


@dataclass
class BenchmarkBatch(_Movable):
    """One clip, or V clips that are read one after the other, and all instances of a benchmark that look at them.

    Attributes:
        prefix: token ids before the last clip; ``VIDEO_TOKEN_ID`` stands for each of the others.
        instances: evaluated one by one.
        video: uint8 [V, T, S, S, 3]; None for requests without a clip, or if a clip cannot be decoded.
        error: why a clip cannot be decoded; "" if all can.
        views: ``ego`` or ``exo`` for each clip, the camera that filmed it.
    """

    prefix: TokenIds
    instances: list[Instance]
    video: Tensor | None = None
    error: str = ""
    views: tuple[str, ...] = ("ego",)

    @property
    def ids(self) -> list[str]:
        """Sample ids of the instances, for messages."""
        return [instance.sample_id for instance in self.instances]
