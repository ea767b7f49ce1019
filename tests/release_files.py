"""Write invented release folders of Ego-Exo4D with the oddities of the real one, for several test files."""

import json
from pathlib import Path
from typing import Any

from datamodules.ego_exo_clip.build import BuildOptions, Selection, select_clips
from datamodules.ego_exo_clip.index import NarratedClip
from datamodules.ego_exo_clip.sources.ego_exo4d import EgoExo4D

ARIA_STREAMS = {"slam-left": "1201-1", "slam-right": "1201-2", "rgb": "214-1", "et": "211-1"}


def stream(file: str | None) -> dict[str, Any]:
    return {"relative_path": file and f"frame_aligned_videos/{file}"}


def take_record(uid: str, *, aria: str = "aria01", exos: tuple[str, ...] = ("cam01", "cam02"), **fields: Any) -> Any:
    videos: dict[str, Any] = {cam: {"0": stream(f"{cam}.mp4")} for cam in exos}
    videos[aria] = {name: stream(f"{aria}_{number}.mp4") for name, number in ARIA_STREAMS.items()}
    cameras = [{"cam_id": cam, "is_ego": cam == aria} for cam in videos]
    record = {
        "take_uid": uid,
        "take_name": f"name_{uid}",
        "root_dir": f"takes/name_{uid}",
        "duration_sec": 10.0,
        "best_exo": None,
        "capture": {"cameras": cameras},
        "frame_aligned_videos": videos,
    }
    return record | fields


def description(timestamp: Any, text: str = "C lifts the kettle.", **fields: Any) -> dict[str, Any]:
    flags = {"subject": "C", "ego_visible": True, "unsure": False, "best_exo": None}
    return {"text": text, "timestamp": timestamp} | flags | fields


def by(*descriptions: Any, rejected: Any = False, annotator: Any = "9") -> dict[str, Any]:
    annotation = {"annotation_uid": "a", "annotator_id": annotator, "rejected": rejected}
    return {**annotation, "descriptions": list(descriptions)}


def write_release(
    root: Path, takes: Any, annotations: Any, *, split: str = "train", splits: Any = None, missing: tuple[str, ...] = ()
) -> Path:
    """Write a release with a file of one byte for every listed video, except the ``missing`` file names."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "takes.json").write_text(json.dumps(takes))
    described = json.dumps({"ds": "240301", "annotations": annotations})
    (root / f"annotations/atomic_descriptions_{split}.json").write_text(described)
    if splits is not None:
        (root / "annotations/splits.json").write_text(json.dumps({"split_to_take_uids": splits}))
    for take in takes if isinstance(takes, list) else ():
        folder = root / take.get("root_dir", "") / "frame_aligned_videos/downscaled/448"
        folder.mkdir(parents=True, exist_ok=True)
        for streams in take.get("frame_aligned_videos", {}).values():
            for listed in (streams or {}).values():
                if listed and listed["relative_path"] and Path(listed["relative_path"]).name not in missing:
                    (folder / Path(listed["relative_path"]).name).write_bytes(b"0")
    return root


def select(
    root: Path, split: Any = "train", alpha: float | None = None, resolution: str | None = "448", **options: Any
) -> Selection:
    return select_clips(EgoExo4D(root, split, resolution), BuildOptions(**options), alpha=alpha)


def clips_of(selection: Selection) -> list[NarratedClip]:
    return [clip for take in selection.takes for clip in take.clips]


def lengths(clips: list[NarratedClip]) -> list[float]:
    return [clip.end_s - clip.start_s for clip in clips]


def counts(selection: Selection) -> dict[tuple[str, str], tuple[int, int]]:
    """Return (before, after) of each filter, by the kind that it filters and its criterion."""
    return {(row["of"], row["filter"]): (row["in"], row["out"]) for row in selection.counts.rows()}
