"""A paired dataset of a user's own, one file outside the packages, from the build command to a training batch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_clip_stream import make_video

import datamodules
from datamodules.clips.dataset import ClipConfig
from datamodules.clips.sampler import BatchRequest
from datamodules.ego_exo_clip.build import SOURCES
from datamodules.ego_exo_clip.datamodule import EgoExoClipDataModule

ROOT = Path(datamodules.__file__).parents[1]
EXAMPLE = Path(__file__).parent / "examples" / "paired_dataset.py"
ROWS = (
    "lesson,seconds,text\nlesson01,0.4,C cracks an egg.\nlesson01,0.8,C whisks the egg.\nlesson02,0.5,C stirs a soup.\n"
)


@pytest.fixture
def lessons(tmp_path):
    """Return the data root of two lessons, of which one has no videos."""
    root = tmp_path / "lessons"
    (root / "lesson01").mkdir(parents=True)
    for name in ("glasses", "left", "right"):
        make_video(root / "lesson01" / f"{name}.mp4", 15)
    (root / "narrations.csv").write_text(ROWS)
    return root


def build(folder, root, *words):
    """Run the command in the user's folder, which holds only the user's file."""
    folder.mkdir()
    shutil.copy(EXAMPLE, folder / "paired_dataset.py")
    command = [sys.executable, "-m", "datamodules.ego_exo_clip.build", "paired_dataset:CookingLessons", str(root)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run([*command, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_file_of_ones_own_becomes_an_index_that_the_datamodule_opens(lessons, toy_tokenizer, tmp_path):
    run = build(tmp_path / "work", lessons, "--probe", "--workers", "1", "--ego", "glasses.mp4")
    assert run.returncode == 0, run.stderr
    table = [line.split() for line in run.stdout.splitlines()]
    assert ["takes", "with", "a", "folder", "of", "videos", "2", "1"] in table
    assert "1 takes, 2 clips, 4 ego-exo pairs; alpha 0.4000 s" in run.stdout
    header = json.loads((lessons / "ego_exo_clip" / "index.json").read_text())
    assert header["source"] == {"name": "Cooking lessons", "split": "train"}

    module = EgoExoClipDataModule(
        index=str(lessons / "ego_exo_clip"),
        views=["ego", "exo"],
        root=str(lessons),
        tokenizer=str(toy_tokenizer),
        clips=ClipConfig(num_frames=2, image_size=16),
        global_batch_size=2,
    )
    module.setup("fit")
    batch = module.train_set.__getitems__(BatchRequest(0, [0, 1], [0, 1], 1))
    assert batch.valid.all()
    assert batch.ego_video.shape == batch.exo_video.shape == (2, 2, 16, 16, 3)
    assert module.train_set.pairs.texts[0] == "Camera-wearer cracks an egg."


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (ROWS, ["--split", "val"], "narrations_val.csv: no such file: put the narrations there"),
        (
            "lesson,seconds,text\nlesson01,soon,C waits.\n",
            [],
            "lesson01, narration 0: seconds is 'soon': give a number",
        ),
    ],
)
def test_its_errors_are_one_line(lessons, tmp_path, content, words, message):
    (lessons / "narrations.csv").write_text(content)
    run = build(tmp_path / "work", lessons, *words)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and message in run.stderr and run.stderr.count("\n") == 1


def test_a_class_that_is_no_source_is_refused():
    command = [sys.executable, "-m", "datamodules.ego_exo_clip.build"]
    for name, message in (
        (
            "nothing",
            f"source: got 'nothing', allowed: {', '.join(SOURCES)}, or module:Class of your own",
        ),
        ("no_such:Thing", "source: got 'no_such:Thing', which cannot be imported"),
        ("os:path", "source: 'os:path' lacks the dataclass field root, description, read: add it"),
    ):
        run = subprocess.run([*command, name, "."], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert message in run.stderr and run.stderr.count("\n") == 1
