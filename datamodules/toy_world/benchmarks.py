"""Write the eight benchmarks about takes of the generated world, in the files and fields of the official releases.

::

    <root>/egobench/
      egoschema/    questions.json subset_answers.json uid_to_ego4d.json  videos/<q_uid>.mp4
      qaego4d/      annotations.QaEgo4D_test.json annotations.QaEgo4D_test_close.json  videos/<clip>.mp4
      egotaskqa/    {direct,indirect}/{train,test}_qas.json  qa_videos/<take>|fpv1|<start>|<end>.mp4
      charades_ego/ CharadesEgo_v1_test_only1st.csv Charades_v1_classes.txt  CharadesEgo_v1_480/<id>.mp4
      epic100_mir/  EPIC_100_retrieval_test.csv EPIC_100_retrieval_test_sentence.csv EPIC_100_video_info.csv
                    videos/<participant>/<video>.MP4
      egoplan/      EgoPlan_validation.json  videos/{<ego4d>.mp4,<participant>/<video>.MP4}
      vlnqa/        vlnqa.json  videos/<take>_frame<n>.mp4
      egomcq/       egomcq.json  videos/<ego4d>.mp4

Numbers of samples are this world's. Every answer follows from the simulation, and right options stand in every place
about equally often. A clip of EgoSchema and EgoTaskQA is half a take, one of VLN-QA the part up to the question.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.io.parallel import parallel_map
from datamodules.toy_world import questions
from datamodules.toy_world.questions import phrase
from datamodules.toy_world.render import ego_camera, render
from datamodules.toy_world.scene import COLOURS, KINDS, VERBS, Action, Take, Thing, World, simulate
from datamodules.toy_world.video import encode

EGO4D_FPS, EGOTASKQA_FPS = 30, 24
EPIC_FPS = 60  # EPIC-KITCHENS counts frames from 1 at this rate, whatever the rate of a video
MOST_CLASSES = 157
NEXT = ("picks up", "puts down", "shakes", "taps")
"""The four options of every question in VLN-QA's form; the real ones are about walking, which does not occur here."""
_HELD = ("puts down", "shakes")  # what can be done with an object in the hand, and with no other


@dataclass(frozen=True)
class _Film:
    """A file below ``egobench`` and the frames of its take that it shows."""

    take: int
    path: str
    first: int
    end: int


@dataclass(frozen=True)
class _Take:
    """A take, its place among the others, and its names in the benchmarks."""

    number: int
    simulated: Take
    size: int

    @property
    def ego4d(self) -> str:
        """Name of the recording as in Ego4D."""
        return str(uuid.UUID(int=(3 << 64) + self.simulated.seed))

    @property
    def participant(self) -> str:
        """Name of the participant as in EPIC-KITCHENS."""
        return f"P{self.number // 10 + 1:02d}"

    @property
    def epic(self) -> str:
        """Name of the recording as in EPIC-KITCHENS."""
        return f"{self.participant}_{self.number % 10 + 1:02d}"

    @property
    def actions(self) -> list[Action]:
        """All actions in the order of time."""
        return self.simulated.actions

    @property
    def fps(self) -> int:
        """Frame rate of its files."""
        return self.simulated.world.fps

    def frames(self, actions: Sequence[Action]) -> tuple[int, int]:
        """Return the first frame of consecutive actions, and the one after their last."""
        first, end = (round(time_s * self.fps) for time_s in (actions[0].start_s, actions[-1].end_s))
        return first, min(end, self.simulated.num_frames)

    def film(self, path: str, actions: Sequence[Action] = ()) -> _Film:
        """Return a file of some actions, or of the whole take."""
        return _Film(self.number, path, *(self.frames(actions) if actions else (0, self.simulated.num_frames)))

    def thing(self, action: Action) -> Thing:
        """Return the object that an action uses."""
        return self.simulated.things[action.thing]

    def phrase(self, action: Action) -> str:
        """Return the text of an action without its subject and the hand."""
        return phrase(action.verb, self.thing(action), action.hand)

    def halves(self) -> list[list[Action]]:
        """Return the first and the second half of the actions."""
        middle = len(self.actions) // 2
        return [half for half in (self.actions[:middle], self.actions[middle:]) if half]


def write_benchmarks(root: Path, world: World, seeds: Sequence[int], size: int, counter: bool, workers: int) -> None:
    """Write all benchmarks.

    Args:
        root: folder ``egobench``.
        world: the takes' world.
        seeds: one for each take.
        size: side of every frame in pixels.
        counter: paint frame numbers, see ``render``.
        workers: number of rendering processes.
    """
    takes = [_Take(number, simulate(seed, world), size) for number, seed in enumerate(seeds)]
    writers = (_egoschema, _qaego4d, _egotaskqa, _charades_ego, _epic100_mir, _egoplan, _vlnqa, _egomcq)
    films: list[list[_Film]] = [[] for _ in takes]
    for number, writer in enumerate(writers):
        name = writer.__name__.removeprefix("_")
        (root / name).mkdir(parents=True)
        for film in writer(root / name, takes, np.random.default_rng([seeds[0], 7, number])):
            films[film.take].append(_Film(film.take, f"{name}/{film.path}", film.first, film.end))
    job = partial(_film, root=root, size=size, counter=counter)
    parallel_map(job, list(zip(seeds, [world] * len(takes), films, strict=True)), workers, "benchmark takes", "take")


def _film(job: tuple[int, World, list[_Film]], root: Path, size: int, counter: bool) -> None:
    """Render a take once and write all its files; files of the same frames share one inode if the disk has links."""
    seed, world, films = job
    take = simulate(seed, world)
    camera = ego_camera(take, size)
    frames = list(render(take, camera, wearer=False, counter=counter))
    written: dict[tuple[int, int], Path] = {}
    for film in films:
        path, span = root / film.path, (film.first, film.end)
        if span in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.hardlink_to(written[span])
            except OSError:
                shutil.copyfile(written[span], path)
        else:
            encode(path, frames[film.first : film.end], camera, world.fps)
            written[span] = path


# --------------------------------------------------------------------------------------------------------------------
# choices


def _egoschema(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write EgoSchema: two actions of half a take in order, against actions of others with right or wrong objects.

    Each wrong option has the right objects with probability one half, so that no option stands out among the five. One
    question in six has no public answer.
    """
    halves = []
    for take in takes:
        halves += [(take, half, _two(half, rng)) for half in take.halves() if len(half) > 1]
    everywhere = [(first.verb, second.verb) for _, _, (first, second) in halves]
    rows: list[dict[str, Any]] = []
    answers: dict[str, int] = {}
    cuts: dict[str, dict[str, Any]] = {}
    for (take, half, (first, second)), place in zip(halves, _places(len(halves), 5, rng), strict=True):
        q_uid = str(uuid.UUID(int=(4 << 64) + len(rows)))
        things = [take.thing(first), take.thing(second)]
        away = _absent(take, rng)
        elsewhere = [away, away] if things[0] == things[1] else [away, _absent(take, rng, [away])]
        happened = {(earlier.verb, later.verb) for earlier, later in combinations(half, 2)}
        drawn = [everywhere[n] for n in rng.permutation(len(everywhere))]
        drawn += [(VERBS[n // len(VERBS)], VERBS[n % len(VERBS)]) for n in rng.permutation(len(VERBS) ** 2)]
        others = [verbs for verbs in dict.fromkeys(drawn) if verbs not in happened][:4]
        texts = [_then(verbs, things if rng.random() < 0.5 else elsewhere) for verbs in others]
        options = _placed(_then((first.verb, second.verb), things), texts, place)
        question = "What does the camera-wearer do first, and then?"
        row = {"q_uid": q_uid, "google_drive_id": f"toy{len(rows)}", "question": question}
        rows.append(row | {f"option {n}": text for n, text in enumerate(options)})
        if len(rows) % 6:
            answers[q_uid] = place
        span = take.frames(half)
        cuts[q_uid] = {"video_uid": take.ego4d, "starting_sec": span[0] / take.fps, "ending_sec": span[1] / take.fps}
        yield take.film(f"videos/{q_uid}.mp4", half)
    _write_json(folder / "questions.json", rows)
    _write_json(folder / "subset_answers.json", answers)
    _write_json(folder / "uid_to_ego4d.json", cuts)


def _two(half: Sequence[Action], rng: np.random.Generator) -> tuple[Action, Action]:
    first, second = sorted(rng.choice(len(half), size=2, replace=False).tolist())
    return half[first], half[second]


def _then(verbs: tuple[str, str], things: Sequence[Thing]) -> str:
    return " and then ".join(phrase(verb, thing, "") for verb, thing in zip(verbs, things, strict=True))


def _egoplan(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write EgoPlan: options for the next action, only one of which is possible.

    An object in the hand is put down or shaken, and no other is touched; a free hand does neither. The options are one
    verb of each kind with the object used next and with another one: after a free hand, one that is not in the scene.
    """
    steps = []
    for take in takes:
        chosen: list[int] = rng.permutation(max(0, len(take.actions) - 1))[:2].tolist()
        steps += [(take, step) for step in sorted(chosen)]
    rows: list[dict[str, Any]] = []
    for (take, step), place in zip(steps, _places(len(steps), 4, rng), strict=True):
        following, used = take.actions[step + 1], take.thing(take.actions[step + 1])
        held = following.verb in _HELD
        present = [thing for thing in take.simulated.things if thing != used]
        other = present[0] if held and present else _absent(take, rng)
        free = [verb for verb in VERBS if verb not in _HELD]
        wrong = str(rng.choice(free if held else _HELD))
        pairs = [(following.verb, other), (wrong, used), (wrong, other)]
        texts = [phrase(verb, thing, "") for verb, thing in (pairs[n] for n in rng.permutation(3))]
        options = _placed(take.phrase(following), texts, place)
        from_epic = take.number % 2 == 1
        numbers = (EPIC_FPS, 1) if from_epic else (EGO4D_FPS, 0)
        rows.append(
            {
                "sample_id": len(rows),
                "video_source": "EpicKitchens" if from_epic else "Ego4D",
                "video_id": take.epic if from_epic else take.ego4d,
                "task_goal": " and ".join(f"use the {thing.phrase}" for thing in take.simulated.things),
                "question": "What does the camera-wearer do next?",
                **{f"choice_{letter}": text for letter, text in zip("abcd", options, strict=True)},
                "golden_choice_idx": "ABCD"[place],
                "answer": options[place],
                "current_observation_frame": _frame_number(take.frames([take.actions[step]])[1] - 1, take, *numbers),
                "task_progress_metadata": [
                    {
                        "narration_text": take.phrase(action),
                        "start_frame": _frame_number(take.frames([action])[0], take, *numbers),
                        "stop_frame": _frame_number(take.frames([action])[1] - 1, take, *numbers),
                    }
                    for action in take.actions[max(0, step - 1) : step + 1]
                ],
            }
        )
    _write_json(folder / "EgoPlan_validation.json", rows)
    for take in takes:
        yield take.film(f"videos/{take.participant}/{take.epic}.MP4" if take.number % 2 else f"videos/{take.ego4d}.mp4")


def _frame_number(frame: int, take: _Take, fps: int, first: int) -> int:
    """Return the earliest number of a frame at another rate, counted from ``first``."""
    return math.ceil(frame * fps / take.fps) + first


def _vlnqa(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write VLN-QA: three actions are announced, a clip shows one or two, and the next one is asked for; balanced."""
    found: dict[str, list[tuple[_Take, int, int]]] = {verb: [] for verb in NEXT}
    for take in takes:
        for begin in range(len(take.actions) - 2):
            done = int(rng.integers(1, 3))
            following = take.actions[begin + done].verb
            if following in found:
                found[following].append((take, begin, done))
    most = min(25, *(len(rows) for rows in found.values()))
    asked = []
    for verb, places in found.items():
        asked += [(verb, places[n]) for n in rng.permutation(len(places))[:most]]
    rows, films = [], {}
    for number in rng.permutation(len(asked)).tolist():
        verb, (take, begin, done) = asked[number]
        announced = take.actions[begin : begin + 3]
        shown = announced[:done]
        path = f"{take.number:04d}_frame{begin}-{take.frames(shown)[1]}.mp4"
        films[path] = take.film(f"videos/{path}", shown)
        announcement = ", then ".join(take.phrase(action) for action in announced)
        question = f"In the video the camera-wearer {announcement}. What does the camera-wearer do next?"
        candidates = [NEXT[n] for n in rng.permutation(4)]
        rows.append({"video": path, "question": question, "candidates": candidates, "answer": verb})
    _write_json(folder / "vlnqa.json", rows)
    return films.values()


# --------------------------------------------------------------------------------------------------------------------
# answers in words


def _qaego4d(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write QAEgo4D: three questions about a whole take; those of two takes in three are in the closed file, too."""
    opened: list[dict[str, Any]] = []
    closed: list[dict[str, Any]] = []
    for take in takes:
        vocabulary = questions.vocabulary(take.simulated.world)
        end_s = take.simulated.num_frames / take.fps
        clip = str(uuid.UUID(int=(5 << 64) + take.number))
        coloured, named = (take.actions[n] for n in rng.integers(len(take.actions), size=2))
        end, last = (("first", take.actions[0]), ("last", take.actions[-1]))[int(rng.integers(2))]
        asked = [
            ("colour", f"What colour is the {take.thing(coloured).kind}?", take.thing(coloured).colour, coloured),
            ("object", f"Which object is {take.thing(named).colour}?", take.thing(named).kind, named),
            ("verb", f"What does the camera-wearer do {end}?", last.verb, last),
        ]
        for kind, question, answer, action in asked:
            row = {
                "video_id": clip,
                "sample_id": f"{clip}_{len(opened) % len(asked)}",
                "question": question,
                "answer": answer,
                "moment_start_frame": round(action.start_s * EGO4D_FPS),
                "moment_end_frame": round(min(action.end_s, end_s) * EGO4D_FPS),
                "video_uid": take.ego4d,
                "video_start_sec": 0.0,
                "video_end_sec": end_s,
            }
            opened.append(row)
            if take.number % 3:
                wrong = [text for text in vocabulary[kind] if text != answer]
                closed.append(row | {"wrong_answers": [wrong[n] for n in rng.permutation(len(wrong))[:3]]})
        yield take.film(f"videos/{clip}.mp4")
    _write_json(folder / "annotations.QaEgo4D_test.json", opened)
    _write_json(folder / "annotations.QaEgo4D_test_close.json", closed)


def _egotaskqa(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write EgoTaskQA: two questions about each half of a take, with objects and actions named or given by their order.

    A quarter of each answer's questions, and at least one, are for training, so that it is in the vocabulary.
    """
    rows: list[dict[str, Any]] = []
    for take in takes:
        for half in take.halves():
            first, end = (frame * EGOTASKQA_FPS // take.fps for frame in take.frames(half))
            interval = f"toy-{take.number}|fpv1|{first}|{end}"
            for reference in ("direct", "indirect"):
                kind, question, answer = _asked(take, half, reference, rng)
                tags = ("descriptive", kind, "world", "verify" if answer in ("yes", "no") else "query", reference)
                rows.append(
                    {
                        "interval": interval,
                        "question": question,
                        "answer": answer,
                        "type": [tags[0]],
                        "category": [tags[1]],
                        "semantic": tags[2],
                        "structural": tags[3],
                        "reference": tags[4],
                        "program": "",
                        "reasoning_type": "$".join(tags),
                        "video_id": interval,
                        "question_id": f"toy-{len(rows)}",
                    }
                )
            yield take.film(f"qa_videos/{interval}.mp4", half)
    by_answer: dict[tuple[str, str], list[int]] = {}
    for number in rng.permutation(len(rows)).tolist():
        by_answer.setdefault((rows[number]["answer"], rows[number]["reference"]), []).append(number)
    train: set[int] = set()
    for group in by_answer.values():
        train.update(group[: -(-len(group) // 4)])  # a quarter, rounded up
    parts = {
        name: [row for number, row in enumerate(rows) if (number in train) == (name == "train")]
        for name in ("train", "test")
    }
    named = [row for row in parts["train"] if row["reference"] == "direct"]
    known = {row["answer"] for row in named}
    indirect = [row for row in parts["test"] if row["reference"] == "indirect" and row["answer"] in known]
    for split, train_rows, test_rows in (("direct", parts["train"], parts["test"]), ("indirect", named, indirect)):
        _write_json(folder / split / "train_qas.json", train_rows)
        _write_json(folder / split / "test_qas.json", test_rows)


def _asked(take: _Take, half: Sequence[Action], reference: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Return category, question and answer about half a take."""
    chosen = half[int(rng.integers(len(half)))]
    used = {action.thing for action in half}
    thing = take.thing(chosen)
    earliest = next(action for action in half if action.thing == chosen.thing)
    end, action = (("first", half[0]), ("last", half[-1]))[int(rng.integers(2))]
    yes = bool(rng.random() < 0.5)
    if reference == "direct":
        unused = [thing for number, thing in enumerate(take.simulated.things) if number not in used]
        other = thing if yes else (unused or [_absent(take, rng)])[0]
        rows = [
            ("action", f"What does the camera-wearer do first with the {thing.phrase}?", earliest.verb),
            ("object", f"Does the camera-wearer use the {other.phrase}?", "yes" if yes else "no"),
            ("object", f"What colour is the {thing.kind}?", thing.colour),
            ("object", f"Which object is {thing.colour}?", thing.kind),
        ]
    else:
        verb = action.verb if yes else str(rng.choice([verb for verb in VERBS if verb != action.verb]))
        rows = [
            ("action", f"What does the camera-wearer do {end}?", action.verb),
            ("action", f"What does the camera-wearer do {end}: {verb}, yes?", "yes" if yes else "no"),
            ("object", f"What colour is the object that the camera-wearer uses {end}?", take.thing(action).colour),
            ("object", f"Which object does the camera-wearer use {end}?", take.thing(action).kind),
        ]
    return rows[int(rng.integers(len(rows)))]


# --------------------------------------------------------------------------------------------------------------------
# ranking


def _charades_ego(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write Charades-Ego: a class is an action with an object; the most frequent ones if there are too many."""
    counted: Counter[tuple[str, Thing]] = Counter()
    for take in takes:
        counted.update((action.verb, take.thing(action)) for action in take.actions)
    kept = dict(counted.most_common(MOST_CLASSES))
    things = [Thing(kind, colour) for kind, colour in product(KINDS, COLOURS)]
    classes = [(verb, thing) for verb, thing in product(VERBS, things) if (verb, thing) in kept]
    lines = [f"c{n:03d} Camera-wearer {phrase(verb, thing, '')}.\n" for n, (verb, thing) in enumerate(classes)]
    (folder / "Charades_v1_classes.txt").write_text("".join(lines))
    header = "id subject scene quality relevance verified script objects descriptions actions length".split()
    rows = []
    for take in takes:
        name = f"T{take.number:04d}EGO"
        seen = [(action, (action.verb, take.thing(action))) for action in take.actions]
        spans = [f"c{classes.index(c):03d} {a.start_s:.2f} {a.end_s:.2f}" for a, c in seen if c in kept]
        objects = ";".join(thing.kind for thing in take.simulated.things)
        script = ", then ".join(take.phrase(action) for action in take.actions)
        length_s = f"{take.simulated.num_frames / take.fps:.2f}"
        rows.append([name, "C", "Table", "7", "7", "Yes", script, objects, script, ";".join(spans), length_s])
        yield take.film(f"CharadesEgo_v1_480/{name}.mp4")
    _write_csv(folder / "CharadesEgo_v1_test_only1st.csv", header, rows)


def _epic100_mir(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write EPIC-KITCHENS MIR: half of the actions; a noun is an object with its colour, and captions name the hand."""
    header = "narration_id participant_id video_id narration_timestamp start_timestamp stop_timestamp start_frame"
    header += " stop_frame narration verb verb_class noun noun_class all_nouns all_noun_classes"
    rows = []
    captions: dict[str, str] = {}
    for take in takes:
        for number in sorted(rng.permutation(len(take.actions))[: -(-len(take.actions) // 2)].tolist()):
            action = take.actions[number]
            thing, name = take.thing(action), f"{take.epic}_{number}"
            text = questions.caption(take.simulated, action)
            colours = take.simulated.world.named_colours
            noun, noun_class = f"{thing.kind}:{thing.colour}", KINDS.index(thing.kind) * len(colours)
            noun_class += colours.index(thing.colour)
            times = [_clock(time_s) for time_s in (action.time_s, action.start_s, action.end_s)]
            verb = action.verb.replace(" ", "-")
            numbers = [max(1, int(time_s * EPIC_FPS)) for time_s in (action.start_s, action.end_s)]
            row = [name, take.participant, take.epic, *times, *numbers, text, verb]
            rows.append([*row, VERBS.index(action.verb), noun, noun_class, str([noun]), str([noun_class])])
            captions.setdefault(text, name)
        yield take.film(f"videos/{take.participant}/{take.epic}.MP4")
    _write_csv(folder / "EPIC_100_retrieval_test.csv", header.split(), rows)
    sentences = [[name, text] for text, name in captions.items()]
    _write_csv(folder / "EPIC_100_retrieval_test_sentence.csv", ["narration_id", "narration"], sentences)
    videos = [
        [take.epic, take.simulated.num_frames / take.fps, float(take.fps), f"{take.size}x{take.size}"] for take in takes
    ]
    _write_csv(folder / "EPIC_100_video_info.csv", ["video_id", "duration", "fps", "resolution"], videos)


def _egomcq(folder: Path, takes: Sequence[_Take], rng: np.random.Generator) -> Iterable[_Film]:
    """Write EgoMCQ: for every take one question with clips of five takes, and one with five clips of the take."""
    asked: list[tuple[int, list[tuple[_Take, Action]]]] = []
    for take in takes:
        own = {questions.caption(take.simulated, action): (take, action) for action in take.actions}
        distinct = [list(own.values())[n] for n in rng.permutation(len(own))]
        true = distinct[0]
        others: dict[str, tuple[_Take, Action]] = {}
        for number in rng.permutation(len(takes)).tolist():
            other = takes[number]
            action = other.actions[int(rng.integers(len(other.actions)))]
            text = questions.caption(other.simulated, action)
            if other is not take and text not in own:
                others.setdefault(text, (other, action))
        if len(others) >= 4:
            asked.append((1, [true, *list(others.values())[:4]]))
        if len(distinct) >= 5:
            asked.append((2, distinct[:5]))
    items = {}
    for number, ((kind, (true, *wrong)), place) in enumerate(zip(asked, _places(len(asked), 5, rng), strict=True)):
        choices = {str(n): _narrated(*choice) for n, choice in enumerate(_placed(true, wrong, place))}
        items[str(number)] = {"query": _narrated(*true), "choices": choices, "answer": place, "types": kind}
    _write_json(folder / "egomcq.json", items)
    return [take.film(f"videos/{take.ego4d}.mp4") for take in takes]


def _narrated(take: _Take, action: Action) -> dict[str, Any]:
    thing = take.thing(action)
    return {
        "video_uid": take.ego4d,
        "clip_text": f"#C {take.simulated.narration(action)}",
        "clip_start": round(action.start_s, 4),
        "clip_end": round(action.end_s, 4),
        "tag_verb": str([VERBS.index(action.verb)]),
        "tag_noun": str([KINDS.index(thing.kind)]),
    }


# --------------------------------------------------------------------------------------------------------------------
# common parts


def _places(items: int, options: int, rng: np.random.Generator) -> list[int]:
    """Return the places of the right options; all places are equally frequent, up to a remainder."""
    places: list[int] = rng.permutation(np.arange(items) % options).tolist()
    return places


def _placed(true: Any, wrong: Sequence[Any], place: int) -> list[Any]:
    return [*wrong[:place], true, *wrong[place:]]


def _absent(take: _Take, rng: np.random.Generator, more: Sequence[Thing] = ()) -> Thing:
    """Return an object that shares neither kind nor colour with one in the scene, or as little as possible."""
    world = take.simulated.world
    kinds, colours = KINDS[: world.kinds], list(COLOURS)[: world.colours]
    things = [Thing(kind, colour) for kind, colour in product(kinds, colours)]
    away = [thing for thing in things if thing not in take.simulated.things and thing not in more]
    common = [
        sum(thing.kind == other.kind or thing.colour == other.colour for other in (*take.simulated.things, *more))
        for thing in away
    ]
    fewest = [thing for thing, count in zip(away, common, strict=True) if count == min(common)]
    return fewest[int(rng.integers(len(fewest)))]


def _clock(time_s: float) -> str:
    return f"00:{int(time_s // 60):02d}:{time_s % 60:05.2f}"


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
