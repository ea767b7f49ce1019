"""Ego-ExoClip: synchronised ego-exo clips with a narration each, cut out of an Ego-Exo4D release (stages 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.clip_stream import probe
from datamodules.clips import VIEWS, ClipConfig, ClipDataModule, ClipTextDataset, Span
from datamodules.ego_exo4d import Release, exo_views, read_release
from datamodules.text import EncodedText, TextEncoder

ExoPolicy = Literal["all", "best", "random"]


class EgoExoClipDataset(ClipTextDataset):
    """Pairs of one narration's egocentric clip and one of its exocentric clips.

    Args:
        release: takes and narrated clips.
        root: the release's folder.
        views: which views to decode.
        exo_policy: ``all``: a sample for each exocentric view; ``best``: one, the annotated best view; ``random``: one,
            drawn anew each epoch.
        instruction: question put before the caption; None trains on the bare caption.
        seed: of the random view.
        clips: frames of a clip.
        encoder: text to tokens.
    """

    def __init__(
        self,
        release: Release,
        root: Path,
        views: Sequence[str],
        exo_policy: ExoPolicy,
        instruction: str | None,
        seed: int,
        clips: ClipConfig,
        encoder: TextEncoder,
    ) -> None:
        super().__init__(clips, encoder)
        self.release, self.root, self.views = release, root, views
        self.exo_policy, self.instruction, self.seed = exo_policy, instruction, seed
        counts = [len(release.takes[clip.take_index].exos) if exo_policy == "all" else 1 for clip in release.clips]
        self.clip_of = np.repeat(np.arange(len(counts)), counts)  # sample -> narration
        self.exo_of = np.concatenate([np.arange(count) for count in counts])  # sample -> view, for "all"

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.clip_of)

    def name(self, index: int) -> str:
        """Take, annotator and narration."""
        return str(self.release.clips[self.clip_of[index]].clip_id)

    def span(self, index: int, epoch: int) -> Span:
        """Both views over the same seconds of the take."""
        clip = self.release.clips[self.clip_of[index]]
        take = self.release.takes[clip.take_index]
        if self.exo_policy == "all":
            exo = take.exos[self.exo_of[index]]
        else:
            (exo,) = exo_views(take, clip, self.exo_policy, np.random.default_rng([self.seed, epoch, index]))
        files = {"ego": take.ego.path, "exo": exo.path}
        return Span({view: self.root / files[view] for view in self.views}, clip.start_s, clip.end_s)

    def text(self, index: int, epoch: int) -> EncodedText:
        """The narration, the wearer spelled out."""
        caption = self.release.clips[self.clip_of[index]].text
        if self.instruction is None:
            return self.encoder.plain(caption)
        return self.encoder.conversation([(self.instruction, caption)])


class EgoExoClipDataModule(ClipDataModule):
    """Clip-text pairs of an Ego-Exo4D release, cut by the EgoVLP rule with alpha fitted on the training split.

    Args:
        views: views that the stage looks at, ``ego`` and ``exo``.
        exo_policy: which exocentric views of a narration become samples, see ``EgoExoClipDataset``.
        instruction: question put before every caption; null trains on bare captions.
        resolution: subfolder of ``downscaled`` that holds the videos; null reads the full-size files.
        clip_scale: factor on every clip's length; 1 is the EgoVLP rule.
        min_clip_s, max_clip_s: bounds on a clip's length.
        require_ego_visible: leave out narrations flagged as not visible to the wearer's camera.
        drop_unsure: leave out narrations flagged as unsure.
        **shared: see ``ClipDataModule``; ``root`` is the release's folder.
    """

    def __init__(
        self,
        views: list[Literal["ego", "exo"]],
        exo_policy: ExoPolicy = "all",
        instruction: str | None = None,
        resolution: str | None = "448",
        clip_scale: float = 1.0,
        min_clip_s: float = 0.0,
        max_clip_s: float | None = None,
        require_ego_visible: bool = False,
        drop_unsure: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if not views:
            raise ValueError(f"data.views: got none, allowed: {', '.join(VIEWS)}")
        self.views, self.exo_policy, self.instruction = views, exo_policy, instruction
        self.reading: dict[str, Any] = {
            "resolution": resolution,
            "clip_scale": clip_scale,
            "min_clip_s": min_clip_s,
            "max_clip_s": max_clip_s,
            "require_ego_visible": require_ego_visible,
            "drop_unsure": drop_unsure,
        }

    def read(self) -> EgoExoClipDataset:
        """Read the release and open every file's header."""
        release = read_release(self.root, "train", num_frames=_num_frames, **self.reading)
        return EgoExoClipDataset(
            release, self.root, self.views, self.exo_policy, self.instruction, self.seed, self.clips, self.encoder
        )

    def annotation_files(self) -> list[Path]:
        """Takes and training narrations."""
        return [self.root / "takes.json", self.root / "annotations" / "atomic_descriptions_train.json"]


def _num_frames(path: Path) -> int:
    return probe(path).num_frames
