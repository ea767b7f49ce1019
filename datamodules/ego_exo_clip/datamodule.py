"""Ego-ExoClip: synchronised ego-exo clips with a narration each, from an index of pairs (stages 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.batch import IGNORE_INDEX, ClipBatch, Demonstration
from datamodules.clips.datamodule import ClipDataModule
from datamodules.clips.dataset import NOTHING_TO_LEARN, VIEWS, ClipConfig, ClipTextDataset, Span
from datamodules.clips.sampler import BatchRequest
from datamodules.ego_exo_clip.demonstrations import Answer, Demonstrations, DemonstrationsError
from datamodules.ego_exo_clip.index import PairIndex, read_header
from datamodules.text import EncodedText, TextEncoder

ExoPolicy = Literal["all", "best", "random", "best_first", "best_last", "mean"]


@dataclass(frozen=True)
class NarrationConfig:
    """Fraction of the paired video whose narrations are used; the other pairs supervise no text.

    Which takes are narrated is drawn from the data's seed, and a smaller fraction's are among a larger one's.

    Attributes:
        ego_text_fraction: share of the takes that are narrated, one at least.
        unnarrated_ratio: how many of the other takes are used for each narrated one; null for all of them.
        share: share of each epoch's samples that are narrated, reached by repeating or leaving out narrated ones (every
            sample without narration comes once); null takes every sample once.
    """

    ego_text_fraction: float = 1.0
    unnarrated_ratio: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for impossible values."""
        if not 0 < self.ego_text_fraction <= 1:
            raise ValueError(f"data.narration.ego_text_fraction: got {self.ego_text_fraction}, allowed: above 0 to 1")
        ratio = self.unnarrated_ratio
        if ratio is not None and ratio < 0:
            raise ValueError(f"data.narration.unnarrated_ratio: got {ratio}, allowed: 0 or more, or null")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"data.narration.share: got {self.share}, allowed: between 0 and 1, or null")

    def draw(self, has_text: NDArray[np.bool_], seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return the narrated takes and the used takes, bool [takes] each.

        Args:
            has_text: takes with a clip that has a text, bool [takes]; the others are never drawn as narrated.
            seed: of the data.
        """
        takes = len(has_text)
        order = np.random.default_rng([seed, 7]).permutation(takes)
        order = np.concatenate([order[has_text[order]], order[~has_text[order]]])
        narrated = min(int(has_text.sum()), max(1, round(self.ego_text_fraction * int(has_text.sum()))))
        others = takes if self.unnarrated_ratio is None else round(self.unnarrated_ratio * narrated)
        place = np.argsort(order)
        return place < narrated, place < narrated + others


class EgoExoClipDataset(ClipTextDataset):
    """Pairs of one narration's egocentric clip and one of its exocentric clips.

    Everything about a million pairs lies in a few arrays that worker processes share (``PairIndex``); nothing is kept
    for a pair itself, its number gives its narration and its view.

    Args:
        pairs: the index.
        root: folder that its paths are relative to.
        views: which views to decode.
        exo_policy: ``all``: a sample for each exocentric view; ``best``: one, the annotated best view; ``random``: one,
            drawn again each epoch; ``best_first``: one, in the first epoch the best view, and more and more often a
            random one until ``curriculum_epochs`` have passed; ``best_last``: the reverse, from a random one to the
            best view, as ViewBridge (arXiv 2504.05451) distils from views that show more and more; ``mean``: one, the
            best view, and batches have those of the other cameras in addition.
        instruction: question put before the caption; None trains on the bare caption.
        seed: of the random view.
        clips: frames of a clip.
        encoder: text to tokens.
        narration: which pairs are used, and which of them with their narration.
        curriculum_epochs: epochs that ``best_first`` and ``best_last`` change over.

    Raises:
        ValueError: ``exo_policy`` is unknown, or of no use for the views.
    """

    def __init__(
        self,
        pairs: PairIndex,
        root: Path,
        views: Sequence[str],
        exo_policy: ExoPolicy,
        instruction: str | None,
        seed: int,
        clips: ClipConfig,
        encoder: TextEncoder,
        narration: NarrationConfig = NarrationConfig(),
        curriculum_epochs: int = 2,
    ) -> None:
        super().__init__(clips, encoder)
        if exo_policy not in get_args(ExoPolicy):
            raise ValueError(f"data.exo_policy: got {exo_policy!r}, allowed: {', '.join(get_args(ExoPolicy))}")
        if exo_policy == "mean" and set(views) != set(VIEWS):
            raise ValueError(
                f"data.exo_policy: got mean, but data.views is [{', '.join(views)}]: the mean over cameras is a target "
                "for the other view: use both views, or another policy"
            )
        if curriculum_epochs < 1:
            raise ValueError(f"data.curriculum_epochs: got {curriculum_epochs}, allowed: 1 or more")
        self.curriculum_epochs = curriculum_epochs
        if exo_policy == "mean":
            self.other_views = tuple(f"exo_{place}" for place in range(int(pairs.num_exos().max()) - 1))
        self.pairs, self.root, self.views = pairs, root, views
        self.exo_policy, self.instruction, self.seed = exo_policy, instruction, seed
        self._prompt: list[int] | None = None
        self.demonstrations: Demonstrations | None = None
        self.first_of_clip = np.concatenate([[0], np.cumsum(pairs.num_exos())])  # pairs of a narration and a camera
        counts = pairs.num_exos() if exo_policy == "all" else np.ones(len(pairs), dtype=np.int64)
        self.first_pair = np.concatenate([[0], np.cumsum(counts)])  # of each narration
        self.narration = narration
        self.has_text = pairs.texts.sizes() > 0
        takes_with_text = np.zeros(len(pairs.first_view) - 1, dtype=bool)
        takes_with_text[pairs.clip_groups[self.has_text]] = True
        self.narrated, used = narration.draw(takes_with_text, seed)
        of_take, has_text = self.groups(), np.repeat(self.has_text, counts)
        narrated = self.narrated[of_take] & has_text
        # A clip without text has something to teach only through the other view.
        is_useful = has_text | (set(views) == set(VIEWS))
        self.with_text = np.flatnonzero(narrated)
        self.without_text = np.flatnonzero(used[of_take] & ~narrated & is_useful)
        if not len(self.with_text) and not len(self.without_text):
            raise ValueError("data.index: no clip has a text, and data.views is one view: add texts, or the other view")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return int(self.first_pair[-1])

    @property
    def epoch_length(self) -> int:
        """Number of samples of an epoch."""
        return self._narrated_length() + len(self.without_text)

    def epoch_samples(self, epoch: int) -> NDArray[np.int64]:
        """Return every pair without narration, and the narrated ones of the epoch."""
        length, pairs = self._narrated_length(), self.with_text
        if length != len(pairs):
            rng = np.random.default_rng([self.seed, epoch, 8])
            pairs = np.concatenate([rng.permutation(pairs) for _ in range(0, length, len(pairs))])[:length]
        return np.sort(np.concatenate([pairs, self.without_text]))

    def _narrated_length(self) -> int:
        share = self.narration.share
        if share is None or not len(self.without_text) or not len(self.with_text):
            return len(self.with_text)
        return max(1, round(len(self.without_text) * share / (1 - share)))

    def name(self, index: int) -> str:
        """Return the name of a pair: take, annotator and narration."""
        return self.pairs.clip_ids[self._clip(index)]

    def groups(self) -> NDArray[np.int32]:
        """Return the take of every pair, int32 [len], ascending: samples of one take read the same files."""
        return np.repeat(self.pairs.clip_groups, np.diff(self.first_pair))

    def span(self, index: int, epoch: int) -> Span:
        """Return the files of both views and the same seconds of the take."""
        pairs, clip = self.pairs, self._clip(index)
        ego = int(pairs.first_view[pairs.clip_groups[clip]])
        exo = ego + 1 + self._camera(index, epoch)
        chosen = {view: {"ego": ego, "exo": exo}[view] for view in self.views}
        if self.exo_policy == "mean":
            end = int(pairs.first_view[pairs.clip_groups[clip] + 1])
            others = [number for number in range(ego + 1, end) if number != exo]
            chosen |= dict(zip(self.other_views, others, strict=False))
        return Span(
            {view: self.root / pairs.view_paths[number] for view, number in chosen.items()},
            float(pairs.start_s[clip]),
            float(pairs.end_s[clip]),
            {view: float(pairs.view_offsets_s[number]) for view, number in chosen.items()},
        )

    def _camera(self, index: int, epoch: int) -> int:
        """Return the number of a sample's exocentric camera, from 0 for the first of its take."""
        pairs, clip = self.pairs, self._clip(index)
        ego, end = (int(pairs.first_view[pairs.clip_groups[clip] + more]) for more in (0, 1))
        if self.exo_policy == "all":
            return index - int(self.first_pair[clip])
        rng = np.random.default_rng([self.seed, epoch, index])
        drawn = int(rng.integers(end - ego - 1))
        if rng.random() < self._best_share(epoch):
            return int(pairs.best_views[clip]) - ego - 1
        return drawn

    def _best_share(self, epoch: int) -> float:
        """Return the share of samples that are of the best view."""
        passed = min(1.0, epoch / self.curriculum_epochs)
        shares = {"best": 1.0, "mean": 1.0, "random": 0.0, "best_first": 1.0 - passed, "best_last": passed}
        return shares[self.exo_policy]

    def pair(self, index: int, epoch: int) -> int:
        """Return the number of a sample's narration and camera among all such pairs of the index."""
        return int(self.first_of_clip[self._clip(index)]) + self._camera(index, epoch)

    def used_pairs(self, exo_policy: ExoPolicy | None = None) -> NDArray[np.int64]:
        """Return the numbers of all pairs of narration and camera that samples are drawn from, ascending.

        Args:
            exo_policy: another policy than this dataset's.
        """
        pairs = self.pairs
        used = np.zeros(len(self), dtype=bool)
        used[self.with_text] = used[self.without_text] = True
        clips = np.unique(np.searchsorted(self.first_pair, np.flatnonzero(used), side="right") - 1)
        if (exo_policy or self.exo_policy) in ("best", "mean"):
            egos = pairs.first_view[pairs.clip_groups[clips]]
            best: NDArray[np.int64] = self.first_of_clip[clips] + pairs.best_views[clips] - egos - 1
            return best
        counts = pairs.num_exos()[clips]
        starts = np.repeat(self.first_of_clip[clips] - np.cumsum(counts) + counts, counts)
        return starts + np.arange(counts.sum())

    def problem(self, index: int, epoch: int) -> str | None:
        """Return why the demonstrator has no answer about a pair, or None."""
        if self.demonstrations is None:
            return None
        problem = self.demonstrations.problem(self.pair(index, epoch))
        return None if problem is None else f"no demonstration ({problem})"

    def __getitems__(self, request: BatchRequest) -> ClipBatch:
        """Read a micro-batch, with the demonstrator's answers if there are any."""
        batch = super().__getitems__(request)
        if self.demonstrations is not None:
            batch.demonstration = self._demonstration(self.demonstrations, request, batch.valid.tolist())
        return batch

    def _demonstration(
        self, demonstrations: Demonstrations, request: BatchRequest, valid: Sequence[bool]
    ) -> Demonstration:
        """Read the answers about the valid pairs; the rows of others have nothing to learn."""
        rows, answers = [], []
        for index, is_valid in zip(request.indices, valid, strict=True):
            row = NOTHING_TO_LEARN
            if is_valid:
                row = self.text(index, request.epoch)
                answer = demonstrations.read(self.pair(index, request.epoch))
                words = answer.words.tolist()
                if row is NOTHING_TO_LEARN:
                    row = EncodedText([*self.prompt, *words], [IGNORE_INDEX] * len(self.prompt) + words)
                if words != [label for label in row.labels if label != IGNORE_INDEX]:
                    raise DemonstrationsError(
                        f"{demonstrations.folder}: the answer about {self.name(index)} is not its narration: run "
                        f"`{demonstrations.command} FORCE=1`"
                    )
                answers.append(answer)
            rows.append(row)
        if not answers:
            answers = [Answer(torch.zeros(0), torch.zeros(0, 1).long(), torch.zeros(0, 1), torch.zeros(0))]
        return Demonstration(
            self.encoder.batch(rows, self.pad_to_multiple_of),
            torch.cat([answer.likeliest for answer in answers]),
            torch.cat([answer.log_probs for answer in answers]),
            torch.cat([answer.log_rest for answer in answers]),
        )

    def text(self, index: int, epoch: int) -> EncodedText:
        """Return the narration, or nothing to learn if it is not used."""
        clip = self._clip(index)
        if not self._is_narrated(clip):
            return NOTHING_TO_LEARN
        return self._encoded_caption(self.pairs.texts[clip])

    def narrated_samples(self, indices: Sequence[int]) -> list[bool] | None:
        """Return for some pairs if their narration is used; None if that of every pair is."""
        if not len(self.without_text):
            return None
        return [self._is_narrated(self._clip(index)) for index in indices]

    def words(self, index: int, epoch: int) -> list[str]:
        """Return the instruction and the narration, or nothing if it is not used."""
        clip = self._clip(index)
        if not self._is_narrated(clip):
            return []
        return [self.instruction or "", self.pairs.texts[clip]]

    @property
    def prompt(self) -> list[int]:
        """Tokens before every caption."""
        if self._prompt is None:
            row = self._encoded_caption("?")
            self._prompt = row.input_ids[: next(n for n, y in enumerate(row.labels) if y != IGNORE_INDEX)]
        return self._prompt

    def _encoded_caption(self, caption: str) -> EncodedText:
        if self.instruction is None:
            return self.encoder.plain(caption)
        return self.encoder.conversation([(self.instruction, caption)])

    def _is_narrated(self, clip: int) -> bool:
        return bool(self.has_text[clip] and self.narrated[self.pairs.clip_groups[clip]])

    def _clip(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self.first_pair, index, side="right")) - 1


class EgoExoClipDataModule(ClipDataModule):
    """Clip-text pairs of an index of synchronised recordings, such as one of an Ego-Exo4D release.

    Args:
        index: folder written by ``python -m datamodules.ego_exo_clip.build``; fixes the narrations and their seconds.
        views: views that the stage uses, ``ego`` and ``exo``.
        exo_policy: which exocentric views of a narration become samples, see ``EgoExoClipDataset``.
        instruction: question put before every caption; null trains on bare captions.
        narration: how much of the paired video has its narration used.
        curriculum_epochs: epochs over which ``best_first`` and ``best_last`` change the exocentric view.
        **shared: see ``ClipDataModule``; ``root`` is the folder that the index's paths are relative to.

    Attributes:
        synchronised: the views of a sample show the same instants, and not only the same action.
        demonstrations: the demonstrator's answers that batches hold, if they were computed before.

    Raises:
        ValueError: there is no index, or no view.
    """

    def __init__(
        self,
        index: str,
        views: list[Literal["ego", "exo"]],
        exo_policy: ExoPolicy = "all",
        instruction: str | None = None,
        narration: NarrationConfig = NarrationConfig(),
        curriculum_epochs: int = 2,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if not views:
            raise ValueError(f"data.views: got none, allowed: {', '.join(VIEWS)}")
        self.index = Path(index)
        try:
            self.synchronised: bool = read_header(self.index).get("synchronised", True)
        except ValueError as error:
            raise ValueError(f"data.index: {error}") from None
        self.views, self.exo_policy, self.instruction, self.narration = views, exo_policy, instruction, narration
        self.curriculum_epochs = curriculum_epochs
        self.demonstrations: Demonstrations | None = None

    def read(self) -> EgoExoClipDataset:
        """Read the index, without opening a video."""
        dataset = EgoExoClipDataset(
            PairIndex.read(self.index),
            self.root,
            self.views,
            self.exo_policy,
            self.instruction,
            self.seed,
            self.clips,
            self.encoder,
            self.narration,
            self.curriculum_epochs,
        )
        dataset.demonstrations = self.demonstrations
        return dataset

    def annotation_files(self) -> list[Path]:
        """Return the takes and narrated clips of the index."""
        return [self.index / "groups.jsonl", self.index / "clips.jsonl"]
