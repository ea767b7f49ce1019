"""Write the generated world to disk as an Ego-Exo4D release, with instruction data next to it.

::

    <root>/
      takes.json  annotations/{splits,atomic_descriptions_train,atomic_descriptions_val}.json
      takes/<take_name>/frame_aligned_videos/downscaled/448/<camera>.mp4
      initialisation/<take_name>/<camera>.mp4    stage 0: mostly exocentric takes with conversations
      practice/<session>.mp4                     stage 3: egocentric takes
      official/{egtea,egotimeqa,egoexolearn}/    annotations of these takes in the datasets' official formats
      instructions/{initialisation,held_out,egtea,egotimeqa,egoexolearn}.jsonl    the last three converted from these
      instructions/comparisons.jsonl             in worlds with phrasings: yes-no and lettered questions for stage 3
      egobench/<benchmark>/                      eight benchmarks about takes of their own, see ``benchmarks.py``, and
                                                 those that compare views, see ``cross_view.py``
      templates/                                 prompt templates in the world's vocabulary, and those of benchmarks
      ego_exo_clip/                              index of the release's training pairs, as for a real release
      tokenizer/
      world.json                                 settings of this world; written with the rest or not at all
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.ego_exo_clip.build import build_index, select_clips
from datamodules.ego_exo_clip.index import Take as NarratedTake
from datamodules.ego_exo_clip.sources.ego_exo4d import EgoExo4D
from datamodules.egoit.sources.base import InstructionSource, convert
from datamodules.egoit.sources.egoexolearn import EgoExoLearn
from datamodules.egoit.sources.egotimeqa import FPS as QUESTION_FPS
from datamodules.egoit.sources.egotimeqa import EgoTimeQA
from datamodules.egoit.sources.egtea import Egtea
from datamodules.io.parallel import parallel_map
from datamodules.toy_world import questions
from datamodules.toy_world.benchmarks import write_benchmarks
from datamodules.toy_world.cross_view import write_cross_view
from datamodules.toy_world.render import Camera, ego_camera, exo_camera, render
from datamodules.toy_world.scene import PRESETS, VERBS, Action, Take, World, simulate
from datamodules.toy_world.video import encode

FORMAT = 5
_FORMAT_OF_PRESET = {"rich": 7}  # of presets that changed since
SEEDS = {"train": 0, "val": 100_000, "initialisation": 200_000, "practice": 300_000, "benchmark": 400_000}
CLIP_SHARE = 0.66  # of an action, around its middle, that the clips of initialisation and practice takes show


@dataclass(frozen=True)
class Settings:
    """Size and preset of the generated world.

    Attributes:
        preset: name in ``PRESETS``.
        seed: shifts every take's seed.
        train_takes, val_takes: takes of the release, recorded by the glasses and two to four cameras.
        initialisation_takes: takes of stage 0, recorded by one exocentric camera; one in 25 by the glasses.
        practice_takes: takes of stage 3, recorded by the glasses.
        benchmark_takes: takes that all benchmarks ask about, recorded by the glasses.
        size: short side of every frame in pixels.
        frame_counter: paint the frame number into every frame (for tests).
    """

    preset: str = "easy"
    seed: int = 0
    train_takes: int = 160
    val_takes: int = 50
    initialisation_takes: int = 600
    practice_takes: int = 160
    benchmark_takes: int = 60
    size: int = 64
    frame_counter: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.preset not in PRESETS:
            raise ValueError(f"preset: got {self.preset!r}, allowed: {', '.join(PRESETS)}")
        for name in ("train_takes", "val_takes", "initialisation_takes", "practice_takes", "benchmark_takes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed: 1 or more")
        if self.size % 16 or self.size < 32:
            raise ValueError(f"size: got {self.size}, allowed: multiples of 16 from 32")

    @property
    def world(self) -> World:
        """The preset's world."""
        return PRESETS[self.preset]


class WorldExists(ValueError):
    """The folder holds a world of other settings."""


def generate(root: Path, settings: Settings, workers: int) -> bool:
    """Write the world to ``root``, which appears when the world is complete.

    Benchmarks that a world of an earlier version lacks are added to it; nothing else in it changes.

    Args:
        root: folder of the dataset.
        settings: preset, seed and size; the result depends on nothing else.
        workers: number of rendering processes.

    Returns:
        False if ``root`` already held this world.

    Raises:
        WorldExists: ``root`` holds something else; nothing is deleted.
    """
    described = {"format": _FORMAT_OF_PRESET.get(settings.preset, FORMAT), **asdict(settings)}
    counter = settings.frame_counter
    seeds = [SEEDS["benchmark"] + settings.seed * 1_000_000 + index for index in range(settings.benchmark_takes)]
    if root.exists():
        _check_same(root, described)
        write_cross_view(root / "egobench", settings.world, seeds, settings.size, counter, workers)
        return False
    partial_root = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial_root, ignore_errors=True)
    partial_root.mkdir(parents=True)
    _write_release(partial_root, settings, workers)
    _write_conversations(partial_root, settings, workers)
    _write_practice(partial_root, settings, workers)
    write_benchmarks(partial_root / "egobench", settings.world, seeds, settings.size, counter, workers)
    write_cross_view(partial_root / "egobench", settings.world, seeds, settings.size, counter, workers)
    index = build_index(EgoExo4D(partial_root), partial_root / "ego_exo_clip", probe_workers=workers)
    _write_held_out(partial_root, settings, index["alpha"])
    questions.write_tokenizer(partial_root / "tokenizer", settings.world)
    _write_json(partial_root / "world.json", described)
    os.replace(partial_root, root)
    return True


def _check_same(root: Path, described: dict[str, Any]) -> None:
    header = root / "world.json"
    if not header.is_file():
        raise WorldExists(
            f"{root}: is not a generated world (it has no world.json): move it away or choose another --root"
        )
    found = json.loads(header.read_text())
    changed = [f"{key}: {found.get(key)}, not {value}" for key, value in described.items() if found.get(key) != value]
    if changed:
        raise WorldExists(
            f"{root}: holds a world with other settings ({'; '.join(changed)}): remove it or choose another --root"
        )


# --------------------------------------------------------------------------------------------------------------------
# videos


@dataclass(frozen=True)
class _Job:
    """A take to render, and the files of its cameras."""

    seed: int
    files: tuple[tuple[str, str], ...]  # camera, path below the root
    actions: int | None = None
    portrait: str | None = None
    short: str | None = None  # camera whose stream loses its last frame
    far_keys: bool = False


def _camera(take: Take, name: str, size: int, portrait: bool) -> Camera:
    if name.startswith("aria"):
        return ego_camera(take, size)
    wide = size * 2 // 3 * 2  # 4:3, even
    return exo_camera(take, name, *((size, wide) if portrait else (wide, size)))


def _render_take(job: _Job, root: Path, settings: Settings) -> int:
    take = simulate(job.seed, settings.world, job.actions)
    for name, path in job.files:
        camera = _camera(take, name, settings.size, portrait=name == job.portrait)
        frames: Iterable[NDArray[np.uint8]] = render(take, camera, not name.startswith("aria"), settings.frame_counter)
        if name == job.short:
            frames = list(frames)[:-1]
        encode(root / path, frames, camera, settings.world.fps, job.far_keys)
    return take.num_frames


def _render_all(jobs: list[_Job], root: Path, settings: Settings, workers: int, what: str) -> list[int]:
    render_take = partial(_render_take, root=root, settings=settings)
    return parallel_map(render_take, jobs, workers, what, "take")


# --------------------------------------------------------------------------------------------------------------------
# the release


def _write_release(root: Path, settings: Settings, workers: int) -> None:
    takes, splits = [], {"train": [], "val": []}  # type: ignore[var-annotated]
    jobs: list[_Job] = []
    for split, count in (("train", settings.train_takes), ("val", settings.val_takes)):
        annotations: dict[str, Any] = {}
        for index in range(count):
            seed = SEEDS[split] + settings.seed * 1_000_000 + index
            trap = index if split == "train" else -1
            record, job, annotation = _release_take(seed, f"toy_{split}_{index:04d}", trap, settings)
            takes.append(record)
            jobs.append(job)
            annotations[record["take_uid"]] = annotation
            splits[split].append(record["take_uid"])
        if split == "train":
            annotations[str(uuid.UUID(int=7))] = annotations[splits[split][0]]  # a take that takes.json does not list
        _write_json(
            root / "annotations" / f"atomic_descriptions_{split}.json",
            {"ds": "toy", "take_cam_id_map": {}, "annotations": annotations},
        )
    # The annotated duration follows from the number of rendered frames.
    frames = _render_all(jobs, root, settings, workers, "ego-exo takes")
    for take, count in zip(takes, frames, strict=True):
        take["duration_sec"] = count / settings.world.fps
    _write_json(root / "takes.json", takes)
    split_of_take: dict[str, str] = {}
    for split, uids in splits.items():
        split_of_take |= dict.fromkeys(uids, split)
    _write_json(
        root / "annotations" / "splits.json",
        {"split_to_take_uids": {**splits, "test": []}, "take_uid_to_split": split_of_take},
    )


def _release_take(seed: int, name: str, trap: int, settings: Settings) -> tuple[dict[str, Any], _Job, list[Any]]:
    """Return record, video job and annotations of one take.

    Args:
        seed, name, settings: of the take.
        trap: 0 to 8 for a take with one of the defects that real releases have, else any other number.
    """
    rng = np.random.default_rng([seed, 3])
    take = simulate(seed, settings.world)
    uid = str(uuid.UUID(int=seed + (1 << 64)))
    # The cameras of the take. Defects 0 and 2: a second pair of glasses, a listed video that does not exist.
    ego = "aria02" if trap == 0 else "aria01"
    exos = ["cam01", "cam02", "cam03", "cam04"][: int(rng.choice([2, 3, 4], p=take.world.exo_cameras))]
    folder = f"takes/{name}/frame_aligned_videos/downscaled/448"
    streams = {ego: {"rgb": _stream(ego, "214-1", "rgb"), "slam-left": _stream(ego, "1201-1", "slam-left")}}
    streams |= {cam: {"0": _stream(cam, "0", "rgb")} for cam in exos}
    with_video = [cam for cam in exos if not (trap == 2 and cam == exos[-1])]
    best = take.world.best_exo or str(rng.choice(with_video))
    record = {
        "take_uid": uid,
        "take_name": name,
        "root_dir": f"takes/{name}",
        "task_name": "Table top",
        "parent_task_name": "Toy world",
        "fps": settings.world.fps,
        "best_exo": None if trap == 3 else best,
        "is_dropped": False,
        "frame_aligned_videos": {
            **streams,
            "collage": {"0": {"relative_path": None}},
            "best_exo": {"0": {"relative_path": None}},
        },
        "capture": {"cameras": [{"cam_id": cam, "is_ego": cam == ego} for cam in (ego, *exos)]},
    }
    files = ((ego, f"{folder}/{ego}_214-1.mp4"), *((cam, f"{folder}/{cam}.mp4") for cam in with_video))
    # The videos. Defects 1, 3 and 7: a portrait camera, a stream that is a frame short, key frames far apart.
    job = _Job(
        seed,
        files,
        portrait=exos[-1] if trap == 1 else None,
        short=exos[0] if trap == 3 else None,
        far_keys=trap == 7,
    )
    # The annotations. Defects 4 to 6 and 8: rejected or unsorted annotators, a single narration, flags as strings.
    actions = take.actions[:1] if trap == 6 else take.actions
    descriptions = [_description(take, action, best, strings=trap == 8) for action in actions]
    annotators = [_annotator(uid, 1, descriptions)]
    if trap == 4:
        annotators.append(
            _annotator(uid, 2, [{**d, "text": "C does something else."} for d in descriptions], rejected=True)
        )
    if trap == 5:
        annotators.append(_annotator(uid, 2, descriptions[::-2]))
    return record, job, annotators


def _stream(cam: str, stream: str, stream_name: str) -> dict[str, Any]:
    file = f"{cam}.mp4" if stream == "0" else f"{cam}_{stream}.mp4"
    path = f"frame_aligned_videos/{file}"
    return {"cam_id": cam, "stream_id": stream, "readable_stream_id": stream_name, "relative_path": path}


def _annotator(uid: str, number: int, descriptions: list[Any], rejected: bool = False) -> dict[str, Any]:
    return {
        "annotation_uid": f"{uid}-{number}",
        "annotator_id": str(number),
        "rejected": rejected,
        "reject_reason": "wrong take" if rejected else None,
        "descriptions": descriptions,
    }


def _description(take: Take, action: Action, best: str, strings: bool) -> dict[str, Any]:
    def flag(value: bool) -> bool | str:
        return str(int(value)) if strings else value

    return {
        "text": take.narration(action),
        "timestamp": round(action.time_s, 5),
        "subject": "C",
        "ego_visible": flag(action.ego_visible),
        "best_exo": None if strings else {"raw_cam_id": best[-1], "cam_id": best},
        "unsure": flag(False),
    }


# --------------------------------------------------------------------------------------------------------------------
# conversations and held-out questions


def _write_conversations(root: Path, settings: Settings, workers: int) -> None:
    """Write the takes of stage 0 and conversations about them."""
    jobs, records = [], []
    for index in range(settings.initialisation_takes):
        seed = SEEDS["initialisation"] + settings.seed * 1_000_000 + index
        rng = np.random.default_rng([seed, 4])
        take = simulate(seed, settings.world)
        camera = "aria01_214-1" if index % 25 == 24 else f"cam{rng.integers(1, 5):02d}"
        path = f"initialisation/toy_initialisation_{index:04d}/{camera}.mp4"
        jobs.append(_Job(seed, ((camera, path),)))
        for ordinal, action in enumerate(take.actions):
            records.append(_conversation(take, action, f"{index:04d}-{ordinal}", path, rng))
    _render_all(jobs, root, settings, workers, "initialisation takes")
    _write_jsonl(root / "instructions" / "initialisation.jsonl", records)


def _conversation(take: Take, action: Action, key: str, path: str, rng: np.random.Generator) -> dict[str, Any]:
    start_s, end_s = _shown_s(action)
    return {
        "id": f"initialisation/{key}",
        "video": path,
        "start": start_s,
        "end": end_s,
        "conversations": questions.conversation(take, action, rng, with_caption=1.0),
    }


def _shown_s(action: Action) -> tuple[float, float]:
    """Return start and end, in seconds, of the part of an action that its clip shows."""
    half_s = 0.5 * CLIP_SHARE * (action.end_s - action.start_s)
    return round(action.time_s - half_s, 4), round(action.time_s + half_s, 4)


def _write_practice(root: Path, settings: Settings, workers: int) -> None:
    """Write the takes of stage 3, their annotations as EGTEA, EgoTimeQA and EgoExoLearn, and instructions."""
    jobs, takes = [], {}
    for index in range(settings.practice_takes):
        seed, session = SEEDS["practice"] + settings.seed * 1_000_000 + index, f"P{index:04d}-R01-TableTop"
        takes[session] = simulate(seed, settings.world)
        jobs.append(_Job(seed, (("aria01_214-1", f"practice/{session}.mp4"),)))
    _render_all(jobs, root, settings, workers, "practice takes")
    official = root / "official"
    _write_egtea(official / "egtea", takes)
    _write_egotimeqa(official / "egotimeqa", takes)
    _write_egoexolearn(official / "egoexolearn", takes)
    questions.write_templates(root / "templates")
    # The word-level language model of the other worlds never learnt to answer with letters.
    form = "mixed" if settings.world.phrasings else "open"
    sources: list[InstructionSource] = [
        Egtea(official / "egtea", videos="practice", untrimmed=True),
        EgoTimeQA(official / "egotimeqa", form=form, videos="practice"),
        EgoExoLearn(official / "egoexolearn", text="hand", videos="practice"),
    ]
    for source in sources:
        convert(source, root / "instructions" / f"{source.name}.jsonl")
    if settings.world.phrasings:
        _write_jsonl(root / "instructions" / "comparisons.jsonl", _comparisons(takes))


def _write_egtea(folder: Path, takes: dict[str, Take]) -> None:
    """Write ``action_idx.txt``, ``verb_idx.txt``, ``noun_idx.txt`` and ``train_split1.txt``; ids start at 1."""
    verbs = [verb[0].upper() + verb[1:] for verb in VERBS]
    world = next(iter(takes.values())).world
    nouns = [f"{colour}_{kind}" for colour, kind in product(world.named_colours, world.named_kinds)]
    actions = [f"{verb} {noun}" for verb, noun in product(verbs, nouns)]
    folder.mkdir(parents=True)
    for name, labels in (("action", actions), ("verb", verbs), ("noun", nouns)):
        lines = [f"{label} {number}\n" for number, label in enumerate(labels, 1)]
        (folder / f"{name}_idx.txt").write_text("".join(lines))
    rows = []
    for session, take in takes.items():
        for action in take.actions:
            thing = take.things[action.thing]
            verb, noun = VERBS.index(action.verb), nouns.index(f"{thing.colour}_{thing.kind}")
            start_ms, end_ms = (round(1000 * time_s) for time_s in _shown_s(action))
            frames = f"F{start_ms * 24 // 1000:06d}-F{end_ms * 24 // 1000 + 1:06d}"
            rows.append(
                f"{session}-{start_ms}-{end_ms}-{frames} {verb * len(nouns) + noun + 1} {verb + 1} {noun + 1}\n"
            )
    (folder / "train_split1.txt").write_text("".join(rows))


def _write_egotimeqa(folder: Path, takes: dict[str, Take]) -> None:
    """Write ``annotations.EgoTimeQA.json``; moments are divided by their mean length, as in the official file."""
    shown = {session: [_shown_s(action) for action in take.actions] for session, take in takes.items()}
    mean_s = float(np.mean([end_s - start_s for start_s, end_s in chain.from_iterable(shown.values())]))
    more = {"hand": ["both", "neither"], "check": ["maybe", "partly"]}
    rows = []
    for number, (session, take) in enumerate(takes.items()):
        rng = np.random.default_rng([number, 6])
        for action, (start_s, end_s) in zip(take.actions, shown[session], strict=True):
            middle, half = QUESTION_FPS * (start_s + end_s) / 2, QUESTION_FPS * (end_s - start_s) / mean_s / 2
            for kind, question, answer in questions.answers(take, action, rng):
                texts = questions.vocabulary(take.world)[kind] + more.get(kind, [])
                wrong = [text for text in texts if text != answer]
                rows.append(
                    {
                        "video_id": session,
                        "sample_id": session,
                        "question": question,
                        "answer": answer,
                        "moment_start_frame": middle - half,
                        "moment_end_frame": middle + half,
                        "start_sec": start_s,
                        "end_sec": end_s,
                        "wrong_answers": [wrong[i] for i in rng.permutation(len(wrong))[:3]],
                    }
                )
    _write_json(folder / "annotations.EgoTimeQA.json", rows)


def _comparisons(takes: dict[str, Take]) -> Iterator[dict[str, Any]]:
    """Yield records of yes-no and lettered questions: to compare a text with a video is learnt from many of them."""
    for number, (session, take) in enumerate(takes.items()):
        rng = np.random.default_rng([number, 7])
        for place, action in enumerate(take.actions):
            start_s, end_s = _shown_s(action)
            for row, (question, answer, options) in enumerate(questions.comparisons(take, action, rng)):
                task = "mcq" if options else "qa"
                yield {
                    "id": f"comparisons/{session}/{place}/{row}",
                    "video": f"practice/{session}.mp4",
                    "start": start_s,
                    "end": end_s,
                    "prompt": {"task": task, "query": question, "options": options, "target": answer},
                }


def _write_egoexolearn(folder: Path, takes: dict[str, Take]) -> None:
    """Write ``fine_annotation_trainval_en.csv`` with the official header."""
    header = ["video_uid", "annotation_id", "subset", "view", "scene", "start_sec", "end_sec"]
    header += ["narration_en", "narration_en_hand_prompt", "narration_en_no_hand_prompt"]
    (folder / "annotations").mkdir(parents=True)
    with (folder / "annotations" / "fine_annotation_trainval_en.csv").open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(header)
        for session, take in takes.items():
            for number, action in enumerate(take.actions):
                caption = questions.caption(take, action)
                texts = (f"C: {caption}", caption, caption.partition(" with the ")[0] + ".")
                row = [session, f"{session}-{number}", "train", "ego", "lab", *_shown_s(action), *texts]
                table.writerow(row)


def _write_held_out(root: Path, settings: Settings, alpha: float) -> None:
    """Write questions about every narrated clip of the validation takes, cut like the training clips."""
    selection = select_clips(EgoExo4D(root, "val"), alpha=alpha)
    records = chain.from_iterable(_held_out(take, settings) for take in selection.takes)
    _write_jsonl(root / "instructions" / "held_out.jsonl", records)


def _held_out(narrated: NarratedTake, settings: Settings) -> Iterator[dict[str, Any]]:
    name = PurePosixPath(narrated.group.egos[0].path).parts[1]
    seed = SEEDS["val"] + settings.seed * 1_000_000 + int(name.rsplit("_", 1)[1])
    take = simulate(seed, settings.world)
    exos = narrated.group.exos
    for clip in narrated.clips:
        action = min(take.actions, key=lambda a: abs(a.time_s - clip.narration.time_s))
        rng = np.random.default_rng([seed, 5, take.actions.index(action)])
        yield {
            "id": clip.narration.clip_id,
            "take": name,
            "views": {"ego": narrated.group.egos[0].path, "exo": exos[int(rng.integers(len(exos)))].path},
            "start": clip.start_s,
            "end": clip.end_s,
            "ego_visible": clip.narration.ego_visible,
            "questions": questions.held_out_questions(take, action, rng),
        }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
