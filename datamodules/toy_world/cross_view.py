"""Write benchmarks that compare views about takes of the generated world, in the files of the official releases.

::

    <root>/egobench/
      egoexomem/    EgoExo4D/qa_merged_v6.json  EgoExo4D/takes/<take>/frame_aligned_videos/{aria01_214-1,cam01}.mp4
                    LEMMA/qa_verified.json  LEMMA/<take>/{fpv1,master}.mp4

The takes are those of the other benchmarks, here with the video of an exocentric camera. A folder that exists is left
alone, and one that does not is added to a world of an earlier version.
"""

from __future__ import annotations

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
    writers: dict[str, Callable[[Path, Sequence[Take], np.random.Generator], Files]] = {"egoexomem": _egoexomem}
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
            name = f"toy_benchmark_{number:04d}"
            rows += [_ego_exo4d_row(name, take, n, *question) for n, question in enumerate(asked, 1)]
            videos = f"EgoExo4D/takes/{name}/frame_aligned_videos"
            files += [(number, True, f"{videos}/{_GLASSES}.mp4"), (number, False, f"{videos}/{EXO}.mp4")]
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
