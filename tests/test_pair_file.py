"""Pairs of a user's own table: its rows, every error of them, the index, and batches from videos that differ."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from test_clip_stream import make_video, number_on

from datamodules.clips.dataset import ClipConfig
from datamodules.clips.sampler import BatchRequest
from datamodules.ego_exo_clip.build import build_index, main
from datamodules.ego_exo_clip.datamodule import EgoExoClipDataModule, NarrationConfig
from datamodules.ego_exo_clip.index import FILTERS_KEY, FilterCounts, PairIndex, read_header
from datamodules.ego_exo_clip.sources.pair_file import PairFile
from datamodules.io.annotations import SourceError
from datamodules.tools import data_check

HEADER = "ego,exo,start,end,text"
EGO, LEFT, RIGHT = "a/glasses.mp4", "a/left.mp4", "a/right.mp4"


def shown(video):
    return [number_on(frame) for frame in video.numpy()]


def pair_batch(index, root, tokenizer, clips=1):
    """Return the module of an index, and a batch of its first clips in both views."""
    module = EgoExoClipDataModule(
        index=str(index),
        views=["ego", "exo"],
        root=str(root),
        tokenizer=str(tokenizer),
        clips=ClipConfig(num_frames=4, image_size=64, frame_fit="squash"),
        global_batch_size=clips,
    )
    module.setup("fit")
    first = list(range(clips))
    return module, module.train_set.__getitems__(BatchRequest(0, first, first, 1))


def table(folder, *rows, columns=HEADER, name="pairs.csv"):
    (folder / name).write_text("\n".join((columns, *rows)) + "\n")
    return folder / name


def read(root, file, **options):
    counts = FilterCounts()
    return list(PairFile(root, file, allow_missing=True, **options).read(counts)), counts


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a root with three videos of 10 frames per second: 4 s, 4 s, and 3 s that begin a second late."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "a").mkdir()
    make_video(root / EGO, 40)
    make_video(root / LEFT, 40)
    make_video(root / RIGHT, 30)
    return root


# --------------------------------------------------------------------------------------------------------------------
# rows


def test_rows_of_one_recording_become_a_take(tmp_path):
    file = table(
        tmp_path,
        f"{EGO},{LEFT}|{RIGHT},0,1.5,Camera-wearer  cuts a leek.",
        f'{EGO},{RIGHT} | {LEFT},1.5,2,"C lifts it, slowly."',
        "",
        "b/1.mp4,b/x/1.mp4,0,1,",
    )
    ((first, narrations), (second, silent)), counts = read(tmp_path, file)
    assert (first.group_id, [view.cam for view in first.egos]) == (EGO, ["glasses"])
    assert [(view.cam, view.path) for view in first.exos] == [("left", LEFT), ("right", RIGHT)]
    assert [(each.clip_id, each.text, each.span_s) for each in narrations] == [
        ("pairs/1", "Camera-wearer cuts a leek.", (0.0, 1.5)),
        ("pairs/2", "C lifts it, slowly.", (1.5, 2.0)),
    ]
    assert [view.cam for view in (*second.egos, *second.exos)] == ["b/1.mp4", "b/x/1.mp4"]  # both files are named 1
    assert [each.text for each in silent] == [""]
    assert counts.rows() == [{"of": "narrations", "filter": "in split train", "in": 3, "out": 3}]


def test_a_camera_a_row_is_the_same_as_cameras_in_one_row(tmp_path):
    one = table(tmp_path, f"{EGO},{LEFT}|{RIGHT},0,1,A,0.5", columns=f"{HEADER},offset")
    expected, _ = read(tmp_path, one)
    several = table(tmp_path, f"{EGO},{LEFT},0,1,A,0.5", f"{EGO},{RIGHT},0,1,A,0.5", columns=f"{HEADER},offset")
    assert read(tmp_path, several)[0] == expected
    named = table(
        tmp_path, f"{EGO},{LEFT},0,1,A,.5,pairs/1", f"{EGO},{RIGHT},0,1,A,.5,pairs/1", columns=f"{HEADER},offset,id"
    )
    assert read(tmp_path, named)[0] == expected
    lines = [{"ego": EGO, "exo": [LEFT, RIGHT], "start": 0, "end": 1.0, "text": "A", "offset": [0.5, 0.5]}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(tmp_path, tmp_path / "pairs.jsonl")[0] == expected


def test_other_cameras_or_offsets_are_another_take(tmp_path):
    rows = (f"{EGO},{LEFT},0,1,A,0", f"{EGO},{LEFT},1,2,B,0.2", f"{EGO},{RIGHT},2,3,C,0")
    takes, _ = read(tmp_path, table(tmp_path, *rows, columns=f"{HEADER},offset"))
    assert [(group.group_id, dict(group.lag_s)) for group, _ in takes] == [
        (EGO, {"left": 0.0}),
        (f"{EGO}#2", {"left": 0.2}),
        (f"{EGO}#3", {"right": 0.0}),
    ]


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_separators_marks_and_packed_files(tmp_path, delimiter):
    text = f"\ufeff{HEADER}\n{EGO},{LEFT},0,1,A\n".replace(",", delimiter)
    (tmp_path / "pairs.csv.gz").write_bytes(gzip.compress(text.encode()))
    (((group, _),), _) = read(tmp_path, tmp_path / "pairs.csv.gz")
    assert group.group_id == EGO


def test_splits_are_chosen_and_a_table_without_them_is_whole(tmp_path):
    rows = (f"{EGO},{LEFT},0,1,A,train", f"{EGO},{LEFT},1,2,B,val")
    file = table(tmp_path, *rows, columns=f"{HEADER},split")
    for split, text in (("train", "A"), ("val", "B")):
        (((_, narrations),), _) = read(tmp_path, file, split=split)
        assert [each.text for each in narrations] == [text]
    plain = table(tmp_path, f"{EGO},{LEFT},0,1,A", name="plain.csv")
    assert len(read(tmp_path, plain, split="val")[0]) == 1


def test_long_spans_without_text_are_cut(tmp_path):
    file = table(tmp_path, f"{EGO},{LEFT},0,9,", f"{EGO},{LEFT},0,9,A")
    (((_, narrations),), _) = read(tmp_path, file, part_s=4)
    assert [(each.clip_id, each.span_s) for each in narrations] == [
        ("pairs/1/0", (0.0, 3.0)),
        ("pairs/1/1", (3.0, 6.0)),
        ("pairs/1/2", (6.0, 9.0)),
        ("pairs/2", (0.0, 9.0)),
    ]


# --------------------------------------------------------------------------------------------------------------------
# errors

GOOD = {"ego": EGO, "exo": LEFT, "start": 0, "end": 1, "text": "A", "offset": "", "split": "train", "id": "x1"}
NO_EXO = "expected a path: name the exo video"
WRONG_FIELDS = [
    ({"ego": " "}, "field 'ego' is ' ', expected a text: correct it"),
    ({"exo": ""}, f"field 'exo' is '', {NO_EXO}"),
    ({"exo": f"{LEFT}|"}, "field 'exo' is 'a/left.mp4|', with nothing next to a bar: remove the bar"),
    ({"ego": f"/{EGO}"}, "field 'ego' is '/a/glasses.mp4', expected a path relative to the data root: shorten it"),
    ({"exo": EGO}, "field 'exo' names the egocentric video 'a/glasses.mp4': name the other camera's"),
    ({"exo": f"{LEFT}|{LEFT}"}, "field 'exo' names a video twice: remove one"),
    ({"start": ""}, "field 'start' is '', expected a number: correct it"),
    ({"start": -1}, "field 'start' is -1, expected 0 or more: give seconds of the ego video"),
    ({"start": 1}, "field 'end' is 1, expected more than start=1: correct one"),
    ({"end": "1,5"}, "field 'end' is '1,5', expected a number: correct it"),
    ({"offset": "soon"}, "field 'offset' is 'soon', expected a number: correct it"),
    ({"offset": "1|2"}, "field 'offset' holds 2 numbers for 1 exo videos: give one for all of them, or one for each"),
    ({"split": ""}, "field 'split' is '', expected a text: correct it"),
    ({"text": "B"}, "field 'id' is 'x1' as in {file} line 2, but not the other columns: correct one of the two"),
    ({}, "repeats {file} line 2 with 'a/left.mp4': remove one of the two"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS)
def test_a_wrong_row_is_named_with_line_and_column(tmp_path, fields, message):
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, GOOD)
        writer.writeheader()
        writer.writerows([GOOD, GOOD | fields])
    with pytest.raises(SourceError) as error:
        read(tmp_path, tmp_path / "pairs.csv")
    assert str(error.value) == f"{tmp_path}/pairs.csv line 3: {message.format(file=tmp_path / 'pairs.csv')}"


def test_a_row_of_too_few_cells_and_values_of_other_types_are_named(tmp_path):
    with pytest.raises(SourceError, match=r"pairs.csv line 2: 4 cells, but the first line names 5 columns: add what"):
        read(tmp_path, table(tmp_path, f"{EGO},{LEFT},0,1"))
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD | {"text": ["A"], "offset": None}) + "\n")
    with pytest.raises(
        SourceError, match=r"line 1: field 'text' is \['A'\], expected a text, or nothing for no narration: correct it"
    ):
        read(tmp_path, tmp_path / "pairs.jsonl")


def test_all_errors_are_reported_together_and_before_a_video_is_opened(videos, tmp_path, capsys):
    file = table(
        tmp_path,
        f"{EGO},{LEFT},0,1,A",
        f"{EGO},{LEFT},2,1,B",
        f"{EGO},a/lost.mp4,0,1,C",
        f"{EGO},a/lost.mp4,1,2,D",
        f"{EGO},{LEFT},x,1,E",
    )
    (tmp_path / "index").mkdir()
    assert main([str(file), str(videos), "--out", str(tmp_path / "index")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"error: {file}: 3 problems, nothing was built:",
        f"  {file} line 3: field 'end' is 1, expected more than start=2: correct one",
        f"  {file} line 6: field 'start' is 'x', expected a number: correct it",
        f"  {file} line 4: field 'exo' is 'a/lost.mp4', but there is no file {videos / 'a/lost.mp4'}: correct it or "
        "the root, or count missing videos with --allow-missing",
    ]
    many = table(tmp_path, *[f"{EGO},{LEFT},1,0,A"] * 25)
    assert main([str(many), str(videos)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "  and 5 more"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            "ego,exo,start,text",
            "line 1: column end is missing: name the columns in the first line, ego,exo,start,end,text",
        ),
        (f"{HEADER},offest", "line 1: column 'offest' is unknown: did you mean 'offset'?"),
        (f"{HEADER},text", "line 1: column text is there twice"),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, message):
    file = table(tmp_path, columns=columns)
    with pytest.raises(SourceError) as error:
        read(tmp_path, file)
    assert str(error.value).startswith(f"{file} {message}")


def test_files_that_are_no_tables_are_one_error(tmp_path, capsys):
    assert main([str(tmp_path / "no.csv"), str(tmp_path)]) == 2
    assert main([str(table(tmp_path)), str(tmp_path)]) == 2
    (tmp_path / "pairs.jsonl").write_text('{"ego": "a.mp4"\n[1]\n')
    assert main([str(tmp_path / "pairs.jsonl"), str(tmp_path)]) == 2
    (tmp_path / "quote.csv").write_text(f'{HEADER}\n{EGO},{LEFT},0,1,"A"b\n')
    assert main([str(tmp_path / "quote.csv"), str(tmp_path)]) == 2
    assert main([str(table(tmp_path)), str(tmp_path / "nowhere")]) == 2
    shown_errors = capsys.readouterr().err
    for message in (
        f"{tmp_path / 'no.csv'}: no such file: correct the path of the table",
        f"{tmp_path / 'pairs.csv'}: holds no row: add one for each narration",
        f"{tmp_path / 'pairs.jsonl'} line 1: invalid JSON",
        f"{tmp_path / 'quote.csv'} line 2: no row of a table",
        f"{tmp_path / 'nowhere'}: no such folder: give the one that the paths of",
    ):
        assert message in shown_errors
    assert "Traceback" not in shown_errors


# --------------------------------------------------------------------------------------------------------------------
# index and batches


def test_missing_videos_can_be_counted(videos, tmp_path, capsys):
    file = table(tmp_path, f"{EGO},{LEFT},0,1,A", f"{EGO},a/lost.mp4,0,1,B")
    out = str(tmp_path / "index")
    assert main([str(file), str(videos), "--allow-missing", "--workers", "1", "--out", out]) == 0
    assert "1 takes, 1 clips, 1 ego-exo pairs\n" in capsys.readouterr().out


def test_a_late_video_shows_the_same_instants(videos, tmp_path, toy_tokenizer):
    rows = (
        f"{EGO},{LEFT}|{RIGHT},2,2.4,The wearer waits.,0|-1",
        f"{EGO},{LEFT}|{RIGHT},0.2,0.6,Before the right camera ran.,0|-1",
        f"{EGO},{LEFT}|{RIGHT},3,3.9,,0|-1",
    )
    file, out = table(tmp_path, *rows, columns=f"{HEADER},offset"), tmp_path / "index"
    header = build_index(PairFile(videos, file), out, probe_workers=1)
    assert (header["groups"], header["clips"], header["pairs"], header["without_text"]) == (1, 2, 4, 1)
    assert {"of": "narrations", "filter": "within all videos", "in": 3, "out": 2} in header[FILTERS_KEY]
    group = json.loads((out / "groups.jsonl").read_text())
    assert (group["frame_offset"], group["duration"], group["fps"]) == ({"right": -10}, 4.0, 10.0)
    assert [(view["cam"], view["duration"]) for view in group["views"]["exo"]] == [("left", 4.0), ("right", 3.0)]
    checked = data_check.read_annotations(out).files.values()
    assert [data_check.check_file(each, videos, decode_all=False) for each in checked] == [None] * 3

    _, batch = pair_batch(out, videos, toy_tokenizer, clips=4)
    assert batch.valid.all() and batch.narrated.tolist() == [True, True, False, False]
    assert shown(batch.ego_video[0]) == shown(batch.exo_video[0]) == [20, 21, 22, 23]
    assert shown(batch.exo_video[1]) == [10, 11, 12, 13]


def test_files_may_start_long_before_and_differ_in_length(tmp_path):
    (tmp_path / "a").mkdir()
    make_video(tmp_path / EGO, 15)
    make_video(tmp_path / LEFT, 40)
    file = table(tmp_path, f"{EGO},{LEFT},0,1.4,A,2.5", columns=f"{HEADER},offset")
    build_index(PairFile(tmp_path, file), tmp_path / "index", probe_workers=1)
    index = PairIndex.read(tmp_path / "index")
    assert (index.start_s.tolist(), index.end_s.tolist()) == ([0.0], [1.4])
    assert index.view_offsets_s.tolist() == [0.0, -2.5]


def test_videos_that_do_not_overlap_are_counted(videos, tmp_path):
    file = table(tmp_path, f"{EGO},{LEFT},0,1,A,9", columns=f"{HEADER},offset")
    with pytest.raises(SourceError, match=r"takes of videos that overlap: 0 of 1"):
        build_index(PairFile(videos, file), tmp_path / "index", probe_workers=1)
    with pytest.raises(SourceError, match="rates and lengths of its videos differ: open the videos with --probe"):
        build_index(PairFile(videos, file), tmp_path / "index")


def test_clips_without_text_are_of_use_in_two_views_only(videos, tmp_path, toy_tokenizer):
    file = table(tmp_path, f"{EGO},{LEFT},0,1,", f"{EGO},{LEFT},1,2,A", f"{RIGHT},{LEFT},1,2,")
    build_index(PairFile(videos, file), tmp_path / "index", probe_workers=1)
    assert read_header(tmp_path / "index")["without_text"] == 2

    def samples(views, **narration):
        module = EgoExoClipDataModule(
            index=str(tmp_path / "index"),
            views=views,
            root=str(videos),
            tokenizer=str(toy_tokenizer),
            clips=ClipConfig(num_frames=2, image_size=16),
            global_batch_size=1,
            narration=NarrationConfig(**narration),
        )
        return module.read().epoch_samples(0).tolist()

    assert samples(["ego", "exo"]) == [0, 1, 2]
    assert samples(["exo"]) == [1]
    assert samples(["ego", "exo"], ego_text_fraction=0.5) == [0, 1, 2]  # of one take with text, one is drawn
    silent = table(tmp_path, f"{EGO},{LEFT},0,1,")
    build_index(PairFile(videos, silent), tmp_path / "index", probe_workers=1)
    assert samples(["ego", "exo"], share=0.5) == [0]
    with pytest.raises(ValueError, match=r"no clip has a text, and data\.views is one view"):
        samples(["exo"])
