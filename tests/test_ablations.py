"""Plans of runs, how they are carried out and resumed, and the numbers of tables and figures."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import yaml

from experiments.ablations import __main__ as ablations
from experiments.ablations import figures, results, runner
from experiments.ablations.__main__ import main
from experiments.ablations.plan import Regime, Sweep, all_jobs, read_plan
from experiments.ablations.results import collect, estimate, markdown, read_scores
from experiments.ablations.runner import RunsFailed, carry_out, is_finished
from lightning_modules.config import ConfigError, compose
from lightning_modules.model.mapping import FeatureMapping, MapperConfig

FOLDER = tiny.EXPERIMENTS / "ablations"
SWEEP = FOLDER / "sweep.yaml"
PLANS = {"full": read_plan(SWEEP), "quick": read_plan(SWEEP, quick=True)}


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_sweep_amounts_to_runs_of_its_own(plan):
    waves = all_jobs(SWEEP, plan, range(2), Path("out"))
    assert [{job.stage for job in wave} for wave in waves] == [{"stage0"}, {"stage1"}, {"stage2"}, {"stage3"}]
    assert [len(wave) for wave in waves[:2]] == [1 if stage in plan.once else 2 for stage in ("stage0", "stage1")]
    folders = [job.folder for wave in waves for job in wave]
    assert len(set(folders)) == len(folders)
    assert {job.variant for wave in waves[2:] for job in wave} <= plan.variants.keys()


def test_fewer_seeds_of_a_variant_or_a_regime(tmp_path):
    plan = PLANS["full"]
    assert plan.seeds_of("few", "e_full", range(3, 8)) == range(3, 8)
    assert plan.seeds_of("few", "e_blocks", range(3, 8)) == plan.seeds_of("all", "e_full", range(3, 8)) == range(3, 6)
    assert plan.seeds_of("few", "e_blocks", range(2)) == range(2)
    few = {"few": Regime("Few", stage2=(plan.control, "e_full", "e_blocks"), seeds=2)}
    variants = plan.variants | {"e_blocks": replace(plan.variants["e_blocks"], seeds=1)}
    stage2 = all_jobs(SWEEP, replace(plan, regimes=few, variants=variants, view_probe=None), range(3), tmp_path)[2]
    seeds = {variant: [job.seed for job in stage2 if job.variant == variant] for variant in few["few"].stage2}
    assert seeds == {plan.control: [0, 1], "e_full": [0, 1], "e_blocks": [0]}


def test_every_variant_is_in_a_regime():
    plan = PLANS["full"]
    run = {name for regime in plan.regimes.values() for name in (*regime.stage2, *regime.stage3)} | {plan.view_probe}
    assert run == plan.variants.keys()


VARIANTS = list(PLANS["full"].variants)
SAME = ("seed_everything", "clips", "data_root", "tokenizer", "start")


BEGUN_BY = {  # stage 3 alone, from another variant's stage 2
    "e_without_lora": "e_full",
    "e_few_instructions": "e_full",
    "b_few_instructions": "b_mapping_alone",
}


def variant_config(name, stage):
    shared = [f"handoffs.{earlier}=runs/toy_fair/{earlier}/handoff" for earlier in ("stage0", "stage1")]
    given = [f"experiment=ablations/{name}", *shared, *PLANS["full"].overrides_of(name, stage)]
    return compose(tiny.EXPERIMENTS / "toy_fair", stage, given)


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_variants_differ_in_their_overrides_alone(stage):
    reference = compose(tiny.EXPERIMENTS / "toy_fair", stage)
    for name in VARIANTS:
        config = variant_config(name, stage)
        second = BEGUN_BY.get(name, name)
        assert config["handoffs"]["stage2"] == f"runs/ablations/{second}/stage2/handoff"
        for key in SAME:
            assert config[key] == reference[key], (name, key)
        optim, expected = (c["model"]["init_args"]["optim"] for c in (config, reference))
        if name.endswith("slow_encoder") and stage == "stage2":
            expected = expected | {"lr_mult": expected["lr_mult"] | {"ego_encoder": 0.1}}
        assert optim == expected
        if name not in ("a_more_steps", "b_more_steps", "ego_preparation"):
            assert config["trainer"]["max_steps"] == reference["trainer"]["max_steps"]


@pytest.mark.parametrize("name", [name for name in VARIANTS if re.match("[b-e]_", name)])
def test_the_control_and_all_against_it_train_the_same_parts_of_the_learner(name):
    """G, which only cycle consistency can train, is no part of the learner."""
    learner = {"ego_encoder", "projector", "ego_to_exo"}
    init = variant_config(name, "stage2")["model"]["init_args"]
    trained = set(init.get("train", tiny.STAGES["stage2"].trains))
    assert trained == (learner | {"exo_to_ego"} if init.get("cycle", {}).get("weight", 1.0) else learner)


def test_the_attention_mapper_is_as_large_as_the_nine_blocks():
    sizes = []
    for name in ("e_blocks", "e_attention_mapper"):
        network = variant_config(name, "stage2")["network"]
        mapping = FeatureMapping(network["encoder"]["width"], MapperConfig(**network["mapper"]))
        sizes.append(sum(parameter.numel() for parameter in mapping.parameters()))
    assert sizes == [179_552, 178_992]


def test_the_full_method_is_that_of_toy_fair():
    assert not PLANS["full"].overrides_of("e_full", "stage2") + PLANS["full"].overrides_of("e_full", "stage3")


def test_a_seed_reaches_order_dropout_and_narrated_takes_but_not_stage_0(tmp_path):
    waves = all_jobs(SWEEP, PLANS["quick"], (3, 4), tmp_path)
    (stage0,) = waves[0]
    assert (stage0.seed, stage0.folder) == (3, tmp_path / "prepared" / "seed3" / "toy_fair" / "stage0")
    for wave in waves[1:]:
        for job in wave:
            config = job.config
            assert config["seed_everything"] == config["model"]["init_args"]["seed"] == job.seed
            assert config["data"]["init_args"]["seed"] == job.seed
            assert config["handoffs"]["stage0"] == f"{stage0.folder}/handoff"
            if job.stage != "stage1":
                made = tmp_path / "prepared" / f"seed{job.seed}" / "toy_fair" / "stage1"
                assert config["handoffs"]["stage1"] == f"{made}/handoff"
            if job.stage == "stage3":
                second = BEGUN_BY.get(job.variant, job.variant)
                made = tmp_path / job.group / f"seed{job.seed}" / "ablations" / second / "stage2"
                assert config["handoffs"]["stage2"] == f"{made}/handoff"


def test_regimes_set_what_their_titles_say(tmp_path):
    plan = PLANS["full"]
    given = {
        job.group: job.config["data"]["init_args"].get("narration", {})
        for job in all_jobs(SWEEP, plan, [0], tmp_path)[2]
        if job.variant == plan.control
    }
    assert given["all"] == {}
    ratios = {name: given[name].get("unnarrated_ratio") for name in ("few", "copied", "x0", "x3")}
    assert ratios == {"few": None, "copied": None, "x0": 0, "x3": 3}
    assert {of["ego_text_fraction"] for name, of in given.items() if name != "all"} == {0.09}
    assert round(0.09 * 330) == 30


def test_a_regime_reaches_both_stages_or_stage_2_alone(tmp_path):
    file = write_plan(tmp_path, GOOD)
    few = {"title": "", "overrides": ["x=1", "y=1"], "stage2_overrides": ["y=2"], "stage2": ["b"], "stage3": ["b"]}
    file.write_text(yaml.safe_dump(GOOD | {"regimes": {"few": few}}))
    (tmp_path / "toy" / "experiment.yaml").write_text("run_dir: ${runs}/${stage}\nnetwork: {}")
    waves = all_jobs(file, read_plan(file), [0], tmp_path, ["x=0", "z=0"])
    found = [{key: wave[0].config.get(key) for key in "xyz"} for wave in waves]
    shared = {"x": 0, "y": None, "z": 0}
    assert found == [shared, shared, {"x": 1, "y": 2, "z": 0}, {"x": 1, "y": 1, "z": 0}]


GOOD = {
    "prepare": "toy",
    "control": "b",
    "variants": {"b": {"title": "B"}, "e": {"title": "E", "extends": "b", "stage2": ["v=1"]}},
    "regimes": {"few": {"title": "Few", "stage2": ["b", "e"]}},
}


def write_plan(folder, content):
    (folder / "toy").mkdir()
    (folder / "toy" / "experiment.yaml").write_text("experiment: toy")
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    return folder / "plan.yaml"


def test_a_plan_is_read(tmp_path):
    plan = read_plan(write_plan(tmp_path, GOOD | {"sweep": {"title": "x", "variants": ["e"], "points": {1: "few"}}}))
    assert plan.regimes == {"few": Regime("Few", stage2=("b", "e"))}
    assert plan.sweep == Sweep("x", ("e",), {1: "few"})
    assert plan.name("e") == "E" and plan.name("toy") == "toy"


def test_overrides_of_a_variant_follow_those_that_it_extends(tmp_path):
    variants = {
        "b": {"title": "B", "overrides": ["a=1"], "stage2": ["b=1"], "stage3": ["c=1"]},
        "e": {"title": "E", "extends": "b", "overrides": ["d=1"], "stage2": ["e=1"]},
    }
    plan = read_plan(write_plan(tmp_path, GOOD | {"variants": variants}))
    assert plan.overrides_of("e", "stage2") == ["a=1", "b=1", "d=1", "e=1"]
    assert plan.overrides_of("e", "stage3") == ["a=1", "c=1", "d=1"]


def test_quick_replaces_keys(tmp_path):
    few = {"few": {"title": "Quick", "stage2": ["b"]}}
    file = write_plan(tmp_path, GOOD | {"seeds": 5, "quick": {"seeds": 1, "regimes": few}})
    assert (read_plan(file).seeds, read_plan(file).regimes["few"].title) == (5, "Few")
    quick = read_plan(file, quick=True)
    assert (quick.seeds, quick.regimes["few"].title, quick.control) == (1, "Quick", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prepare": "nothing"}, "no experiment nothing"),
        (
            {"control": "e", "regimes": {"few": {"title": "", "stage2": ["b"]}}},
            "regimes.few.stage2 lacks the control e",
        ),
        (
            {"regimes": {"few": {"title": "", "stage2": ["b"], "stage3": ["e"]}}},
            "regimes.few.stage3 lacks the control b",
        ),
        ({"sweep": {"title": "", "variants": ["e"], "points": {0: "many"}}}, "sweep.points: no regime many"),
        (
            {"sweep": {"title": "", "variants": ["toy"], "points": {0: "few"}}},
            "regimes.few.stage2 lacks toy of the sweep",
        ),
        ({"regimes": {"few": {"title": "", "stage2": ["b", "x"]}}}, "no variant x"),
        (
            {"variants": {"a": {"title": "", "extends": "b"}, "b": {"title": ""}, "e": {"title": ""}}},
            "variants.a.extends: b must come before it",
        ),
        (
            {"variants": {"b": {"title": "", "seeds": 1}, "e": {"title": ""}}},
            "variants.b.seeds: the control runs with all seeds",
        ),
        ({"unknown": 1}, "unexpected keyword argument 'unknown'"),
        ({"regimes": {"few": {"stage2": ["b"]}}}, "missing 1 required positional argument: 'title'"),
    ],
)
def test_wrong_plans_are_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_plan(write_plan(tmp_path, GOOD | change))
    assert "\n" not in str(caught.value)


def test_a_missing_plan_is_one_error(tmp_path, capsys):
    assert main([str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/no.yaml: no such file\n"


# ------------------------------------------------------------------------------------------------------------- running


class Recorded:
    """Replace the processes: write the files that `fit` leaves, except for runs that are to fail."""

    def __init__(self, jobs, failing=()):
        self.by_words = {job.words: job for job in jobs}
        self.failing, self.called = set(failing), []

    def __call__(self, command, **_):
        job = self.by_words[tuple(command[4:])]
        assert command[1:4] == ["-m", "lightning_modules", "fit"]
        self.called.append(job.name)
        if job.name not in self.failing:
            finish(job)
        (job.folder / "checkpoints").mkdir(exist_ok=True)
        status = int(job.name in self.failing)
        return type("Process", (), {"wait": lambda self: status, "terminate": lambda self: None})()


def finish(job):
    sources = (job.config["model"]["init_args"].get("init") or {}).items()
    started_from = {part: str(Path(source.split(":")[0]).parent) for part, source in sources if source}
    manifest = {"format": 1, "stage": job.stage, "parts": {}, "digest": str(job.folder), "started_from": started_from}
    (job.folder / "handoff").mkdir(parents=True, exist_ok=True)
    (job.folder / "handoff" / "manifest.json").write_text(json.dumps(manifest))
    (job.folder / "metrics.json").write_text("{}")
    (job.folder / "config.yaml").write_text(yaml.safe_dump(job.config))


@pytest.fixture(scope="module")
def composed():
    return all_jobs(SWEEP, PLANS["quick"], (0, 1), Path("/OUT"))


@pytest.fixture
def waves(composed, tmp_path):
    """The quick plan's runs, below a folder of the test's own."""

    def moved(value):
        return json.loads(json.dumps(value).replace("/OUT/", f"{tmp_path}/out/"))

    return [
        [replace(job, words=tuple(moved(job.words)), config=moved(job.config)) for job in wave] for wave in composed
    ]


def test_runs_wait_for_what_they_need_and_finished_ones_are_skipped(waves, tmp_path, monkeypatch):
    jobs = [job for wave in waves for job in wave]
    recorded = Recorded(jobs)
    monkeypatch.setattr(runner.subprocess, "Popen", recorded)
    finish(waves[2][0])
    carry_out(waves, tmp_path / "out", parallel=3, threads=1)
    stages = [re.search(r"stage\d", name).group() for name in recorded.called]
    assert stages == sorted(stages)
    assert set(recorded.called) == {job.name for job in jobs} - {waves[2][0].name}
    assert len(recorded.called) == len(jobs) - 1
    assert all(is_finished(job) for job in jobs)
    lines = [json.loads(line) for line in (tmp_path / "out" / "seconds.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == set(recorded.called) and {line["status"] for line in lines} == {0}
    carry_out(waves, tmp_path / "out", parallel=3, threads=1)
    assert len(recorded.called) == len(jobs) - 1


def test_only_some_rows_are_run(waves, tmp_path, monkeypatch):
    recorded = Recorded([job for wave in waves for job in wave])
    monkeypatch.setattr(runner.subprocess, "Popen", recorded)
    monkeypatch.setattr(ablations, "all_jobs", lambda *_: waves)
    monkeypatch.setattr(ablations, "write_results", lambda plan, jobs, folder, missing: f"{len(missing)} missing")
    words = [str(SWEEP), "--quick", "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert main([*words, "--only", "few/e_full", "x0/b_*"]) == 0
    run = {name.rsplit("/", 1)[0] for name in recorded.called}
    rows = {"few/e_full/stage2", "few/e_full/stage3", "x0/b_mapping_alone/stage2"}
    assert run == {"prepared/toy_fair/stage0", "prepared/toy_fair/stage1", *rows}


def test_what_is_not_whole_or_of_another_configuration_is_not_finished(waves):
    job = waves[2][0]
    assert not is_finished(job)
    finish(job)
    assert is_finished(job)
    (job.folder / "metrics.json").unlink()
    assert not is_finished(job)
    finish(job)
    (job.folder / "config.yaml").write_text(yaml.safe_dump(job.config | {"egobench": {"benchmarks": []}}))
    assert is_finished(job)  # a run is not scored on benchmarks
    (job.folder / "config.yaml").write_text(yaml.safe_dump(job.config | {"threads": 7}))
    assert not is_finished(job)


def test_a_run_that_started_from_other_stage_weights_is_not_finished(waves):
    """When stage 1 is trained again, its old runs of stage 2 must not be shown as if they came from it."""
    stage1 = next(job for job in waves[1] if job.seed == 0)
    runs = [next(job for job in waves[2] if (job.group, job.seed) == ("few", seed)) for seed in (0, 1)]
    for job in (*waves[0], *waves[1], *runs):
        finish(job)
    assert all(is_finished(job) for job in runs)
    manifest = stage1.folder / "handoff" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"digest": "another"}))
    assert [is_finished(job) for job in runs] == [False, True]


def test_answers_of_an_earlier_training_do_not_finish_a_run(waves):
    job = waves[2][0]
    finish(job)
    later = time.time_ns() + 1_000_000_000
    os.utime(job.folder / "handoff" / "manifest.json", ns=(later, later))
    assert not is_finished(job)
    os.utime(job.folder / "metrics.json", ns=(later, later))
    assert is_finished(job)


def test_a_failed_run_stops_nothing_else_and_is_named_at_the_end(waves, tmp_path, monkeypatch):
    jobs, failing = [job for wave in waves for job in wave], waves[2][1]
    recorded = Recorded(jobs, [failing.name])
    monkeypatch.setattr(runner.subprocess, "Popen", recorded)
    with pytest.raises(RunsFailed, match=rf"1 runs did not finish: {failing.name} \({failing.folder}/log.txt\)"):
        carry_out(waves, tmp_path / "out", parallel=1, threads=1)
    assert all(is_finished(job) == (job is not failing) for job in jobs)
    assert [job for job in waves[2] if (job.folder / "checkpoints").exists()] == [failing]
    recorded.failing.clear()
    carry_out(waves, tmp_path / "out", parallel=1, threads=1)
    assert recorded.called.count(failing.name) == 2 and len(recorded.called) == len(jobs) + 1


def test_tables_of_what_is_finished_say_what_is_not(waves, content, tmp_path):
    jobs = [job for wave in waves for job in wave]
    late = [job for job in jobs if (job.variant, job.stage) == ("e_full", "stage2") and job.seed == 1]
    late += [job for job in jobs if (job.group, job.variant, job.seed) == ("x0", "b_mapping_alone", 0)]
    late += [job for job in jobs if job.group in ("views", "prepared")]
    done = [job for job in jobs if job not in late]
    text = results.write_results(PLANS["quick"], done, tmp_path, [job.name for job in late])
    assert f"{len(late)} runs are not finished and in no number: {late[0].name}, " in text
    kept = json.loads((tmp_path / "results.json").read_text())
    (one,) = [
        row
        for row in kept["effects"]
        if (row["regime"], row["variant"], row["stage"]) == ("few", "e_full", "stage2") and row.items() >= WHOLE.items()
    ]
    both = entry(content, "effects", regime="few", variant="e_full", stage="stage2", score="ego_choice", **WHOLE)
    assert one["ego_choice"] == pytest.approx([both["by_seed"][0], None], abs=1e-4)
    by_run = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {(r["variant"], r["seed"]) for r in by_run if r["regime"] == "few"} >= {
        ("e_full", 0),
        ("b_mapping_alone", 1),
    }
    assert ("few", "e_full", "stage2", 1) not in {(r["regime"], r["variant"], r["stage"], r["seed"]) for r in by_run}
    assert not [e for e in kept["effects"] if (e["regime"], e["variant"]) == ("x0", "e_full")]  # no common seed
    assert "(of 1)" in text and kept["views"] == []
    with pytest.raises(ValueError, match="none of 7 runs is finished: run `make ablations` first"):
        results.write_results(PLANS["quick"], [], tmp_path, ["a"] * 7)


def test_tables_without_the_control_have_no_differences(waves, content, tmp_path):
    jobs = [job for wave in waves for job in wave if (job.variant, job.stage) == ("e_full", "stage2")]
    text = results.write_results(PLANS["quick"], jobs, tmp_path, [])
    assert "E = recommended" in text and "Minus" not in text


# ------------------------------------------------------------------------------------------------------------- numbers


def test_the_interval_by_hand():
    """1, 2, 6: mean 3, deviation sqrt(7), t(2) = 4.303."""
    found = estimate([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3))
    assert not found.excludes_zero
    assert estimate([1.0, 1.1, 0.9]).excludes_zero and estimate([-1.0, -1.1, -0.9]).excludes_zero
    assert estimate([5.0]) == results.Estimate(5.0, None) and not estimate([5.0]).excludes_zero
    assert estimate([2.0, 2.0]) == results.Estimate(2.0, 0.0)


def test_quantiles_of_students_t():
    """By integrating the density."""
    for freedom, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert results.T_975[freedom - 1] == quantile
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        steps = 20_000
        width = quantile / steps
        inside = sum((1 + ((i + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps)) * width
        assert 0.5 + scale * inside == pytest.approx(0.975, abs=2e-5)
    assert len(results.T_975) == 30 and results.T_975 == sorted(results.T_975, reverse=True)


def answers(folder, visible, hidden, view="ego"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(True, score) for score in visible] + [(False, score) for score in hidden]
    lines = [{"view": view, "ego_visible": v, "scores": {"choice": s, "caption": 0, "loss": 2 - s}} for v, s in rows]
    with (folder / "predictions.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def compared(folder, visible, hidden):
    """Write answers that are right from x where those from all inputs are, and wrong from F(x)."""
    rows = [(True, score) for score in visible] + [(False, score) for score in hidden]
    lines = [
        {"ego_visible": v, "task": "choice", "right": {"x": bool(s), "mapped": False, "both": bool(s)}} for v, s in rows
    ]
    (folder / "consistency.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_answers_from_one_input_alone(tmp_path):
    answers(tmp_path, [1, 0], [1])
    right = [
        ("choice", {"x": True, "mapped": False, "both": True}),
        ("qa_verb", {"x": True, "mapped": True, "both": True}),
        ("qa_hand", {"y": True, "x": False, "mapped": True, "both": True}),
    ]
    lines = [json.dumps({"ego_visible": True, "task": task, "right": of}) for task, of in right]
    (tmp_path / "consistency.jsonl").write_text("\n".join(lines))
    found = read_scores(tmp_path)
    assert found["x"]["all"] == {"ego_choice": 1, "ego_qa_verb": 1, "ego_qa_hand": 0, "ego_qa": 0.5}
    assert found["mapped"]["seen"] == {"ego_choice": 0, "ego_qa_verb": 1, "ego_qa_hand": 1, "ego_qa": 1}
    assert found["x"]["hidden"] == {} and set(found) == {"whole", "x", "mapped"}
    # A stage that reads x alone has no other inputs to compare with.
    (tmp_path / "consistency.jsonl").write_text(
        json.dumps({"ego_visible": True, "task": "choice", "right": {"y": True, "x": True}})
    )
    assert set(read_scores(tmp_path)) == {"whole"}


def test_clips_that_the_glasses_do_not_see_are_apart(tmp_path):
    answers(tmp_path, [1, 1, 0], [0])
    answers(tmp_path, [1], [0], view="exo")
    scores = read_scores(tmp_path)["whole"]
    assert scores["all"]["ego_choice"] == 0.5 and scores["all"]["exo_choice"] == 0.5
    assert scores["seen"]["ego_choice"] == pytest.approx(2 / 3) and scores["hidden"]["ego_choice"] == 0.0
    assert scores["hidden"]["ego_loss"] == 2.0


RIGHT = {  # variant to right answers of four that the glasses see, by seed
    "a_ego_only": (1, 1),
    "b_mapping_alone": (1, 3),
    "e_full": (2, 4),
    "e_without_lora": (2, 3),
    "d_kl": (0, 4),
    "toy_fair": (2, 2),
    "ego_preparation": (1, 0),
}


METRICS = {"val/ego_choice": 0.5, "guidance/mapping_change": 0.25, "guidance/kl": 0.1, "guidance/kl_mean": 0.3}


@pytest.fixture
def content(waves, monkeypatch):
    parts = {"ego_encoder": {"weight": ["float32", [3, 5]]}, "lora": {"a": ["float32", [7]]}}
    monkeypatch.setattr(
        results,
        "read_manifest",
        lambda folder: {
            "parts": parts,
            "code_version": "later" if "seed1" in str(folder) else "first",
            "metrics": METRICS if "e_full/stage2" in str(folder) else {},
        },
    )
    for job in (job for wave in waves for job in wave):
        right = RIGHT[job.variant][job.seed]
        answers(job.folder, [1] * right + [0] * (4 - right), [0, 1])
        if job.group == "prepared":
            answers(job.folder, [1, 1, 1, 0], [1, 0], view="exo")
        elif job.variant != "a_ego_only":
            compared(job.folder, [1] * right + [0] * (4 - right), [0, 1])
    return collect(PLANS["quick"], [job for wave in waves for job in wave])


WHOLE = {"reads": "whole", "clips": "all"}


def entry(content, kind, **where):
    (found,) = [e for e in content[kind] if all(e[key] == value for key, value in where.items())]
    return found


def test_effects_are_differences_within_seeds(content):
    where = {"regime": "few", "stage": "stage2", "reads": "whole", "score": "ego_choice"}
    full = entry(content, "effects", variant="e_full", clips="seen", **where)
    assert full["by_seed"] == [0.25, 0.25] and (full["mean"], full["half"]) == (0.25, 0.0)
    alone = entry(content, "effects", variant="a_ego_only", clips="seen", **where)
    assert alone["by_seed"] == [0.0, -0.5]
    assert alone["mean"] == -0.25 and alone["half"] == pytest.approx(12.706 * 0.25)
    assert entry(content, "effects", variant="e_full", clips="hidden", **where)["by_seed"] == [0.0, 0.0]
    assert entry(content, "effects", variant="e_full", clips="all", **where)["by_seed"] == pytest.approx([1 / 6, 1 / 6])
    loss = entry(content, "effects", variant="e_full", clips="seen", **(where | {"score": "ego_loss"}))
    assert loss["by_seed"] == [-0.25, -0.25]
    mapped = entry(content, "effects", variant="e_full", clips="seen", **(where | {"reads": "mapped"}))
    assert mapped["by_seed"] == [0.0, 0.0]
    assert not [e for e in content["effects"] if e["variant"] == content["control"] or e["regime"] == "views"]
    control = entry(content, "means", variant="b_mapping_alone", clips="seen", **where)
    assert control["by_seed"] == [0.25, 0.75] and control["mean"] == 0.5


def test_the_advantage_of_the_exocentric_views_by_hand(content):
    seen = entry(content, "views", clips="seen", score="choice")
    assert seen["by_seed"] == [0.75 - 0.25, 0.75 - 0.0]
    assert {e["score"] for e in content["views"]} == {"choice", "caption", "loss"}


def test_numbers_survive_json(content):
    read = json.loads(json.dumps(content))
    assert read["effects"] == content["effects"] and markdown(read) == markdown(content)
    (run,) = [
        r for r in content["runs"] if (r["variant"], r["regime"], r["seed"], r["reads"]) == ("e_full", "x0", 1, "x")
    ]
    assert run["trained"] == 3 * 5 + 7 and run["clips"]["seen"]["ego_choice"] == 1.0


def test_a_part_at_rate_0_does_not_count_as_trained(waves, monkeypatch):
    parts = {"projector": {"weight": ["float32", [3, 5]]}, "ego_to_exo": {"weight": ["float32", [7]]}}
    monkeypatch.setattr(results, "read_manifest", lambda folder: {"parts": parts, "code_version": "first"})
    job = waves[2][0]
    assert results._trained(job) == 3 * 5 + 7
    job.config["model"]["init_args"]["optim"]["lr_mult"] = {"ego_to_exo": 10.0, "projector": 0.0}
    assert results._trained(job) == 7


def cells(text, title, *first):
    """Return the cells of the row that begins with ``first``, in the table below ``title``."""
    table = text.split(f"{title}\n", 1)[1].lstrip("\n").split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (row,) = [row for row in rows if tuple(row[: len(first)]) == first]
    return row


def test_tables(content):
    text = markdown(content)
    assert set(content["code_versions"]) == {"first", "later"} and text.startswith(
        f"Code first ({content['code_versions']['first']} runs), later ({content['code_versions']['later']} runs). "
    )
    few = text.split("## Some takes narrated\n", 1)[1].split("## Some takes narrated, and no other")[0]
    stage2, stage3 = few.split("### stage2\n", 1)[1].split("### stage3\n")
    a, b, e = (content["names"][name] for name in ("a_ego_only", "b_mapping_alone", "e_full"))
    mean = cells(few, "### stage2", b, "all clips")
    assert mean[2] == "22" and "50.0 ± 211.8" in mean  # 2 of 6 and 4 of 6 right, t(1) = 12.706
    maps = cells(stage2, "below both bars.", e)
    assert maps[1:] == ["25.0", "0.100", "", "0.300", ""]
    difference = cells(stage2, f"Minus {b}:", e, "all clips")
    assert "**+16.7 ± 0.0**" in difference
    assert "-25.0 ± 105.9" not in difference and "-16.7 ± 211.8" in cells(stage2, f"Minus {b}:", a, "all clips")
    assert "+0.0 ± 0.0" in cells(stage2, f"Minus {b}:", e, "clips whose action they do not see")
    assert "+0.0 ± 0.0" in cells(stage2, f"Minus {b}:", e, "F(x) alone, all clips")
    with pytest.raises(ValueError, match="not enough values"):
        cells(stage2, f"Minus {b}:", a, "F(x) alone, all clips")
    assert cells(stage3, f"Minus {b}:", "E without LoRA", "all clips")
    assert "95 %" in text
    by_stage = cells(stage3, "### Stage by stage", e, "four-way choice")
    assert by_stage[2] == "50.0 (of 1)" and by_stage[3] == "50.0 ± 0.0" and by_stage[4] == by_stage[5] == "66.7 ± 211.8"
    sweep = text.split("## Takes without narration for each narrated one\n", 1)[1]
    assert [line.split("|")[1].strip() for line in sweep.splitlines() if line.startswith("| ")][1:] == ["0", "2"] * 2
    advantage = cells(text, "## How much better informed the exocentric cameras are", "four-way choice")
    assert advantage[2].startswith("+62.5 ±")


def test_without_matplotlib_there_are_tables_and_a_word_about_it(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "matplotlib", None)
    assert figures.draw(content, tmp_path) == []
    assert capsys.readouterr().out == "no figures: matplotlib is missing, pip install '.[dev]'\n"


class Panels:
    """Replaces a figure, and keeps the calls that draw into each of its panels."""

    def __init__(self, **_):
        self.panels = np.empty(0)

    def subplots(self, rows, columns, **_):
        self.panels = np.array([[Mock() for _ in range(columns)] for _ in range(rows)])
        return self.panels


def bars(panel):
    """(place, mean, half) of each bar, or line of bars."""
    return [(call.args[1], call.args[0], call.kwargs.get("xerr")) for call in panel.errorbar.call_args_list]


def test_what_is_drawn(content, monkeypatch):
    monkeypatch.setattr(figures, "Figure", Panels, raising=False)
    effects = figures._effects(content).panels
    assert effects.shape == (2, 2)  # regimes, headline scores
    where = {"regime": "few", "stage": "stage2", "reads": "whole", "clips": "all", "score": "ego_choice"}
    found = [entry(content, "effects", variant=variant, **where) for variant in ("a_ego_only", "e_full")]
    assert bars(effects[0, 0]) == [(i, 100 * e["mean"], 100 * e["half"]) for i, e in enumerate(found)]
    stages = figures._stages(content).panels
    assert stages.shape == (1, 2)  # one regime goes as far as stage 3
    lines = {call.kwargs["label"]: call.args for call in stages[0, 0].errorbar.call_args_list}
    assert lines[content["names"]["e_full"]][0] == ["stage0", "stage1", "stage2", "stage3"]
    assert lines[content["names"]["e_full"]][1] == pytest.approx([50.0, 50.0, 200 / 3, 200 / 3])
    assert lines[content["names"]["e_without_lora"]][0] == ["stage0", "stage1", "stage3"]
    sweep = figures._sweep(json.loads(json.dumps(content))).panels
    (line,) = sweep[0, 0].errorbar.call_args_list
    assert line.args == ([0, 1], pytest.approx([100 / 6, 100 / 6]))
    assert sweep[1, 0].set_xticks.call_args.args == ([0, 1], ["0", "2"])


def test_figures_show_the_numbers(content, tmp_path):
    pytest.importorskip("matplotlib")
    files = figures.draw(content, tmp_path)
    assert [file.name for file in files] == ["effects.svg", "stages.svg", "sweep.svg"]
    panel = figures._effects(content).axes[0]
    assert [text.get_text() for text in panel.get_yticklabels()] == [
        content["names"][v] for v in ("a_ego_only", "e_full")
    ]
    (lower, upper) = panel.collections[0].get_segments()[0][:, 0]
    effect = entry(
        content,
        "effects",
        regime="few",
        stage="stage2",
        reads="whole",
        clips="all",
        variant="a_ego_only",
        score="ego_choice",
    )
    assert (lower + upper) / 2 == pytest.approx(100 * effect["mean"])
    assert (upper - lower) / 2 == pytest.approx(100 * effect["half"])


# ---------------------------------------------------------------------------------------------------------- whole plan


def command(world, tmp_path, *more):
    given = [f"data_root={world}", *tiny.OVERRIDES[1:]]
    words = [str(SWEEP), "--quick", *given, "--seeds", "2", "--jobs", "2"]
    return [*words, "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), *more]


def test_runs_are_listed_without_being_made(toy_world, tmp_path, capsys):
    assert main(command(toy_world, tmp_path, "--dry-run")) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "few/e_full/stage3/seed1" in listed and "prepared/toy_fair/stage0/seed0" in listed
    assert len(listed) == len(set(listed)) == 1 + 2 + 2 * (1 + 3 + 2) + 2 * 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_quick_plan_stopped_and_called_again(toy_world, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(tiny.EXPERIMENTS.parent)}
    words = [sys.executable, "-m", "experiments.ablations", *command(toy_world, tmp_path)]
    process = subprocess.Popen(words, env=environment, cwd=tmp_path)
    seconds = tmp_path / "out" / "seconds.jsonl"
    deadline = time.monotonic() + 300
    while not seconds.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("metrics.json")}
    assert finished and not (tmp_path / "results").exists()
    assert subprocess.run(words, env=environment, cwd=tmp_path, check=False).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    content = json.loads((tmp_path / "results" / "results.json").read_text())
    by_run = (tmp_path / "results" / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["seed"] for line in by_run} == {0, 1}
    assert content["effects"] and "Minus" in (tmp_path / "results" / "results.md").read_text()
    before = seconds.read_text()
    assert subprocess.run(words, env=environment, cwd=tmp_path, check=False).returncode == 0
    assert seconds.read_text() == before
