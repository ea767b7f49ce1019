"""Egocentric tasks of lmms-eval with files of their form, in an environment that has lmms-eval.

Each task is the official one, its functions included; only its dataset is replaced by a local file about videos of the
generated world.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_contract import LMMS_EVAL, ROOT, Walk

from lightning_modules import Exo2Ego
from lightning_modules.inference.export import export_model

pytestmark = pytest.mark.slow

OPTIONS = ["the red ball", "the blue cup", "the box", "the ring"]
LETTERS = "ABCD"
LOCAL = """
include: {official}/{file}
task: local_{task}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {docs}}}}}
"""
OFFICIAL = {
    "egotempo": ("egotempo/egotempo.yaml", "test"),
    "egoplan": ("egoplan/egoplan.yaml", "validation"),
    "egotaskqa": ("egotaskqa/egotaskqa.yaml", "test"),
    "egoschema_subset": ("egoschema/egoschema_subset.yaml", "test"),
    "egoschema_subset_mcppl": ("egoschema/egoschema_subset_mcppl.yaml", "test"),
    "hd_epic_how": ("hd_epic/fine_grained/hd_epic_fine_grained_how_recognition.yaml", "test"),
}


def documents(uid):
    """Return a row of each task's file; the videos are copies of one."""
    lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, OPTIONS, strict=True)]
    choices = {f"choice_{letter.lower()}": option for letter, option in zip(LETTERS, OPTIONS, strict=True)}
    schema = {"video_idx": uid, "question": "What is used?", "option": [*lettered, "E. none"], "answer": "1"}
    return {
        "egotempo": {
            "video": f"{uid}_1_3",
            "question": "What colour is it?",
            "answer": "red",
            "question_type": "colour",
        },
        "egoplan": {
            "sample_id": uid,
            "task_goal": "use the cup",
            "answer": OPTIONS[1],
            "golden_choice_idx": "B",
            **choices,
        },
        "egotaskqa": {
            "video_path": f"{uid}.mp4",
            "q": "What is used?",
            "option": dict(zip(LETTERS, OPTIONS, strict=True)),
            "a": "B",
        },
        "egoschema_subset": schema,
        "egoschema_subset_mcppl": schema,
        "hd_epic_how": {
            "question_id": "how_1",
            "task_type": "fine_grained_how_recognition",
            "question": "How is it moved?",
            "choices": OPTIONS,
            "correct_idx": 1,
            "video_ids": [f"P01-{uid}"],
            "input_labels": ["video 1"],
            "start_times": [-1.0],
            "end_times": [-1.0],
        },
    }


@pytest.fixture(scope="module")
def answered(noisy_runs, toy_world, tmp_path_factory):
    """Run all tasks once; return their samples by task, the model, and the video."""
    python = os.environ.get(LMMS_EVAL)
    if python is None:
        pytest.skip(f"{LMMS_EVAL} does not name the python of an environment with lmms-eval")
    tmp, uid = tmp_path_factory.mktemp("lmms_eval"), "clip"
    export_model(noisy_runs / "toy" / "stage3", tmp / "exported", merge=False)
    video = next((toy_world / "practice").iterdir())
    for place in (f"videos/{uid}", f"hub/egoplan/{uid}", f"hub/egoschema/videos/{uid}", f"videos/P01/P01-{uid}"):
        (tmp / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, tmp / f"{place}.mp4")
    (official,) = Path(python).absolute().parent.parent.glob("lib/python3*/site-packages/lmms_eval/tasks")
    (tmp / "tasks").mkdir()
    for task, document in documents(uid).items():
        docs = tmp / "tasks" / f"{task}.jsonl"
        docs.write_text(json.dumps(document) + "\n")
        file, split = OFFICIAL[task]
        content = LOCAL.format(official=official, file=file, task=task, split=split, docs=docs)
        (tmp / "tasks" / f"{task}.yaml").write_text(content)
    Walk.write_entry_point(tmp / "site")
    folders = ("EGOTEMPO_VIDEO_DIR", "EGOTASKQA_VIDEO_DIR", "HD_EPIC_VIDEO_DIR")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp / "site"), str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    environment |= {name: str(tmp / "videos") for name in folders} | {"HF_HOME": str(tmp / "hub")}
    words = ["--model", "exo2ego", "--model_args", f"pretrained={tmp / 'exported'}", "--device", "cpu", "--log_samples"]
    words += ["--tasks", ",".join(f"local_{task}" for task in OFFICIAL), "--include_path", str(tmp / "tasks")]
    done = subprocess.run(
        [python, "-m", "lmms_eval", *words, "--output_path", str(tmp / "out")],
        cwd=tmp,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for task in OFFICIAL:
        (file,) = (tmp / "out").rglob(f"*samples_local_{task}.jsonl")
        (samples[task],) = (json.loads(line) for line in file.read_text().splitlines())
    return samples, Exo2Ego.from_pretrained(noisy_runs / "toy" / "stage3"), video


@pytest.mark.parametrize("task", [task for task in OFFICIAL if not task.endswith("mcppl")])
def test_answers_are_those_of_the_model(answered, task):
    samples, model, video = answered
    sample = samples[task]
    limit = {"egotempo": 64, "egoplan": 4096, "egotaskqa": 128, "egoschema_subset": 16, "hd_epic_how": 10}[task]
    span = (1.0, 3.0) if task == "egotempo" else (0.0, None)
    expected = model.answer(video, sample["input"], *span, max_new_tokens=limit)
    (given,) = sample["filtered_resps"] if isinstance(sample["filtered_resps"], list) else [sample["filtered_resps"]]
    assert given == expected
    assert task != "egotempo" or given != model.answer(video, sample["input"], max_new_tokens=limit), "of its span"


def test_options_are_scored(answered):
    samples, _, _ = answered
    losses = [float(loss) for loss, _ in samples["egoschema_subset_mcppl"]["filtered_resps"]]
    assert len(losses) == 5 and len(set(losses)) > 1
