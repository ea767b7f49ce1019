"""Ego-ExoClip: synchronised ego-exo clips with a narration each, out of an index of pairs (stages 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.clips import VIEWS, ClipConfig, ClipDataModule, ClipTextDataset, Span
from datamodules.pair_index import PairIndex, read_header
from datamodules.text import EncodedText, TextEncoder

ExoPolicy = Literal["all", "best", "random"]


class EgoExoClipDataset(ClipTextDataset):
    """Pairs of one narration's egocentric clip and one of its exocentric clips.

    Everything about a million pairs lies in a few arrays that worker processes share (``PairIndex``); nothing is kept
    for a pair itself, its number gives its narration and its view.

    Args:
        pairs: the index.
        root: folder that its paths are relative to.
        views: which views to decode.
        exo_policy: ``all``: a sample for each exocentric view; ``best``: one, the annotated best view; ``random``: one,
            drawn anew each epoch.
        instruction: question put before the caption; None trains on the bare caption.
        seed: of the random view.
        clips: frames of a clip.
        encoder: text to tokens.

    Raises:
        ValueError: ``exo_policy`` is none of the three.
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
    ) -> None:
        super().__init__(clips, encoder)
        if exo_policy not in ("all", "best", "random"):
            raise ValueError(f"data.exo_policy: got {exo_policy!r}, allowed: all, best, random")
        self.pairs, self.root, self.views = pairs, root, views
        self.exo_policy, self.instruction, self.seed = exo_policy, instruction, seed
        counts = pairs.num_exos() if exo_policy == "all" else np.ones(len(pairs), dtype=np.int64)
        self.first_pair = np.concatenate([[0], np.cumsum(counts)])  # of each narration

    def __len__(self) -> int:
        """Number of pairs."""
        return int(self.first_pair[-1])

    def name(self, index: int) -> str:
        """Take, annotator and narration."""
        return self.pairs.clip_ids[self._clip(index)]

    def groups(self) -> NDArray[np.int32]:
        """The take of every pair, int32 [len], ascending: samples of one take read the same files."""
        return np.repeat(self.pairs.clip_groups, np.diff(self.first_pair))

    def span(self, index: int, epoch: int) -> Span:
        """Both views over the same seconds of the take."""
        pairs, clip = self.pairs, self._clip(index)
        ego, end = (int(pairs.first_view[pairs.clip_groups[clip] + more]) for more in (0, 1))
        if self.exo_policy == "all":
            exo = ego + 1 + index - int(self.first_pair[clip])
        elif self.exo_policy == "best":
            exo = int(pairs.best_views[clip])
        else:
            exo = ego + 1 + int(np.random.default_rng([self.seed, epoch, index]).integers(end - ego - 1))
        chosen = {view: {"ego": ego, "exo": exo}[view] for view in self.views}
        return Span(
            {view: self.root / pairs.view_paths[number] for view, number in chosen.items()},
            float(pairs.start_s[clip]),
            float(pairs.end_s[clip]),
            {view: float(pairs.view_offsets_s[number]) for view, number in chosen.items()},
        )

    def text(self, index: int, epoch: int) -> EncodedText:
        """The narration, the wearer spelled out."""
        caption = self.pairs.texts[self._clip(index)]
        if self.instruction is None:
            return self.encoder.plain(caption)
        return self.encoder.conversation([(self.instruction, caption)])

    def _clip(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(np.searchsorted(self.first_pair, index, side="right")) - 1


class EgoExoClipDataModule(ClipDataModule):
    """Clip-text pairs of an index of synchronised recordings, such as one of an Ego-Exo4D release.

    Args:
        index: folder that ``python -m datamodules.build_pairs`` wrote; it fixes the narrations and their seconds.
        views: views that the stage looks at, ``ego`` and ``exo``.
        exo_policy: which exocentric views of a narration become samples, see ``EgoExoClipDataset``.
        instruction: question put before every caption; null trains on bare captions.
        **shared: see ``ClipDataModule``; ``root`` is the folder that the index's paths are relative to.

    Raises:
        ValueError: there is no index, or no view.
    """

    def __init__(
        self,
        index: str,
        views: list[Literal["ego", "exo"]],
        exo_policy: ExoPolicy = "all",
        instruction: str | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if not views:
            raise ValueError(f"data.views: got none, allowed: {', '.join(VIEWS)}")
        self.index = Path(index)
        try:
            read_header(self.index)
        except ValueError as error:
            raise ValueError(f"data.index: {error}") from None
        self.views, self.exo_policy, self.instruction = views, exo_policy, instruction

    def read(self) -> EgoExoClipDataset:
        """Read the index; no video is opened."""
        return EgoExoClipDataset(
            PairIndex.read(self.index),
            self.root,
            self.views,
            self.exo_policy,
            self.instruction,
            self.seed,
            self.clips,
            self.encoder,
        )

    def annotation_files(self) -> list[Path]:
        """Takes and narrated clips of the index."""
        return [self.index / "groups.jsonl", self.index / "clips.jsonl"]
