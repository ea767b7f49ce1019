"""The index of pairs: reading returns the pairs that were written, and refuses an incomplete or wrong index."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from datamodules.ego_exo_clip.index import (
    FilterCounts,
    Group,
    NarratedClip,
    Narration,
    PairIndex,
    Strings,
    Take,
    View,
    read_header,
    write_index,
)
from datamodules.io.annotations import SourceError


def view(cam, group_id="g1"):
    return View(cam, f"{group_id}/{cam}.mp4", 64, 48)


def take(group_id="g1", *spans, exos=("cam01", "cam02"), best=None, clip_best=None, **fields):
    group = Group(
        group_id, (view("aria01", group_id),), tuple(view(cam, group_id) for cam in exos), 10.0, 30.0, best_exo=best
    )
    clips = [
        NarratedClip(
            Narration(f"{group_id}/{n}", "7", (a + b) / 2, f"Text {n} ü.", f"raw {n}", best_exo=clip_best), a, b
        )
        for n, (a, b) in enumerate(spans)
    ]
    return Take(Group(**{**{name: getattr(group, name) for name in Group.__slots__}, **fields}), tuple(clips))


def written(folder, *takes, **header):
    write_index(folder, takes, "train", header)
    return folder


def edit(file, line, **fields):
    records = [json.loads(text) for text in file.read_text().splitlines()]
    records[line] |= fields
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


# --------------------------------------------------------------------------------------------------------------------
# written and read


def test_lines_are_as_documented(tmp_path):
    folder = written(tmp_path / "index", take("g1", (1.0, 2.5), best="cam02", frame_offset={"aria01": 5}), alpha=3.0)
    assert json.loads((folder / "groups.jsonl").read_text()) == {
        "group_id": "g1",
        "split": "train",
        "fps": 30.0,
        "num_frames": 300,
        "duration": 10.0,
        "scenario": None,
        "task": None,
        "best_exo": "cam02",
        "frame_offset": {"aria01": 5},
        "views": {
            "ego": {"path": "g1/aria01.mp4", "cam": "aria01", "width": 64, "height": 48},
            "exo": [{"path": f"g1/{cam}.mp4", "cam": cam, "width": 64, "height": 48} for cam in ("cam01", "cam02")],
        },
    }
    assert json.loads((folder / "clips.jsonl").read_text()) == {
        "clip_id": "g1/0",
        "group_id": "g1",
        "annotator": "7",
        "t": 1.75,
        "start": 1.0,
        "end": 2.5,
        "text": "Text 0 ü.",
        "raw_text": "raw 0",
        "subject": None,
        "ego_visible": True,
        "unsure": False,
        "best_exo": None,
    }
    header = read_header(folder)
    assert {"schema_version": 1, "alpha": 3.0, "groups": 1, "clips": 1, "pairs": 2}.items() <= header.items()
    assert header["sha256"].keys() == {"groups.jsonl", "clips.jsonl"}
    assert sorted(os.listdir(folder)) == ["clips.jsonl", "groups.jsonl", "index.json"]


def test_arrays_hold_what_the_lines_say(tmp_path):
    first = take("g1", (1.0, 2.5), (3.0, 4.0), exos=("cam01", "cam02"), best="cam02")
    second = take("g2", (0.1, 0.2), exos=("gp01", "gp02", "gp03"), best="gp03", clip_best="gp02")
    index = PairIndex.read(written(tmp_path, first, second))
    assert len(index) == 3
    assert [index.clip_ids[n] for n in range(3)] == ["g1/0", "g1/1", "g2/0"]
    assert [index.texts[n] for n in range(3)] == ["Text 0 ü.", "Text 1 ü.", "Text 0 ü."]
    assert index.clip_groups.tolist() == [0, 0, 1]
    assert index.start_s.tolist() == [1.0, 3.0, 0.1]
    assert index.end_s.tolist() == [2.5, 4.0, 0.2]
    assert index.first_view.tolist() == [0, 3, 7]
    assert [index.view_paths[n] for n in (0, 1, 3, 6)] == [
        "g1/aria01.mp4",
        "g1/cam01.mp4",
        "g2/aria01.mp4",
        "g2/gp03.mp4",
    ]
    assert index.num_exos().tolist() == [2, 2, 3]
    assert index.view_offsets_s.tolist() == [0.0] * 7
    assert index.best_views.tolist() == [2, 2, 5]


@pytest.mark.parametrize(
    ("best", "clip_best", "expected"),
    [("cam01", "cam02", 2), ("cam02", "cam09", 2), ("cam02", None, 2), ("cam09", "cam08", 1), (None, None, 1)],
)
def test_best_view_is_the_narrations_else_the_takes_else_the_first(tmp_path, best, clip_best, expected):
    index = PairIndex.read(written(tmp_path, take("g1", (1, 2), best=best, clip_best=clip_best)))
    assert index.best_views.tolist() == [expected]


def test_no_python_object_is_kept_for_a_narration(tmp_path):
    spans = [(n / 1000, n / 1000 + 1) for n in range(2000)]
    index = PairIndex.read(written(tmp_path, take("g1", *spans)))
    for column in vars(index).values():
        parts = vars(column).values() if isinstance(column, Strings) else [column]
        for part in parts:
            assert memoryview(part).contiguous  # a buffer
            assert not (isinstance(part, np.ndarray) and part.dtype == object)


def test_strings():
    strings = Strings(["", "a", "äö", "tail"])
    strings.append("更")
    assert len(strings) == 5
    assert [strings[n] for n in range(5)] == ["", "a", "äö", "tail", "更"]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            strings[index]


# --------------------------------------------------------------------------------------------------------------------
# frame offsets


def test_offsets_shift_a_view_and_keep_clips_inside_every_file(tmp_path):
    """Ego lags by 5 frames at 30 fps: its file begins 1/6 s before the take and ends as much before the others."""
    spans = [(0.0, 0.5), (4.0, 5.0), (9.5, 10.0), (9.95, 10.0)]
    index = PairIndex.read(written(tmp_path, take("g1", *spans, frame_offset={"aria01": 5}), take("g2", (9.5, 10.0))))
    assert index.view_offsets_s.tolist() == pytest.approx([-1 / 6, 0, 0, 0, 0, 0])
    last = 10 - 1 / 6
    assert index.start_s.tolist() == pytest.approx([0.0, 4.0, 9.5, last - 1 / 30, 9.5])
    assert index.end_s.tolist() == pytest.approx([0.5, 5.0, last, last, 10.0])


def test_a_view_that_leads_begins_later(tmp_path):
    spans = [(0.0, 0.05), (0.0, 0.5), (9.5, 10.0)]
    index = PairIndex.read(written(tmp_path, take("g1", *spans, frame_offset={"cam02": -3})))
    assert index.view_offsets_s.tolist() == pytest.approx([0, 0, 0.1])
    assert index.start_s.tolist() == pytest.approx([0.1, 0.1, 9.5])
    assert index.end_s.tolist() == pytest.approx([0.1 + 1 / 30, 0.5, 10.0])


def test_an_offset_edited_by_hand_counts(tmp_path):
    folder = written(tmp_path, take("g1", (1.0, 2.0)))
    edit(folder / "groups.jsonl", 0, frame_offset={"cam01": 2})
    assert PairIndex.read(folder).view_offsets_s.tolist() == pytest.approx([0, -2 / 30, 0])


# --------------------------------------------------------------------------------------------------------------------
# refused


def test_no_index_names_the_folder_and_the_command(tmp_path):
    with pytest.raises(ValueError, match=rf"^no index in {tmp_path} .*`make ego-exoclip EGOEXO4D=.*`make data`"):
        PairIndex.read(tmp_path)


def test_another_schema_is_refused(tmp_path):
    folder = written(tmp_path, take("g1", (1, 2)))
    edit_header = json.loads((folder / "index.json").read_text()) | {"schema_version": 2}
    (folder / "index.json").write_text(json.dumps(edit_header))
    with pytest.raises(ValueError, match=r"index\.json: schema_version is 2, expected 1: `make ego-exoclip"):
        PairIndex.read(folder)


@pytest.mark.parametrize("name", ["groups", "clips"])
def test_a_file_copied_in_part_is_refused(tmp_path, name):
    folder = written(tmp_path, take("g1", (1, 2)), take("g2", (1, 2), (3, 4)))
    file = folder / f"{name}.jsonl"
    text = file.read_text()
    if name == "groups":
        (folder / "clips.jsonl").write_text("".join((folder / "clips.jsonl").read_text().splitlines(True)[:1]))
    file.write_text("".join(text.splitlines(True)[:-1]))
    with pytest.raises(ValueError, match=rf"{file}: [12] lines, but index\.json says {name}: [23]: copy or build"):
        PairIndex.read(folder)
    file.write_text(text[:-20])
    with pytest.raises(ValueError, match=rf"{file} line \d: invalid JSON"):
        PairIndex.read(folder)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"group_id": "g9"}, "field 'group_id' is 'g9', which groups.jsonl lacks"),
        ({"start": 2.0, "end": 2.0}, r"start 2.0 and end 2.0: expected start < end"),
        ({"start": -0.1}, "field 'start' is -0.1, expected greater than or equal to 0"),
        ({"end": float("nan")}, "field 'end' is nan, expected a finite number"),
        ({"end": "2"}, "field 'end' is '2', expected a valid number: correct it"),
        ({"text": ""}, "field 'text' is '', expected a text that is not empty"),
        ({"clip_id": 5}, "field 'clip_id' is 5, expected a text: correct it"),
    ],
)
def test_wrong_clips_are_named(tmp_path, fields, problem):
    folder = written(tmp_path, take("g1", (0.5, 1.0), (1.0, 2.0)))
    edit(folder / "clips.jsonl", 1, **fields)
    with pytest.raises(ValueError, match=rf"^{folder / 'clips.jsonl'} line 2: {problem}"):
        PairIndex.read(folder)


EGO, EXO = {"path": "a.mp4", "cam": "aria01"}, {"path": "b.mp4", "cam": "cam01"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"group_id": "g1"}, "field 'group_id' is 'g1' a second time"),
        ({"fps": 0}, "field 'fps' is 0, expected greater than 0: correct it"),
        ({"duration": None}, "field 'duration' is None, expected a valid number: correct it"),
        ({"views": {"ego": EGO}}, "field 'views.exo' is missing: add it"),
        ({"views": {"ego": EGO, "exo": []}}, r"field 'views.exo' is \[\], expected at least one entry"),
        (
            {"views": {"ego": EGO, "exo": ["b.mp4"]}},
            r"field 'views.exo\[0\]' is 'b.mp4', expected an object",
        ),
        ({"views": {"ego": EGO, "exo": [EXO, EXO]}}, "field 'views' names a cam twice"),
        ({"views": {"ego": EGO, "exo": [{"cam": "cam01"}]}}, r"field 'views.exo\[0\].path' is missing"),
        ({"frame_offset": {"cam07": 1}}, "field 'frame_offset' names cam07, allowed: aria01, cam01, cam02"),
        ({"frame_offset": {"cam01": 0.5}}, r"field 'frame_offset.cam01' is 0.5, expected a whole number"),
        ({"frame_offset": {"cam01": -300}}, "field 'frame_offset' leaves no frame of the take"),
    ],
)
def test_wrong_groups_are_named(tmp_path, fields, problem):
    folder = written(tmp_path, take("g1", (1, 2)), take("g2", (1, 2)))
    edit(folder / "groups.jsonl", 1, **fields)
    with pytest.raises(ValueError, match=rf"^{folder / 'groups.jsonl'} line 2: {problem}"):
        PairIndex.read(folder)


# --------------------------------------------------------------------------------------------------------------------
# whole or not at all


class _Stopped(Exception):
    pass


def stopping(real, calls, fail_at):
    """``real``, but the call that makes ``fail_at`` over all functions that share ``calls`` raises instead."""

    def counted(*args, **options):
        calls.append(real)
        if len(calls) == fail_at:
            raise _Stopped
        return real(*args, **options)

    return counted


def test_interrupted_at_any_step_there_is_no_index_and_the_next_one_is_the_same(tmp_path, monkeypatch):
    takes = [take("g1", (1.0, 2.0)), take("g2", (3.0, 4.0))]
    whole = {file.name: file.read_bytes() for file in written(tmp_path / "reference", *takes).iterdir()}
    steps = [(os, "fsync"), (os, "replace"), (Path, "open"), (Path, "unlink")]
    for fail_at in range(1, 100):
        folder, calls = tmp_path / str(fail_at), []
        written(folder, take("g1", (5.0, 6.0)))  # an older index
        (folder / "notes.txt").write_text("mine")
        with monkeypatch.context() as patched:
            for owner, name in steps:
                patched.setattr(owner, name, stopping(getattr(owner, name), calls, fail_at))
            try:
                written(folder, *takes)
                break
            except _Stopped:
                pass
        if (folder / "index.json").exists():
            # Before anything was touched, or after the last file took its name.
            assert PairIndex.read(folder).start_s.tolist() == {1: [5.0], 1 + 3 * 4: [1.0, 3.0]}[fail_at]
        else:
            with pytest.raises(ValueError, match="no index in"):
                PairIndex.read(folder)
        written(folder, *takes)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == {**whole, "notes.txt": b"mine"}
    # The old header; each file opened, flushed and named, and its name flushed; and once to the end.
    assert fail_at == 1 + 3 * 4 + 1


def test_an_error_of_the_source_leaves_no_index_and_no_partial_file(tmp_path):
    def takes():
        yield take("g1", (1, 2))
        raise SourceError("broken")

    with pytest.raises(SourceError, match="broken"):
        write_index(tmp_path, takes(), "train", {})
    assert list(tmp_path.iterdir()) == []


def test_one_group_id_for_two_takes_is_refused(tmp_path):
    with pytest.raises(SourceError, match="group_id 'g1' is given twice"):
        written(tmp_path, take("g1", (1, 2)), take("g1", (1, 2)))


# --------------------------------------------------------------------------------------------------------------------
# filters


def test_filters_are_counted_in_the_order_of_the_filters():
    counts = FilterCounts()
    for number in range(6):
        if counts.keep("takes", "even", number % 2 == 0):
            counts.keep("clips", "long", False)
            counts.keep("takes", "small", number < 3)
    assert counts.rows() == [
        {"of": "takes", "filter": "even", "in": 6, "out": 3},
        {"of": "takes", "filter": "small", "in": 3, "out": 2},
        {"of": "clips", "filter": "long", "in": 3, "out": 0},
    ]
