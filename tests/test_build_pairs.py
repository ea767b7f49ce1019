"""Building the index of pairs: the clip rule by hand, every filter with its counts, and the command."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from release_files import by, clips_of, counts, description, lengths, select, take_record, write_release

import datamodules
from datamodules.ego_exo_clip import footage
from datamodules.ego_exo_clip.build import BuildOptions, build_index, main, select_clips
from datamodules.ego_exo_clip.egovlp import clip_length_s, expand_window, fit_alpha, mean_gap_s
from datamodules.ego_exo_clip.index import Group, Narration, PairIndex, View, read_header
from datamodules.io.annotations import SourceError

ROOT = Path(__file__).parents[1]
A, B = (0.0, 2.0, 4.0, 6.0), (1.0, 5.0, 9.0)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --------------------------------------------------------------------------------------------------------------------
# from narration times to clips


def around(time_s, gap_s, alpha, duration_s=10.0, fps=30.0, **options):
    return expand_window(time_s, clip_length_s(gap_s, alpha), duration_s, fps, **options)


def test_gaps_of_the_worked_example():
    assert (mean_gap_s(A), mean_gap_s(B)) == (2.0, 4.0)
    assert fit_alpha([A, B]) == 3.0
    assert around(4.0, 2.0, 3.0) == pytest.approx((4 - 1 / 3, 4 + 1 / 3))
    assert around(5.0, 4.0, 3.0) == pytest.approx((5 - 2 / 3, 5 + 2 / 3))


def test_gap_ignores_order():
    assert mean_gap_s((6.0, 0.0, 4.0, 2.0)) == 2.0


@pytest.mark.parametrize("times_s", [(), (3.0,), (3.0, 3.0, 3.0)])
def test_track_without_a_gap_gives_one_second_clips_and_no_part_of_alpha(times_s):
    assert mean_gap_s(times_s) is None
    assert fit_alpha([A, times_s, B]) == 3.0
    assert around(5.0, mean_gap_s(times_s), 3.0) == (4.5, 5.5)


def test_mean_length_over_tracks_is_one_second():
    tracks = [A, B, (0.0, 0.5, 7.0)]
    alpha = fit_alpha(tracks)
    spans = [around(50.0, mean_gap_s(track), alpha, 100.0) for track in tracks]
    assert np.mean([end_s - start_s for start_s, end_s in spans]) == pytest.approx(1.0)


def test_row_of_the_published_egoclip_has_the_length_of_its_gap():
    """showlab/EgoVLP's README: a clip from 2.967651 to 3.721266 around 3.3445; alpha is 4.9 s there, so beta 3.69 s."""
    assert around(3.3445, 0.753615 * 4.9, 4.9) == pytest.approx((2.967651, 3.721266), abs=1e-4)


def test_alpha_needs_a_gap():
    with pytest.raises(SourceError, match="timestamps, so alpha cannot be fitted: pass alpha"):
        fit_alpha([(1.0,), (2.0, 2.0)])


@pytest.mark.parametrize(
    ("time_s", "options", "expected"),
    [
        (0.2, {}, (0.0, 0.7)),  # cut at the start
        (9.8, {}, (9.3, 10.0)),  # cut at the end
        (10.0, {}, (9.5, 10.0)),  # on the last instant
        (5.0, {"scale": 2.0}, (4.0, 6.0)),
        (5.0, {"min_clip_s": 3.0}, (3.5, 6.5)),
        (0.5, {"min_clip_s": 3.0}, (0.0, 3.0)),  # widened inwards
        (9.5, {"min_clip_s": 3.0}, (7.0, 10.0)),
        (5.0, {"min_clip_s": 30.0}, (0.0, 10.0)),  # a take shorter than the shortest clip
        (5.0, {"max_clip_s": 0.5}, (4.75, 5.25)),
        (5.0, {"scale": 0.01, "fps": 10.0}, (4.95, 5.05)),  # 10 ms widened to a frame
        (0.0, {"scale": 0.01, "fps": 10.0}, (0.0, 0.1)),
        (10.0, {"scale": 0.01, "fps": 10.0}, (9.9, 10.0)),
    ],
)
def test_span_at_the_edges(time_s, options, expected):
    assert around(time_s, 3.0, 3.0, **options) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10.1, 1.0, 1.0), {}, "time_s=10.1 is outside the take"),
        ((-0.1, 1.0, 1.0), {}, "time_s=-0.1 is outside the take"),
        ((1.0, 1.0, 0.0), {}, "alpha: got 0.0, allowed: above 0"),
        ((1.0, 1.0, None), {}, "alpha: got None, allowed: above 0"),
        ((1.0, 1.0, 1.0), {"max_clip_s": 0.01}, r"max_clip_s: got 0.01, allowed: 0.03333 s, a frame, or more"),
    ],
)
def test_span_refuses_what_it_cannot_cut(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        around(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_exo_views": 0}, "min_exo_views: got 0, allowed: 1 or more"),
        ({"subjects": "C"}, "subjects: got 'C', allowed: some names"),
        ({"subjects": ()}, r"subjects: got \(\), allowed: some names"),
        ({"clip_scale": -1.0}, "clip_scale: got -1.0, allowed: above 0"),
        ({"clip_scale": float("nan")}, "clip_scale: got nan, allowed: above 0"),
        ({"min_clip_s": -1.0}, "min_clip_s: got -1.0, allowed: 0 or more"),
        ({"min_clip_s": 2.0, "max_clip_s": 1.0}, "max_clip_s: got 1.0, allowed: above min_clip_s=2.0, or None"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        BuildOptions(**options)


# --------------------------------------------------------------------------------------------------------------------
# a dataset of one's own


@dataclass
class Kitchens:
    """The smallest source: takes and narrations that a test writes down."""

    root: Path
    takes: list[tuple[Group, list[Narration]]]
    split: str = "train"
    description: dict[str, str] = field(default_factory=lambda: {"name": "Kitchens"})

    def read(self, counts):
        for group, narrations in self.takes:
            if counts.keep("takes", "in a kitchen", group.scenario == "Cooking"):
                yield group, narrations


def kitchen(
    root, name, *narrations, egos=("glasses",), exos=("left", "right"), missing=(), scenario="Cooking", **fields
):
    views = {cam: View(cam, f"{name}/{cam}.mp4") for cam in (*egos, *exos)}
    (root / name).mkdir(parents=True, exist_ok=True)
    for cam, view in views.items():
        if cam not in missing:
            (root / view.path).write_bytes(b"0")
    named = [replace(narration, clip_id=f"{name}/{n}") for n, narration in enumerate(narrations)]
    ego_views, exo_views = (tuple(views[cam] for cam in cams) for cams in (egos, exos))
    return Group(name, ego_views, exo_views, 10.0, 30.0, scenario=scenario, **fields), named


def narrate(time_s, text="The cook stirs.", annotator="a", **fields):
    return Narration("", annotator, time_s, text, text or "raw", **fields)


def test_a_source_of_ones_own_becomes_an_index(tmp_path):
    source = Kitchens(tmp_path, [kitchen(tmp_path, "k1", narrate(1), narrate(3), narrate(9, span_s=(8.0, 10.0)))])
    header = build_index(source, tmp_path / "index")
    assert header["source"] == {"name": "Kitchens"}
    index = PairIndex.read(tmp_path / "index")
    assert (len(index), header["pairs"], header["alpha"]) == (3, 6, 2.0)
    assert index.start_s.tolist() == [0.5, 2.5, 8.0]
    assert index.end_s.tolist() == [1.5, 3.5, 10.0]


def test_annotated_spans_need_no_alpha_and_follow_the_options(tmp_path):
    source = Kitchens(tmp_path, [kitchen(tmp_path, "k1", narrate(3, span_s=(2.0, 4.0)))], split="validation")
    selection = select_clips(source)
    assert selection.alpha is None
    assert [(clip.start_s, clip.end_s) for clip in clips_of(selection)] == [(2.0, 4.0)]
    assert lengths(clips_of(select_clips(source, BuildOptions(clip_scale=1.5)))) == [3.0]
    assert lengths(clips_of(select_clips(source, BuildOptions(max_clip_s=0.5)))) == [0.5]


def test_every_filter_counts_what_it_lets_through(tmp_path):
    narrations = [
        narrate(1),
        narrate(1),  # repeated
        narrate(2, ego_visible=False),
        narrate(4, unsure=True),
        narrate(5, subject="O"),
        narrate(7, None),  # no text
        narrate(11),  # after the take
        narrate(8, subject="C"),
    ]
    source = Kitchens(
        tmp_path,
        [
            kitchen(tmp_path, "k1", *narrations),
            kitchen(tmp_path, "garden", narrate(1), scenario="Gardening"),
            kitchen(tmp_path, "silent"),
            kitchen(tmp_path, "unchecked", narrate(1), narrate(2), validated=False),
            kitchen(tmp_path, "no_ego", narrate(1), missing=("glasses",)),
            kitchen(tmp_path, "one_exo", narrate(1), missing=("left",)),
            kitchen(tmp_path, "no_exo", narrate(1), missing=("left", "right")),
            kitchen(tmp_path, "about_another", narrate(1, subject="O"), narrate(3, subject="O")),
        ],
    )
    strict = BuildOptions(
        require_validated=True, min_exo_views=2, subjects=("C",), require_ego_visible=True, drop_unsure=True
    )
    for narration in source.takes[0][1][:4]:
        object.__setattr__(narration, "subject", "C")
    assert counts(select_clips(source, strict)) == {
        ("takes", "in a kitchen"): (8, 7),
        ("takes", "narrated"): (7, 6),
        ("takes", "synchronisation validated"): (6, 5),
        ("takes", "ego video on disk"): (5, 4),
        ("takes", "2 or more exo videos on disk"): (4, 2),
        ("takes", "with a clip"): (2, 1),
        ("exo views", "on disk"): (8, 5),
        ("narrations", "not repeated"): (15, 14),
        ("narrations", "within the take"): (14, 13),
        ("narrations", "of takes that are left"): (11, 8),
        ("narrations", "within the shortest stream"): (8, 8),
        ("narrations", "of three words or more, without #unsure"): (8, 7),
        ("narrations", "about C"): (7, 4),
        ("narrations", "visible to the wearer"): (4, 3),
        ("narrations", "not marked as unsure"): (3, 2),
    }
    default = select_clips(source)
    assert [take.group.group_id for take in default.takes] == ["k1", "unchecked", "one_exo", "about_another"]
    assert [len(take.clips) for take in default.takes] == [5, 2, 1, 2]
    assert ("narrations", "not marked as unsure") not in counts(default)


def test_filters_and_missing_files_change_no_clip(tmp_path):
    takes = [take_record("u1"), take_record("u2", aria="aria09"), take_record("u3", exos=("cam07",))]
    descriptions = [
        description(1),
        description(2, ego_visible="0"),
        description(4, unsure="1"),
        description(5, subject="O"),
        description(7, "C lifts."),
    ]
    annotations = {
        "u1": [by(*descriptions)],
        "u2": [by(description(1), description(9))],
        "u3": [by(description(1), description(6))],
    }
    complete = select(write_release(tmp_path / "whole", takes, annotations))
    assert [clip.narration.time_s for clip in complete.takes[0].clips] == [1, 2, 4, 5]
    missing = ("cam01.mp4", "aria09_214-1.mp4", "cam07.mp4")
    partial = select(write_release(tmp_path / "part", takes, annotations, missing=missing))
    assert [(take.group.group_id, [view.cam for view in take.group.exos]) for take in partial.takes] == [
        ("u1", ["cam02"])
    ]
    assert complete.alpha == partial.alpha == (1.5 + 8 + 5) / 3
    assert complete.takes[0].clips == partial.takes[0].clips
    strict = select(tmp_path / "whole", require_ego_visible=True, drop_unsure=True, subjects=("C",))
    assert strict.takes[0].clips == complete.takes[0].clips[:1]


def test_an_empty_file_is_a_missing_one(tmp_path):
    group, narrations = kitchen(tmp_path, "k1", narrate(1), narrate(2))
    (tmp_path / "k1" / "left.mp4").write_bytes(b"")
    (tmp_path / "k1" / "right.mp4").unlink()
    (tmp_path / "k1" / "right.mp4").mkdir()
    with pytest.raises(SourceError, match=r"takes 1 or more exo videos on disk: 0 of 1; fetch the videos"):
        select_clips(Kitchens(tmp_path, [(group, narrations)]))


def test_the_first_ego_view_with_a_video_is_taken(tmp_path):
    take = kitchen(tmp_path, "k1", narrate(1), narrate(2), egos=("best", "second", "third"), missing=("best",))
    (chosen,) = select_clips(Kitchens(tmp_path, [take])).takes
    assert [view.cam for view in chosen.group.egos] == ["second"]


def test_nothing_left_says_where_it_went(tmp_path):
    takes = [kitchen(tmp_path, "k1", narrate(1, subject="C"), narrate(2, subject="C"))]
    with pytest.raises(SourceError, match=r"no clip is left of .*narrations about O: 0 of 2; loosen that filter"):
        select_clips(Kitchens(tmp_path, takes), BuildOptions(subjects=("O",)))
    with pytest.raises(SourceError, match=r"takes narrated: 0 of 1; loosen that filter, or correct the annotations"):
        select_clips(Kitchens(tmp_path, [kitchen(tmp_path, "k2")]), alpha=1.0)
    with pytest.raises(SourceError, match="it holds no take"):
        select_clips(Kitchens(tmp_path, []), alpha=1.0)


# --------------------------------------------------------------------------------------------------------------------
# videos


def test_opened_the_shortest_stream_bounds_the_take(tmp_path, monkeypatch):
    frames = {"glasses": 290, "left": 299, "right": 300}
    monkeypatch.setattr(footage, "probe_file", lambda path: footage.Footage(frames[path.stem], 30.0, 64, 48))
    source = Kitchens(tmp_path, [kitchen(tmp_path, "k1", narrate(9), narrate(9.6), narrate(9.7))])
    selection = select_clips(source, probe_workers=1)
    (take,) = selection.takes
    assert (take.group.duration_s, take.group.fps) == (290 / 30, 30.0)
    assert [clip.narration.time_s for clip in take.clips] == [9, 9.6]
    assert take.clips[-1].end_s == take.group.duration_s
    assert counts(selection)["narrations", "within the shortest stream"] == (3, 2)
    assert selection.alpha == pytest.approx(0.35)  # of the annotations
    assert {(view.width, view.height) for view in (*take.group.egos, *take.group.exos)} == {(64, 48)}
    assert select_clips(source).takes[0].group.duration_s == 10.0


def test_opened_files_say_their_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(
        footage,
        "probe_file",
        lambda path: footage.Footage(120 if path.stem == "left" else 480, 12.0 if path.stem == "left" else 60.0),
    )
    (take,) = select_clips(Kitchens(tmp_path, [kitchen(tmp_path, "k1", narrate(1), narrate(2))]), probe_workers=1).takes
    assert (take.group.fps, take.group.duration_s) == (60.0, 8.0)


def test_what_does_not_open_is_left_out_with_its_reason(toy_world, tmp_path, capsys):
    copy = shutil.copytree(toy_world, tmp_path / "world")
    folder = copy / "takes/toy_train_0001/frame_aligned_videos/downscaled/448"
    (folder / "cam01.mp4").write_bytes((folder / "cam01.mp4").read_bytes()[:2000])
    (folder / "cam02.mp4").write_text("<html>not found</html>")
    assert main(["ego-exo4d", str(copy), "--probe", "--workers", "1"]) == 0
    shown = capsys.readouterr()
    for name in ("cam01.mp4", "cam02.mp4"):
        assert f"left out: {folder / name}" in shown.err
    groups = [json.loads(line) for line in (copy / "ego_exo_clip" / "groups.jsonl").read_text().splitlines()]
    assert not any("toy_train_0001" in group["views"]["ego"]["path"] for group in groups)
    assert len(groups) == 8


def test_frame_offsets_reach_the_index(tmp_path):
    source = Kitchens(
        tmp_path,
        [
            kitchen(tmp_path, "k1", narrate(1), narrate(2), frame_offset={"left": 1}, missing=("right",)),
            kitchen(tmp_path, "k2", narrate(1), narrate(3)),
        ],
    )
    build_index(source, tmp_path / "index", frame_offsets={"k1": {"glasses": 5, "right": 2}})
    groups = [json.loads(line) for line in (tmp_path / "index" / "groups.jsonl").read_text().splitlines()]
    assert [group["frame_offset"] for group in groups] == [{"left": 1, "glasses": 5}, {}]
    with pytest.raises(SourceError, match=r"frame offset of k1: no camera cam09, allowed: glasses, left, right"):
        build_index(source, tmp_path / "index", frame_offsets={"k1": {"cam09": 1}})
    with pytest.raises(
        SourceError, match=r"frame offset of k11: no such take of split 'train' below .*; did you mean k"
    ):
        build_index(source, tmp_path / "index", frame_offsets={"k11": {"glasses": 1}})


# --------------------------------------------------------------------------------------------------------------------
# the command


def release(root):
    """Two training takes of known gaps and a validation take."""
    takes = [take_record(uid) for uid in ("u1", "u2", "u3")]
    write_release(root, takes, {"u1": [by(*(description(t) for t in A))], "u2": [by(*(description(t) for t in B))]})
    splits = {"train": ["u1", "u2"], "val": ["u3"]}
    return write_release(root, takes, {"u3": [by(description(2), description(8))]}, split="val", splits=splits)


def test_the_command_builds_and_prints_the_filters(tmp_path, capsys):
    root = release(tmp_path)
    assert main(["ego-exo4d", str(root)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown[:3]] == [
        ["filter", "in", "out"],
        ["annotated", "takes", "listed", "in", "takes.json", "2", "2"],
        ["takes", "in", "split", "train", "3", "2"],
    ]
    assert shown[-2:] == ["2 takes, 7 clips, 14 ego-exo pairs; alpha 3.0000 s", f"written to {root / 'ego_exo_clip'}"]
    assert len({len(line) for line in shown[:-2]}) == 1
    assert read_header(root / "ego_exo_clip")["options"]["probe"] is False


def test_the_same_command_gives_the_same_bytes(tmp_path, capsys):
    root = release(tmp_path)
    main(["ego-exo4d", str(root)])
    first = contents(root / "ego_exo_clip")
    main(["ego-exo4d", str(root)])
    main(["ego-exo4d", str(root), "--out", str(tmp_path / "elsewhere" / "index")])
    assert first == contents(root / "ego_exo_clip") == contents(tmp_path / "elsewhere" / "index")


def test_validation_is_cut_with_the_alpha_of_training(tmp_path, capsys):
    root = release(tmp_path)
    assert main(["ego-exo4d", str(root), "--split", "val"]) == 0
    fitted = contents(root / "ego_exo_clip_val")
    index = PairIndex.read(root / "ego_exo_clip_val")
    assert (read_header(root / "ego_exo_clip_val")["alpha"], index.start_s.tolist()) == (3.0, [1.0, 7.0])  # 6 s / 3
    main(["ego-exo4d", str(root)])
    assert main(["ego-exo4d", str(root), "--split", "val", "--alpha", str(root / "ego_exo_clip")]) == 0
    assert contents(root / "ego_exo_clip_val") == fitted
    assert main(["ego-exo4d", str(root), "--split", "val", "--alpha", "6"]) == 0
    assert PairIndex.read(root / "ego_exo_clip_val").start_s.tolist() == [1.5, 7.5]


def test_options_of_the_command_reach_the_index(tmp_path, capsys):
    root = release(tmp_path)
    (tmp_path / "offsets.json").write_text('{"u1": {"aria01": 5}}')
    words = "--subjects C O --require-ego-visible --drop-unsure --min-exo-views 2 --clip-scale 2 --max-clip-s 1.5"
    assert main(["ego-exo4d", str(root), *words.split(), "--frame-offsets", str(tmp_path / "offsets.json")]) == 0
    assert read_header(root / "ego_exo_clip")["options"] == {
        "require_validated": False,
        "min_exo_views": 2,
        "subjects": ["C", "O"],
        "require_ego_visible": True,
        "drop_unsure": True,
        "clip_scale": 2.0,
        "min_clip_s": 0.0,
        "max_clip_s": 1.5,
        "alpha": None,
        "frame_offsets": {"u1": {"aria01": 5}},
        "probe": False,
    }
    assert main(["ego-exo4d", str(root), "--require-validated"]) == 2
    assert "takes synchronisation validated: 0 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["u1", "name_u1"])
def test_frame_offsets_go_by_uid_or_by_name(tmp_path, key):
    root, offsets = release(tmp_path), tmp_path / "offsets.json"
    offsets.write_text(json.dumps({key: {"aria01": 5}, "name_u3": {"cam01": 1}}))  # u3 is of the other split
    assert main(["ego-exo4d", str(root), "--frame-offsets", str(offsets)]) == 0
    groups = [json.loads(line) for line in (root / "ego_exo_clip" / "groups.jsonl").read_text().splitlines()]
    assert [group["frame_offset"] for group in groups] == [{"aria01": 5}, {}]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ({"name_u9": {"aria01": 5}}, "frame offset of name_u9: no such take below"),
        ({"elsewhere": {"aria01": 5}}, "correct the name, or remove it"),
        ({"name_u1": {"aria1": 5}}, "frame offset of name_u1: no camera aria1, allowed: aria01, cam01, cam02"),
        ({"u1": {"aria01": 5}, "name_u1": {"aria01": 6}}, "frame offset of name_u1: the same take as u1"),
    ],
)
def test_frame_offsets_that_correct_nothing_are_refused(tmp_path, capsys, offsets, message):
    root, file = release(tmp_path), tmp_path / "offsets.json"
    file.write_text(json.dumps(offsets))
    assert main(["ego-exo4d", str(root), "--frame-offsets", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not (root / "ego_exo_clip").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clip-scale", "0"], r"error: clip_scale: got 0.0, allowed: above 0"),
        (["--alpha", "nowhere"], r"error: no index in nowhere "),
        (
            ["--frame-offsets", "nowhere.json"],
            r"error: nowhere.json: No such file or directory: correct --frame-offsets",
        ),
        (
            ["--frame-offsets", "{root}/bad.json"],
            r"error: .*bad.json: expected {take: {camera: whole frames}}: correct it",
        ),
        (["--resolution", "full"], r"error: .*takes ego video on disk: 0 of 2; fetch the videos"),
        (["--out", "{root}/takes.json"], r"error: .*takes.json"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, words, message):
    root = release(tmp_path)
    (tmp_path / "bad.json").write_text('{"u1": 5}')
    assert main(["ego-exo4d", str(root), *(word.format(root=root) for word in words)]) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert re.match(message, line)
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["ego-exo4d", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{name.replace('_', '-')}" in shown for name in vars(BuildOptions()))
    assert "None" not in shown


def test_building_starts_without_torch():
    heavy = {"torch", "lightning", "av", "transformers"}
    program = f"import sys, datamodules.ego_exo_clip.build; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_every_public_name_is_in_its_module():
    assert set(datamodules.__all__) == set(datamodules._HOME) <= set(dir(datamodules))
    for name in datamodules.__all__:
        assert getattr(datamodules, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = datamodules.Nothing


# --------------------------------------------------------------------------------------------------------------------
# killed


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "program.py").write_text(f"""
import os, pathlib, time
from datamodules.io.parallel import parallel_map
def wait(number):
    pathlib.Path({str(tmp_path)!r}, f"{{os.getpid()}}.pid").touch()
    time.sleep(60)
if __name__ == "__main__":
    parallel_map(wait, range(2), 2, "waiting", "item")
""")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    parent.kill()
    parent.wait()

    def alive():
        states = [Path(f"/proc/{worker}/stat") for worker in workers]
        return [stat for stat in states if stat.exists() and stat.read_text().split(")")[1].split()[0] != "Z"]

    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = alive()
    for worker in workers if left else ():
        os.kill(worker, signal.SIGKILL)
    assert not left


@pytest.mark.slow
def test_killed_at_any_moment_there_is_no_index_or_the_whole_one(tmp_path):
    """Fifty kills of the command, at moments spread at random over its run; an older index is there at first."""
    takes = [take_record(f"u{n}") for n in range(300)]
    annotations = {
        take["take_uid"]: [by(*(description(0.1 * t, f"C lifts cup {t}.") for t in range(90)))] for take in takes
    }
    root = write_release(tmp_path / "release", takes, annotations)
    index = root / "ego_exo_clip"
    command = [sys.executable, "-m", "datamodules.ego_exo_clip.build", "ego-exo4d", str(root)]
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    length_s, expected = time.monotonic() - started, contents(index)
    main(["ego-exo4d", str(root), "--clip-scale", "2", "--out", str(tmp_path / "older")])
    older = contents(tmp_path / "older")
    rng, states = random.Random(0), []
    for _ in range(50):
        shutil.copytree(tmp_path / "older", index, dirs_exist_ok=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.3 * length_s, 1.05 * length_s))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if (index / "index.json").exists():
            found = {name: data for name, data in contents(index).items() if not name.endswith(".partial")}
            assert found in (older, expected)
            assert len(PairIndex.read(index)) == 300 * 90
            states.append("older" if found == older else "new")
        else:
            with pytest.raises(ValueError, match="no index in"):
                PairIndex.read(index)
            states.append("none")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert contents(index) == expected
    assert {"older", "none"} <= set(states), states
