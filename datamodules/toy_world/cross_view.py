"""Write benchmarks that compare views about takes of the generated world, in the files of the official releases.

::

    <root>/egobench/
      egoexomem/    EgoExo4D/qa_merged_v6.json  EgoExo4D/takes/<take>/frame_aligned_videos/{aria01_214-1,cam01}.mp4
                    LEMMA/qa_verified.json  LEMMA/<take>/{fpv1,master}.mp4
      egoexobench/  EgoExoBench_MCQ.tsv  EgoExo4D/takes/<take>/frame_aligned_videos/{aria01_214-1,cam01}.mp4
                    processed_videos/question<index>_video<n>.mp4

The takes are those of the other benchmarks, here with the video of an exocentric camera. A folder that exists is left
alone, and one that does not is added to a world of an earlier version.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.io.parallel import parallel_map
from datamodules.toy_world import questions
from datamodules.toy_world.questions import phrase
from datamodules.toy_world.render import ego_camera, exo_camera, render
from datamodules.toy_world.scene import Take, World, simulate
from datamodules.toy_world.video import encode

EXO = "cam01"
_OPTIONS = 4
_GLASSES = "aria01_214-1"

Files = list[tuple[int, bool, str]]
"""Take, whether its video is egocentric, and path of the video below the benchmark's folder."""


def write_cross_view(root: Path, world: World, seeds: Sequence[int], size: int, counter: bool, workers: int) -> None:
    """Write the benchmarks that are not there yet; each folder appears when it is complete.

    Args:
        root: folder ``egobench``.
        world: the takes' world.
        seeds: one for each take.
        size: short side of every frame in pixels.
        counter: paint frame numbers, see ``render``.
        workers: number of rendering processes.
    """
    writers: dict[str, Callable[[Path, Sequence[Take], np.random.Generator], Files]] = {
        "egoexomem": _egoexomem,
        "egoexobench": _egoexobench,
    }
    for number, (name, writer) in enumerate(writers.items()):
        folder, partial_folder = root / name, root / f".{name}.partial"
        if folder.exists():
            continue
        shutil.rmtree(partial_folder, ignore_errors=True)
        takes = [simulate(seed, world) for seed in seeds]
        files = writer(partial_folder, takes, np.random.default_rng([seeds[0], 8, number]))
        jobs = [(seed, world, [file for file in files if file[0] == take]) for take, seed in enumerate(seeds)]
        film = partial(_film, root=partial_folder, size=size, counter=counter)
        parallel_map(film, jobs, workers, f"{name} takes", "take")
        os.replace(partial_folder, folder)


def _film(job: tuple[int, World, Files], root: Path, size: int, counter: bool) -> None:
    """Render a take from each view once, and write all its files."""
    seed, world, files = job
    take = simulate(seed, world)
    cameras = {True: ego_camera(take, size), False: exo_camera(take, EXO, size * 2 // 3 * 2, size)}
    for is_ego, camera in cameras.items():
        paths = [root / path for _, ego, path in files if ego == is_ego]
        if paths:
            encode(paths[0], render(take, camera, wearer=not is_ego, counter=counter), camera, world.fps)
        for path in paths[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(paths[0], path)


def _egoexomem(folder: Path, takes: Sequence[Take], rng: np.random.Generator) -> Files:
    """Write EgoExoMem: two questions about each take, in Ego-Exo4D's form for every other take, else in LEMMA's."""
    rows: list[dict[str, Any]] = []
    verified: dict[str, dict[str, Any]] = {}
    files: Files = []
    for number, take in enumerate(takes):
        asked = [("Q5", *_colour(take, rng)), ("Q8", *_order(take, rng))]
        if number % 2 == 0 or len(takes) == 1:
            name = _name(number)
            rows += [_ego_exo4d_row(name, take, n, *question) for n, question in enumerate(asked, 1)]
            files += _take_files(number)
        if number % 2 == 1 or len(takes) == 1:
            for n, (kind, question, options, answer) in enumerate(asked, 1):
                row = {"correct_answer": answer, "status": "ok", "note": "", "question": question, "options": options}
                verified[f"toy_{number}_{kind}_{n:03d}"] = row
            videos = f"LEMMA/toy-{number}"
            files += [(number, True, f"{videos}/fpv1.mp4"), (number, False, f"{videos}/master.mp4")]
    _write_json(folder / "EgoExo4D" / "qa_merged_v6.json", rows)
    _write_json(folder / "LEMMA" / "qa_verified.json", verified)
    return files


def _ego_exo4d_row(
    name: str, take: Take, number: int, kind: str, question: str, options: list[str], answer: int
) -> dict[str, Any]:
    """Return a row of the file about Ego-Exo4D; questions about an order have no key frames there."""
    key, time_s = f"{name}_{kind}_{number:03d}", take.actions[0].time_s
    frame = f"{int(time_s * 30):06d}.jpg"
    shown = [f"keyframes/{key}/ego_{_GLASSES}_{frame}", f"keyframes/{key}/exo_{EXO}_{frame}"]
    return {
        "qa_id": key,
        "qa_type": kind,
        "take_name": name,
        "scenario": "Table top",
        "required_view": "either",
        "question": question,
        "options": options,
        "correct_answer": answer,
        "verification": {
            "requires_human_check": False,
            "timestamps": [time_s],
            "check_description": "",
            "ground_truth_source": "simulation",
            "keyframes": [] if kind == "Q8" else shown,
        },
        "idx": number - 1,
    }


def _egoexobench(folder: Path, takes: Sequence[Take], rng: np.random.Generator) -> Files:
    """Write EgoExoBench: for each take an action from both views, and for every fourth one a choice among four videos.

    The first are cut out of takes; clips of the others are files of their own, and so are their options.
    """
    rows: list[dict[str, Any]] = []
    files: Files = []
    for number, take in enumerate(takes):
        action = take.actions[int(rng.integers(len(take.actions)))]
        span = {"video_start": round(action.start_s, 4), "video_end": round(action.end_s, 4)}
        views = [path for _, _, path in _take_files(number)]
        medias = [{"type": "video", "video_path": path, **span, "nframes": 16} for path in views]
        texts, place = questions.options(take, action, rng, phrase)
        question = "In <video> and <video> the camera-wearer uses the object. What does the camera-wearer do?"
        rows.append(_table_row(len(rows), "Action Relation", question, texts, place, medias))
        files += _take_files(number)
    for first in range(0, len(takes) - _OPTIONS + 1, _OPTIONS):
        place, index = int(rng.integers(_OPTIONS)), len(rows)
        shown = [(first + place, True), *((first + n, False) for n in range(_OPTIONS))]
        medias = [
            {"type": "video", "video_path": f"LEMMA/toy-{number}/{'fpv1' if is_ego else 'master'}.mp4"}
            for number, is_ego in shown
        ]
        rows.append(
            _table_row(index, "Person Relation", "Which video is with <video>?", ["<video>"] * _OPTIONS, place, medias)
        )
        for n, (number, is_ego) in enumerate(shown):
            files.append((number, is_ego, f"processed_videos/question{index}_video{n}.mp4"))
    folder.mkdir(parents=True)
    with (folder / "EgoExoBench_MCQ.tsv").open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return files


def _table_row(
    index: int, task: str, question: str, options: Sequence[str], place: int, medias: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a row of EgoExoBench's table."""
    return {
        "index": index,
        "question": question,
        "options": "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True)),
        "response_format": "Answer with the letter.",
        "answer": "ABCD"[place],
        "subtask_type": task,
        "medias": repr(medias),
    }


def _name(number: int) -> str:
    return f"toy_benchmark_{number:04d}"


def _take_files(number: int) -> Files:
    """Return the two videos of a take in Ego-Exo4D's layout, the egocentric one first."""
    folder = f"EgoExo4D/takes/{_name(number)}/frame_aligned_videos"
    return [(number, True, f"{folder}/{_GLASSES}.mp4"), (number, False, f"{folder}/{EXO}.mp4")]


def _colour(take: Take, rng: np.random.Generator) -> tuple[str, list[str], int]:
    """Ask for the colour of an object that is used; return question, options and place of the right one."""
    thing = take.things[take.actions[0].thing]
    wrong = [colour for colour in questions.vocabulary(take.world)["colour"] if colour != thing.colour]
    return f"What colour is the {thing.kind}?", *_placed(thing.colour, wrong, rng)


def _order(take: Take, rng: np.random.Generator) -> tuple[str, list[str], int]:
    """Ask for the first two actions against other pairs of the take's."""
    texts = [phrase(action.verb, take.things[action.thing], action.hand) for action in take.actions]
    pairs = [f"{first} and then {second}" for first in texts for second in texts]
    right = f"{texts[0]} and then {texts[1]}"
    wrong = [pair for pair in dict.fromkeys(pairs) if pair != right]
    return "What does the camera-wearer do first, and then?", *_placed(right, wrong, rng)


def _placed(right: str, wrong: Sequence[str], rng: np.random.Generator) -> tuple[list[str], int]:
    """Return the right option among wrong ones drawn at random, and its place."""
    options = [wrong[n] for n in rng.permutation(len(wrong))[: _OPTIONS - 1]]
    place = int(rng.integers(_OPTIONS))
    return [*options[:place], right, *options[place:]], place


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
