"""The Makefile runs what is typed, or refuses it. A recorder in place of Python writes down the arguments."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPACED = "with space, comma & quote's"


@pytest.fixture
def checkout(tmp_path):
    """Return a folder with the Makefile, experiments, the generated world's index and a recorder named ``python``."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for stage in ("stage0", "stage1", "stage3"):
        file = tmp_path / "experiments" / "toy" / f"{stage}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for world in ("toy", "fair"):
        index = tmp_path / "data" / world / "ego_exo_clip" / "index.json"
        index.parent.mkdir(parents=True)
        index.touch()
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\n{ printf "%s\\t" "$@"; echo; } >> calls\n')
    recorder.chmod(0o755)
    return tmp_path


@pytest.fixture(autouse=True)
def not_inside_make(monkeypatch):
    """Hide that ``make test`` runs these tests: make hands its options and variables to every make below it."""
    for name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)


def make(checkout, *words, typed=""):
    """Run make and return its status, its output and the arguments of each call of Python."""
    calls = checkout / "calls"
    calls.unlink(missing_ok=True)
    command = ["make", "PYTHON=./python", *words]
    done = subprocess.run(command, cwd=checkout, input=typed, capture_output=True, text=True, check=False)
    lines = calls.read_text().splitlines() if calls.exists() else []
    recorded = [line.rstrip("\t").split("\t") for line in lines]
    return done.returncode, done.stdout + done.stderr, [call for call in recorded if call != [".ci/environment.py"]]


def refused(checkout, *words):
    status, output, calls = make(checkout, *words)
    assert status == 2
    assert calls == []
    return output


def finish(checkout, stage, runs="runs"):
    manifest = checkout / runs / "toy" / stage / "handoff" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    (manifest.parents[1] / "config.yaml").touch()


def test_a_misspelt_variable_is_refused_with_the_nearest_one(checkout):
    assert "EXPERIMNT: `make stage1` reads no such variable, did you mean EXPERIMENT?" in refused(
        checkout, "stage1", "EXPERIMNT=toy_qwen3"
    )
    assert "did you mean ARGS?" in refused(checkout, "stage1", "ARG=trainer.max_steps=3")
    assert "CUDA_VISIBLE_DEVICES=1 make" in refused(checkout, "stage1", "CUDA_VISIBLE_DEVICES=1")


def test_a_variable_that_the_target_does_not_read_is_refused(checkout):
    message = refused(checkout, "stage2", "STAGES=stage1")
    assert "STAGES: `make stage2` reads no such variable, allowed: " in message
    assert "FORCE: `make plan`" in refused(checkout, "plan", "FORCE=1")
    assert make(checkout, "stage3", "evaluate", "STAGES=stage3")[0] == 0  # one of several targets reads it


@pytest.mark.parametrize(("value", "forced"), [("1", True), ("0", False), ("", False)])
def test_force_is_yes_or_no(checkout, value, forced):
    assert ("--force" in make(checkout, "stage2", f"FORCE={value}")[2][0]) is forced


def test_other_words_for_yes_are_refused(checkout):
    assert "FORCE: got yes, allowed: FORCE=1 for yes, FORCE=0 for no" in refused(checkout, "stage2", "FORCE=yes")


def test_the_experiment_is_one_name_or_its_folder(checkout):
    assert 'EXPERIMENT: got "", expected one folder' in refused(checkout, "stage1", "EXPERIMENT=")
    assert 'EXPERIMENT: got "a b", expected one folder' in refused(checkout, "stage1", "EXPERIMENT=a b")
    (call,) = make(checkout, "stage2", "EXPERIMENT=experiments/exo2ego_7b/")[2]
    assert call[2:5] == ["fit", "experiments/exo2ego_7b", "stage2"]


def test_stage0_gets_the_arguments_that_are_its_own(checkout):
    words = "trainer.max_steps=3 model.init_args.a=1 'network.note=two words' data.init_args.b=2 run_dir=x"
    status, output, (first, second) = make(checkout, "stage1", f"ARGS={words}", "FORCE=1")
    assert status == 0 and "No stage 0 in runs/toy: it runs first" in output
    fit = ["-m", "lightning_modules", "fit", "experiments/toy"]
    assert first == [*fit, "stage0", "runs=runs", "trainer.max_steps=3", "network.note=two words"]
    passed = ["trainer.max_steps=3", "model.init_args.a=1", "network.note=two words", "data.init_args.b=2", "run_dir=x"]
    assert second == [*fit, "stage1", "runs=runs", *passed, "--force"]


def test_stage0_gets_overrides_with_dashes_and_no_options(checkout):
    words = "--trainer.max_steps=3 --model.init_args.a=1 --data.init_args.b=2 --run_dir=x --force -v"
    _, _, (first, second) = make(checkout, "stage1", f"ARGS={words}")
    assert first[4:] == ["stage0", "runs=runs", "trainer.max_steps=3"]
    assert second[4:] == ["stage1", "runs=runs", *words.split()]
    assert [call[4] for call in make(checkout, "stage1", "ARGS=--handoffs.stage0=elsewhere")[2]] == ["stage1"]


def test_stage0_runs_only_where_its_weights_are_missing(checkout):
    calls = make(checkout, "stage1", "ARGS=handoffs.stage0=elsewhere")[2]
    assert [call[4] for call in calls] == ["stage1"]
    assert [call[4] for call in make(checkout, "stage1", "EXPERIMENT=exo2ego_7b")[2]] == ["stage1"]
    finish(checkout, "stage0", SPACED)
    assert [call[4] for call in make(checkout, "stage1", f"RUNS={SPACED}", "FORCE=1")[2]] == ["stage1"]


def test_the_folder_of_runs_has_one_name(checkout):
    assert "ARGS: name the folder of the runs as RUNS=folder" in refused(checkout, "stage2", "ARGS=runs=elsewhere")


def path_commands(path):
    """Return, for each target that takes paths, the words to type and the arguments that follow the module."""
    fit = ["lightning_modules", "fit", "experiments/toy"]
    return [
        (["stage2", f"RUNS={path}"], [*fit, "stage2", f"runs={path}"]),
        (["stage4", f"RUNS={path}"], [*fit, "stage4", f"runs={path}"]),
        (
            ["consolidate", "STAGE=stage2", f"RUNS={path}"],
            ["lightning_modules", "consolidate", "experiments/toy", "stage2", f"runs={path}"],
        ),
        (
            ["probe", "STAGE=stage2", f"RUNS={path}"],
            ["lightning_modules", "probe", "experiments/toy", "stage2", f"runs={path}"],
        ),
        (["score", f"RUNS={path}"], ["lightning_modules", "score", f"{path}/toy"]),
        (["evaluate", f"RUNS={path}"], ["lightning_modules", "report", f"{path}/toy"]),
        (["tensorboard", f"RUNS={path}"], ["tensorboard.main", "--logdir", path, "--port", "6006"]),
        (
            ["ablations", f"RUNS={path}"],
            [
                "experiments.ablations",
                "experiments/ablations/sweep.yaml",
                "--out",
                f"{path}/ablations",
                "--results",
                f"{path}/ablations/results",
            ],
        ),
        (["ego-exoclip", f"EGOEXO4D={path}"], ["datamodules.ego_exo_clip.build", "ego-exo4d", path]),
        (
            ["pairs", f"SOURCE={path}/pairs.csv", f"ROOT={path}", f"OUT={path}/out"],
            ["datamodules.ego_exo_clip.build", f"{path}/pairs.csv", path, "--probe", "--out", f"{path}/out"],
        ),
        (
            ["egoit", "SOURCE=egtea", f"ROOT={path}", f"OUT={path}/out"],
            ["datamodules.egoit", "convert", "egtea", "--root", path, "--out", f"{path}/out"],
        ),
        (["data-check", f"ROOT={path}"], ["datamodules.tools.data_check", f"{path}/ego_exo_clip", "--root", path]),
        (
            ["data-check", f"ROOT={path}", "SYNC=1"],
            ["datamodules.tools.sync", f"{path}/ego_exo_clip", "--root", path],
        ),
        (
            ["reencode", f"ROOT={path}", f"INDEX={path}/index", f"OUT={path}/out"],
            ["datamodules.tools.reencode", "--root", path, "--index", f"{path}/index", "--out", f"{path}/out"],
        ),
    ]


@pytest.mark.parametrize("number", range(len(path_commands(""))))
def test_paths_may_have_any_characters(checkout, number):
    words, expected = path_commands(f"/data/{SPACED}")[number]
    status, output, calls = make(checkout, *words)
    assert status == 0, output
    assert calls == [["-m", *expected]]


def test_files_are_words_or_one_path_with_spaces(checkout):
    for name in (SPACED, "a.jsonl", "b.jsonl"):
        (checkout / name).touch()
    for typed, files in ((SPACED, [SPACED]), ("a.jsonl b.jsonl", ["a.jsonl", "b.jsonl"]), ("?.jsonl", None)):
        files = files or ["a.jsonl", "b.jsonl"]
        (export,) = make(checkout, "egoit-export", f"FILES={typed}", "TO=llava", f"OUT={SPACED}")[2]
        assert export == ["-m", "datamodules.tools.export", *files, "--to", "llava", "--out", SPACED]
        (leaks,) = make(checkout, "egoit-leaks", f"FILES={typed}", f"BENCHMARKS={SPACED}")[2]
        assert leaks == ["-m", "datamodules.tools.leaks", *files, "--benchmarks", SPACED]


def test_a_path_may_start_at_the_home_folder(checkout):
    (call,) = make(checkout, "ego-exoclip", "EGOEXO4D=~/egoexo4d")[2]
    assert call[-1] == f"{Path.home()}/egoexo4d"


def test_stages_are_checked_before_the_first_one_runs(checkout):
    assert "error: STAGES: got stge3, expected names of stages" in refused(checkout, "evaluate", "STAGES=stage1 stge3")


def test_all_finished_stages_are_evaluated(checkout):
    for stage in ("stage0", "stage3"):
        finish(checkout, stage, SPACED)
    calls = make(checkout, "evaluate", f"RUNS={SPACED}", "BENCHMARKS=egoschema,vln_qa")[2]
    evaluate = ["-m", "lightning_modules", "evaluate", "experiments/toy"]
    options = [f"runs={SPACED}", "--benchmarks", "egoschema,vln_qa"]
    report = ["-m", "lightning_modules", "report", f"{SPACED}/toy"]
    assert calls == [[*evaluate, "stage0", *options], [*evaluate, "stage3", *options], report]


def test_a_trained_model_is_asked(checkout):
    video = ["VIDEO=" + SPACED, "START=1.5", "END=3"]
    asked = ["-m", "lightning_modules", "chat", SPACED, "--model", "runs/toy/stage3"]
    span = ["--start", "1.5", "--end", "3"]
    assert make(checkout, "chat", *video)[2] == [[*asked, *span]]
    question = "Which one's that?"
    assert make(checkout, "chat", *video, f"QUESTION={question}")[2] == [[*asked, "--question", question, *span]]
    described = make(checkout, "describe", "VIDEO=a.mp4", "EVERY=4", "OUT=a.srt", "MODEL=owner/name")[2]
    assert described == [
        ["-m", "lightning_modules", "describe", "a.mp4", "--model", "owner/name", "--every", "4", "--out", "a.srt"]
    ]
    bench = ["tests/bench/bench_answer.py", "--experiment", "toy", "--runs", SPACED]
    assert make(checkout, "bench-answer", f"RUNS={SPACED}")[2] == [bench]
    (call,) = make(checkout, "bench-answer", f"MODEL={SPACED}", "ARGS=--rows 1 8")[2]
    assert call[5:] == ["--model", SPACED, "--rows", "1", "8"]
    exported = make(checkout, "export", "STAGE=stage3", "OUT=exports/toy", "TO=peft")[2]
    assert exported == [["-m", "lightning_modules", "export", "runs/toy/stage3", "exports/toy", "--to", "peft"]]
    assert "name the video" in refused(checkout, "chat")


def test_any_model_is_evaluated_without_an_experiment(checkout):
    words = ["evaluate", f"MODEL={SPACED}", "BENCHMARKS=egoschema"]
    evaluate = ["-m", "lightning_modules", "evaluate"]
    options = ["--model", SPACED, "--benchmarks", "egoschema", "--out", "runs/evaluated"]
    assert make(checkout, *words)[2] == [[*evaluate, "experiments/data/egobench.yaml", *options]]
    given = [f"DATA={SPACED}.yaml", f"RUNS={SPACED}", "ARGS=trainer.devices=8", "FORCE=1"]
    options[-1:] = [f"{SPACED}/evaluated", "--force"]
    assert make(checkout, *words, *given)[2] == [[*evaluate, f"{SPACED}.yaml", "trainer.devices=8", *options]]
    for other in ("EXPERIMENT=toy", "STAGES=stage3"):
        assert "MODEL: names the model already: leave out EXPERIMENT and STAGES" in refused(checkout, *words, other)
    assert "name the benchmarks: make evaluate MODEL=" in refused(checkout, *words[:2])
    assert "error: DATA: goes with MODEL=folder" in refused(checkout, "evaluate", "DATA=experiments/data/toy.yaml")
    assert "STAGE: `make evaluate` reads no such variable" in refused(checkout, *words, "STAGE=stage3")


def test_a_trained_model_is_served(checkout):
    serve = ["-m", "lightning_modules", "serve"]
    assert make(checkout, "serve")[2] == [[*serve, "runs/toy/stage3", "--port", "8000"]]
    words = [f"MODEL={SPACED}", f"ROOT=/data/{SPACED}", "PORT=9000", "ARGS=--running 4"]
    served = [*serve, SPACED, "--root", f"/data/{SPACED}", "--port", "9000", "--running", "4"]
    assert make(checkout, "serve", *words)[2] == [served]
    assert "error: PORT: got http, expected a number" in refused(checkout, "serve", "PORT=http")


@pytest.mark.parametrize("port", ["", "http", "60 06", "123456"])
def test_the_port_is_a_number(checkout, port):
    assert f"error: PORT: got {port}, expected a number" in refused(checkout, "tensorboard", f"PORT={port}")


def test_clean_keeps_runs(checkout):
    finish(checkout, "stage1")
    cache = checkout / "tests" / "__pycache__"
    for folder in ("datamodules", "lightning_modules", "tests/__pycache__", ".mypy_cache"):
        (checkout / folder).mkdir(parents=True)
    (checkout / "data" / "mine").mkdir()
    for world in re.findall(r"--root data/(\w+)", (ROOT / "Makefile").read_text()):
        (checkout / "data" / world).mkdir(exist_ok=True)
    assert make(checkout, "clean")[0] == 0
    assert not cache.exists() and not (checkout / ".mypy_cache").exists()
    assert [folder.name for folder in (checkout / "data").iterdir()] == ["mine"]
    assert (checkout / "runs" / "toy" / "stage1" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("words", "typed", "removed"),
    [([], "n\n", False), ([], "", False), (["YES=0"], "n\n", False), ([], "y\n", True), (["YES=1"], "", True)],
)
def test_clean_runs_lists_and_asks(checkout, words, typed, removed):
    finish(checkout, "stage1", SPACED)
    other = checkout / SPACED / "notes" / "text"
    other.mkdir(parents=True)
    status, output, _ = make(checkout, "clean-runs", f"RUNS={SPACED}", *words, typed=typed)
    assert f"{SPACED}/toy\n" in output
    assert ("Remove these folders? [y/N]" in output) is ("YES=1" not in words)
    assert (status == 0) is removed
    assert (checkout / SPACED / "toy").exists() is not removed
    assert other.exists()  # holds no run


def test_clean_runs_without_runs(checkout):
    assert make(checkout, "clean-runs")[:2] == (0, "no runs in runs\n")


def test_an_index_of_wheels_is_used_and_remembered(checkout):
    (checkout / ".venv").mkdir()
    (checkout / "pyproject.toml").touch()
    (checkout / "constraints.txt").touch()

    def commands(*words):
        return subprocess.check_output(["make", "-n", "setup", *words], cwd=checkout, text=True)

    plain = commands()
    assert "about 110 packages into .venv: 6 GB" in plain  # how much, before it starts
    assert "index-url" not in plain and "pip install  --constraint constraints.txt --editable" in plain
    typed = commands("TORCH_INDEX=https://wheels/cpu")
    assert "--index-url 'https://wheels/cpu' torch torchvision" in typed
    assert "--extra-index-url 'https://wheels/cpu' --constraint" in typed
    (checkout / ".venv" / "installed").write_text("https://wheels/cpu\n")
    assert "pip" not in commands() and "pip" not in commands("TORCH_INDEX=https://wheels/cpu")
    assert "--index-url 'https://wheels/other'" in commands("TORCH_INDEX=https://wheels/other")


def test_versions_come_from_a_file_of_constraints_or_are_the_newest(checkout):
    for file in ("pyproject.toml", "oldest.txt"):
        (checkout / file).touch()
    for typed, options in (("oldest.txt", "--constraint oldest.txt --editable"), ("", "pip install   --editable")):
        command = ["make", "-n", "setup", f"CONSTRAINTS={typed}"]
        assert options in subprocess.check_output(command, cwd=checkout, text=True)


def test_the_oldest_versions_are_those_that_the_project_accepts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    accepted = [re.match(r"([\w-]+).*?>=([\d.]+)", line) for line in project["dependencies"]]
    floors = {match[1]: match[2] for match in accepted if match}
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text(), re.MULTILINE))
    pinned.pop("torchvision")  # each of its versions needs one version of torch
    assert {name: version.removesuffix(".0") for name, version in pinned.items()} == floors


def test_hooks_check_with_the_pinned_version():
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==([\d.]+)", hooks)) == {pinned}


def test_an_existing_environment_is_used_as_it_is(checkout):
    assert make(checkout, "setup")[2] == []
    assert not (checkout / ".venv").exists()


def test_what_an_existing_environment_lacks_is_named():
    check = ROOT / ".ci" / "environment.py"
    assert subprocess.run([sys.executable, check], check=False).returncode == 0
    bare = subprocess.run([sys.executable, "-S", check], capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert re.fullmatch(r"error: PYTHON: \S+ lacks torch>=.*: install them there, or .*\n", bare.stderr)


def test_only_features_of_make_3_81_are_used():
    makefile = (ROOT / "Makefile").read_text()
    newer = r"^define \w+ *[:?+]?=|^\S+ *(?:::=|!=)|^\.ONESHELL|^undefine|^private|\$\(file |\$\(guile "
    assert not re.search(newer, makefile, re.MULTILINE)


def test_arguments_are_checked_before_a_world_is_generated(checkout):
    (checkout / "data" / "toy" / "ego_exo_clip" / "index.json").unlink()
    (checkout / "python").write_text('#!/bin/sh\n{ printf "%s\\t" "$@"; echo; } >> calls\ntest "$3" != check\n')
    status, _, calls = make(checkout, "stage1", "FORCE=1", "ARGS=trainer.max_step=3 --traceback")
    assert status == 2
    (call,) = calls
    assert call[2:] == [
        "check",
        "experiments/toy",
        "stage1",
        "runs=runs",
        "trainer.max_step=3",
        "--traceback",
        "--force",
    ]
