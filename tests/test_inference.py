"""Ask a trained model from Python: the same frames, tokens and numbers as in training and evaluation."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time

import pytest
import torch
from bench import bench_answer

from datamodules.text import UnusableText
from datamodules.video.errors import ClipDecodeError, EmptySpan, FileMissing, SpanOutsideFile
from lightning_modules import Exo2Ego
from lightning_modules.cli import main
from lightning_modules.inference import api, description, terminal
from lightning_modules.weights import handoff
from lightning_modules.weights.tensors import WeightsError

QUESTION = "Describe the video."
OPTIONS = ["Camera-wearer picks up the red ball with the left hand.", "Camera-wearer moves the blue cup."]


@pytest.fixture
def runs(noisy_runs):
    return noisy_runs


@pytest.fixture(scope="module")
def model(noisy_runs):
    return Exo2Ego.from_pretrained(noisy_runs / "toy" / "stage3")


@pytest.fixture(scope="module")
def video(toy_world):
    return sorted((toy_world / "takes").rglob("aria*_214-1.mp4"))[0]


@pytest.fixture
def counted(model, monkeypatch):
    """Count how often a clip is encoded, starting with none kept."""
    calls = []
    encode = model.visual_tokens
    monkeypatch.setattr(model, "visual_tokens", lambda *args: calls.append(args) or encode(*args))
    model._prefixes.clear()
    return calls


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("stage", ["stage0", "stage3"])
def test_answers_are_those_of_the_evaluation(runs, toy_world, stage):
    run = runs / "toy" / stage
    loaded = Exo2Ego.from_pretrained(run)
    clips = {}
    for line in (toy_world / "instructions" / "held_out.jsonl").read_text().splitlines():
        clip = json.loads(line)
        clips[clip["id"]] = clip
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    asked = [answer for answer in answers if answer["view"] == "ego"][:12]
    assert any(answer["task"] == "choice" for answer in asked)
    assert len({answer["prediction"] for answer in asked}) > 3
    for answer in asked:
        clip = clips[answer["clip"]]
        where = (toy_world / clip["views"]["ego"], answer["question"])
        if answer["task"] == "choice":
            (question,) = [q for q in clip["questions"] if q["question"] == answer["question"] and "options" in q]
            chances = loaded.choose(*where, question["options"], clip["start"], clip["end"])
            assert max(chances, key=chances.get) == answer["prediction"]
            assert sum(chances.values()) == pytest.approx(1)
        else:
            given = loaded.answer(*where, clip["start"], clip["end"], max_new_tokens=32)
            assert given == answer["prediction"]


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("stage1", {"exo_encoder", "projector", "language_model"}),
        ("stage2", {"ego_encoder", "ego_to_exo", "projector", "language_model"}),
    ],
)
def test_parts_that_answering_does_not_use_are_not_loaded(toy_runs, stage, parts):
    assert set(Exo2Ego.from_pretrained(toy_runs / "toy" / stage).model.parts) == parts


def test_stage_weights_stand_alone(runs, video, model, tmp_path, monkeypatch):
    """Without the run, its configuration, the stages before, or their working directory."""
    alone = shutil.copytree(runs / "toy" / "stage3" / "handoff", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    manifest = json.loads((alone / "manifest.json").read_text())
    assert str(runs) not in json.dumps(manifest["answering"])
    assert Exo2Ego.from_pretrained("alone").answer(video, QUESTION) == model.answer(video, QUESTION)


def test_all_files_of_stage_weights_have_the_same_mode(toy_runs):
    folder = toy_runs / "toy" / "stage3" / "handoff"
    assert (folder / "frozen" / "language_model.safetensors").is_file()
    assert len({file.stat().st_mode for file in folder.rglob("*") if file.is_file()}) == 1


def test_large_frozen_parts_are_found_at_their_source(toy_runs, tmp_path, video, monkeypatch):
    monkeypatch.setattr(description, "MAX_COPIED_PARAMETERS", 10)
    runs = shutil.copytree(toy_runs, tmp_path / "runs")
    for file in runs.rglob("config.yaml"):
        file.write_text(file.read_text().replace(str(toy_runs), str(runs)))
    assert main(["consolidate", str(runs / "toy" / "stage3" / "config.yaml")]) == 0
    (folder,) = (runs / "toy" / "stage3").glob("handoff_*")
    assert not (folder / "frozen").exists()
    given = Exo2Ego.from_pretrained(folder).choose(video, QUESTION, OPTIONS)
    assert given == Exo2Ego.from_pretrained(toy_runs / "toy" / "stage3").choose(video, QUESTION, OPTIONS)
    manifest = runs / "toy" / "stage0" / "handoff" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(json.loads(manifest.read_text())["digest"], 16 * "0"))
    with pytest.raises(WeightsError, match=r"language_model was not copied, and its source is gone: .*digest differs"):
        Exo2Ego.from_pretrained(folder)
    shutil.rmtree(runs / "toy" / "stage0")
    with pytest.raises(WeightsError, match=r"language_model was not copied, and its source is gone: No stage0"):
        Exo2Ego.from_pretrained(folder)


def test_weights_of_earlier_versions_need_the_configuration_of_their_run(runs, toy_runs, tmp_path, video, model):
    run = tmp_path / "stage3"
    shutil.copytree(runs / "toy" / "stage3" / "handoff", run / "handoff")
    shutil.copy(toy_runs / "toy" / "stage3" / "config.yaml", run)
    for name in ("frozen", "tokenizer"):
        shutil.rmtree(run / "handoff" / name)
    manifest = json.loads((run / "handoff" / "manifest.json").read_text())
    del manifest["answering"]
    manifest["digest"] = handoff._digest(run / "handoff", time.time_ns())
    (run / "handoff" / "manifest.json").write_text(json.dumps(manifest))
    assert Exo2Ego.from_pretrained(run).answer(video, QUESTION) == model.answer(video, QUESTION)
    (run / "config.yaml").unlink()
    with pytest.raises(WeightsError, match=r"by an earlier version.*there is no .*config.yaml: restore that file, or"):
        Exo2Ego.from_pretrained(run)


def test_what_is_no_model_is_refused(tmp_path, toy_world):
    for source, message in (
        (tmp_path / "nowhere", "no such folder: name a run, an exported folder, or owner/name on the hub"),
        (toy_world, "holds no trained model: name a run"),
    ):
        with pytest.raises(WeightsError, match=message):
            Exo2Ego.from_pretrained(source)


# ------------------------------------------------------------------------------------------------------------- asking


def test_the_pieces_of_a_stream_are_the_answer(model, video):
    answer = model.answer(video, QUESTION, 1.0, 3.0, max_new_tokens=20)
    pieces = list(model.stream(video, QUESTION, 1.0, 3.0, max_new_tokens=20))
    assert "".join(pieces) == answer and len(pieces) > 1


def test_a_clip_is_encoded_once_for_all_questions(model, video, counted):
    first = model.answer(video, QUESTION, 1.0, 3.0)
    assert model.answer(video, [QUESTION, QUESTION], 1.0, 3.0) == [first, first]
    model.choose(video, QUESTION, OPTIONS, 1.0, 3.0)
    assert len(counted) == 1
    model.answer(video, QUESTION, 1.0, 3.5)
    assert len(counted) == 2


def test_questions_between_the_pieces_of_a_stream_do_not_disturb_it(model, video):
    expected = model.answer(video, QUESTION, 1.0, 3.0, max_new_tokens=20)
    pieces = []
    for piece in model.stream(video, QUESTION, 1.0, 3.0, max_new_tokens=20):
        pieces.append(piece)
        assert model.answer(video, QUESTION, 1.0, 3.0, max_new_tokens=20) == expected
    assert "".join(pieces) == expected
    next(model.stream(video, QUESTION, 1.0, 3.0))  # given up after a piece
    assert model.answer(video, QUESTION, 1.0, 3.0, max_new_tokens=20) == expected


def test_several_threads_may_ask(model, video):
    expected = [model.answer(video, QUESTION, start, start + 2, max_new_tokens=8) for start in (0.0, 1.0, 2.0)]
    answers = {}

    def ask(start):
        answers[start] = [model.answer(video, QUESTION, start, start + 2, max_new_tokens=8) for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(start,)) for start in (0.0, 1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[start] for start in (0.0, 1.0, 2.0)] == [[answer] * 3 for answer in expected]


def test_frames_can_be_given(model, video):
    clip = model.look(video, 1.0, 3.0)
    assert model.answer(clip.frames, QUESTION) == model.answer(video, QUESTION, 1.0, 3.0)


def test_a_conversation_keeps_its_turns(model, video):
    chat = model.chat(video, 1.0, 3.0)
    first = chat.ask(QUESTION)
    assert first == model.answer(video, QUESTION, 1.0, 3.0)
    pieces = list(chat.stream("Which object?", 12))
    assert chat.turns == [(QUESTION, first), ("Which object?", "".join(pieces))]
    assert len(chat.clip.times_s) == model.description.clips.num_frames


def test_a_second_turn_reads_what_training_reads(model):
    turns = [("Which object?", "the red ball"), ("Which hand?", "the left hand")]
    row = model.encoder.conversation(turns)
    prompt = model.encoder.prompt(turns[1][0], turns[:1])
    answer = len(model.encoder.tokenizer("the left hand", add_special_tokens=False)["input_ids"]) + 1
    assert prompt.input_ids == row.input_ids[:-answer]
    assert set(prompt.labels) == {-100}


def test_a_long_video_is_narrated_part_by_part(model, video, counted):
    narrations = model.describe(video, every=2.0)
    first = next(narrations)
    assert len(counted) == 1  # the rest has not been read
    assert first == (0.0, 2.0, model.answer(video, QUESTION, 0.0, 2.0))
    rest = list(narrations)
    assert [narration.start_s for narration in rest] == [2.0 * number for number in range(1, len(rest) + 1)]
    assert len(model._prefixes) <= api._CLIPS_KEPT


def test_several_questions_have_the_answers_of_each_alone(model, video):
    questions = [QUESTION, "Which hand?", "Which object does the camera-wearer hold?", "Which hand?"]
    expected = [model.answer(video, question, 1.0, 3.0, max_new_tokens=24) for question in questions]
    assert len(set(expected)) > 1
    assert model.answer(video, questions, 1.0, 3.0, max_new_tokens=24) == expected


def test_parts_that_are_narrated_together_have_the_text_of_each_alone(model, video, monkeypatch):
    monkeypatch.setattr(api, "_NARRATED_TOGETHER", 3)
    narrations = list(model.describe(video, every=0.7, max_new_tokens=24))
    assert len(narrations) > 5 and len({text for *_, text in narrations}) > 1
    for start, end, text in narrations:
        assert text == model.answer(video, QUESTION, start, end, max_new_tokens=24)


def test_parts_before_an_unreadable_one_are_narrated(model, video, monkeypatch):
    look, expected = model.look, list(model.describe(video, every=0.7, end=2.1))

    def damaged(path, start, end):
        if start > 1.0:
            raise SpanOutsideFile(f"{path}: damaged")
        return look(path, start, end)

    monkeypatch.setattr(model, "look", damaged)
    model._prefixes.clear()
    narrations = model.describe(video, every=0.7)
    assert [next(narrations), next(narrations)] == expected[:2]
    with pytest.raises(SpanOutsideFile, match="damaged"):
        next(narrations)


def test_parts_cover_a_span_and_none_is_much_shorter():
    assert api._parts(0.0, 7.0, 2.0) == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 7.0)]
    assert api._parts(1.0, 5.5, 2.0) == [(1.0, 3.0), (3.0, 5.5)]
    assert api._parts(0.0, 0.3, 2.0) == [(0.0, 0.3)]


def test_single_visual_inputs(toy_runs, model, video):
    both = model.visual_tokens(model.look(video).frames)
    ego = model.visual_tokens(model.look(video).frames, ["ego"])
    mapped = model.visual_tokens(model.look(video).frames, ["mapped"])
    torch.testing.assert_close(torch.cat([ego, mapped]), both)
    assert isinstance(model.answer(video, QUESTION, visual_inputs=["mapped"]), str)
    with pytest.raises(ValueError, match="visual_inputs: got mapped, but this model reads ego"):
        Exo2Ego.from_pretrained(toy_runs / "toy" / "stage1").answer(video, QUESTION, visual_inputs=["mapped"])


@pytest.mark.parametrize(
    ("start", "end", "error", "message"),
    [
        (3.0, 2.0, EmptySpan, "the end must come after the start"),
        (2.0, 2.0, EmptySpan, "the end must come after the start"),
        (math.nan, None, EmptySpan, "the end must come after the start"),
        (-1.0, 2.0, SpanOutsideFile, "before the first frame"),
        (1000.0, None, SpanOutsideFile, "the video ends at"),
        (0.0, 1000.0, SpanOutsideFile, "the video ends at"),
    ],
)
def test_impossible_spans_are_one_line(model, video, start, end, error, message):
    for ask in (
        lambda: model.answer(video, QUESTION, start, end),
        lambda: model.choose(video, QUESTION, OPTIONS, start, end),
        lambda: model.describe(video, 2.0, start, end),
        lambda: model.chat(video, start, end),
        lambda: list(model.stream(video, QUESTION, start, end)),
    ):
        with pytest.raises(error, match=message) as caught:
            ask()
        assert len(str(caught.value).splitlines()) == 1 and str(video) in str(caught.value)


def test_unusable_input_is_refused(model, video, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(FileMissing):
        model.answer(tmp_path / "nowhere.mp4", QUESTION)
    with pytest.raises(ClipDecodeError, match=r"text.mp4"):
        model.answer(tmp_path / "text.mp4", QUESTION)
    with pytest.raises(UnusableText, match="<video>"):
        model.answer(video, "What is in <video>?")
    with pytest.raises(ValueError, match="at least two different texts"):
        model.choose(video, QUESTION, [OPTIONS[0], OPTIONS[0]])
    with pytest.raises(ValueError, match="every: got 0"):
        model.describe(video, every=0)


def test_the_benchmark_measures_a_trained_and_a_random_model(runs, tmp_path, capsys):
    """It compares the answers of all ways of decoding."""
    few = ["--rows", "1", "2", "--tokens", "4", "--repeats", "1"]
    bench_answer.main([*few, "--runs", str(runs)])
    assert capsys.readouterr().out.startswith(f"{runs}/toy/stage3/handoff: ")
    bench_answer.main([*few, "--runs", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/toy/stage3 is not finished: random weights"
    measured = [line.split("|")[1:-1] for line in lines if line.startswith(("| questions about", "| clips"))]
    assert [int(cells[1]) for cells in measured] == [1, 2, 1, 2, 1, 2]
    assert all(float(cells[4].replace(",", "")) > 0 for cells in measured)


# ---------------------------------------------------------------------------------------------------- in the terminal


def test_a_question_in_the_terminal(runs, model, video, capsys):
    words = ["chat", str(video), "--model", str(runs / "toy" / "stage3"), "--start=1", "--end", "3"]
    assert main([*words, "--question", QUESTION]) == 0
    seen, answer = capsys.readouterr().out.splitlines()
    assert seen == f"{video}: frames at 1.50, 2.50 s"
    assert answer == model.answer(video, QUESTION, 1.0, 3.0)


def test_a_typed_conversation(model, video, capsys, monkeypatch):
    typed = iter([QUESTION, "What is <video>?", "Which object?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    terminal.ask(model, str(video), None, 1.0, 3.0)
    lines = capsys.readouterr().out.splitlines()
    chat = model.chat(video, 1.0, 3.0)
    assert lines[2] == chat.ask(QUESTION)
    assert lines[3].startswith("error: text holds '<video>'")
    assert lines[4] == chat.ask("Which object?")


def test_a_narration_in_the_terminal_and_as_subtitles(runs, video, tmp_path, capsys):
    words = ["describe", str(video), "--model", str(runs / "toy" / "stage3"), "--every=1.5", "--end=3"]
    assert main([*words, f"--out={tmp_path}/out.srt"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("00:00:00.000 - 00:00:01.500  ") and second.startswith("00:00:01.500 - 00:00:03.000  ")
    assert last == f"{tmp_path}/out.srt: 2 subtitles"
    blocks = (tmp_path / "out.srt").read_text().split("\n\n")
    assert blocks[0] == f"1\n00:00:00,000 --> 00:00:01,500\n{first.partition('  ')[2]}"
    assert main([*words, f"--out={tmp_path}/out.txt"]) == 2
    assert "let the name end in .srt or .vtt" in capsys.readouterr().err


def test_subtitles_for_the_web(tmp_path):
    terminal.write_subtitles(tmp_path / "out.vtt", [api.Narration(3661.5, 3662.25, "looks\n\nat --> it")])
    assert (tmp_path / "out.vtt").read_text() == "WEBVTT\n\n1\n01:01:01.500 --> 01:01:02.250\nlooks at -> it\n"
