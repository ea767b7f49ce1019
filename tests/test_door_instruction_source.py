"""An instruction source of one's own: the example file, converted by the command and read by the datamodule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules import ClipConfig, InstructionDataModule

EXAMPLES = Path(__file__).with_name("examples")
ROWS = [
    "video,start,end,question,answer,wrong,split",
    "soup,1.0,3.5,What do I cut?,a carrot,,train",
    "soup,4.0,6.0,Where is the pot?,on the stove,in the sink|on the shelf,train",
    "soup,7.0,9.0,What do I stir?,the soup,,val",
]


def convert(root, *options):
    """Run the command that ``make egoit SOURCE=instruction_source:CookingQuestions ROOT=root`` runs."""
    command = [sys.executable, "-m", "datamodules.egoit", "convert", "instruction_source:CookingQuestions"]
    python_path = os.pathsep.join([str(EXAMPLES.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, "--root", str(root), *options],
        cwd=EXAMPLES,  # a source is imported from the working directory
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def root(tmp_path):
    (tmp_path / "questions.csv").write_text("\n".join(ROWS) + "\n")
    return tmp_path


def test_the_example_is_converted_and_its_questions_are_rendered(root, toy_tokenizer):
    out = root / "cooking.jsonl"
    done = convert(root, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"2 records written to {out}" in done.stdout
    assert "warning: cooking: 1 of 4 rows are missing" in done.stderr

    data = InstructionDataModule(
        [str(out)],
        instruction_style="base",
        root=str(root),
        tokenizer=str(toy_tokenizer),
        clips=ClipConfig(2, 64),
        global_batch_size=2,
    )
    samples = data.read()
    assert [samples.name(index) for index in range(2)] == ["cooking/000000", "cooking/000001"]
    span = samples.span(1, 0)
    assert (span.paths["ego"], span.start_s, span.end_s) == (root / "cooking/soup.mp4", 4.0, 6.0)
    ((question, answer),) = samples.turns(0, 0)
    assert question.endswith("What do I cut?") and answer == "A carrot."
    ((question, answer),) = samples.turns(1, 0)
    assert "Where is the pot?" in question and f"\n{answer}" in question
    assert answer.endswith(") on the stove")
    assert len({samples.turns(0, epoch)[0][0] for epoch in range(20)}) > 3  # every epoch draws a template


def test_options_are_fields_and_invalid_rows_are_named(root):
    done = convert(root, "--splits", "train", "val", "--out", str(root / "all.jsonl"))
    assert "3 records written to" in done.stdout
    with (root / "questions.csv").open("a") as file:
        file.write("soup,9.0,8.0,What now?,nothing,,train\n")
    done = convert(root, "--out", str(root / "none.jsonl"))
    assert done.returncode == 2
    assert f"error: {root / 'questions.csv'} line 5: from 9.0 to 8.0 s: correct the times" in done.stderr
    assert not (root / "none.jsonl").exists()
