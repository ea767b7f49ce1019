"""Benchmarks of models that need no experiment: exported folders, runs, and checkpoints of VideoLLaMA2."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from lightning_modules import Exo2Ego
from lightning_modules.cli import main
from lightning_modules.egobench.results import read_scores
from lightning_modules.inference.export import export_model
from lightning_modules.inference.loading import open_model
from lightning_modules.model.projector import STCConnector
from lightning_modules.weights.tensors import WeightsError

NAMES = "vlnqa,qaego4d_open"
DATA = str(tiny.EXPERIMENTS / "data" / "toy.yaml")


@pytest.fixture(scope="module")
def runs(noisy_runs, tmp_path_factory):
    """Return a copy of the runs, since evaluation writes to them."""
    return shutil.copytree(noisy_runs, tmp_path_factory.mktemp("evaluated") / "runs")


@pytest.fixture(scope="module")
def staged(runs):
    """Return the scores of stages by the command that evaluates stages, and their rows."""
    found = {}
    for stage in ("stage0", "stage3"):
        run = runs / "toy" / stage
        assert main(["evaluate", str(run / "config.yaml"), f"run_dir={run}", "--benchmarks", NAMES]) == 0
        found[stage] = results(run)
    return found


def results(run):
    rows = {file.name: file.read_text() for file in sorted((run / "egobench" / "predictions").glob("*.jsonl"))}
    assert len(rows) == 2
    return read_scores(run / "egobench"), rows


def evaluate(model, toy_world, out, *options):
    keys = [f"data_root={toy_world}", "data.init_args.num_workers=0"]
    words = ["--model", str(model), "--benchmarks", NAMES, f"--out={out}"]
    return main(["evaluate", DATA, *keys, *words, *options])


def test_an_export_a_run_and_its_stage_weights_have_the_scores_of_the_stage(
    staged, runs, toy_world, tmp_path, monkeypatch, capsys
):
    run = runs / "toy" / "stage3"
    export_model(run, tmp_path / "exports" / "unmerged", merge=False)
    for model, name in ((tmp_path / "exports" / "unmerged", "exports_unmerged"), (run, "toy_stage3")):
        assert evaluate(model, toy_world, tmp_path / "out") == 0
        assert results(tmp_path / "out" / name) == staged["stage3"]
    assert any(score.value > 0 for score in staged["stage3"][0])
    header = capsys.readouterr().out.split("| benchmark")[-1].splitlines()[0]
    assert "exports_unmerged" in header and "toy_stage3" in header  # models next to each other
    # Stage weights by themselves are the same model, whose answers are there already.
    answers = tmp_path / "out" / "toy_stage3" / "egobench" / "predictions" / "vlnqa.jsonl"
    before = answers.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert evaluate(run / "handoff", toy_world, "out") == 0
    assert answers.read_text() == staged["stage3"][1]["vlnqa.jsonl"] and answers.stat().st_mtime_ns >= before


def test_merged_adapters_give_the_same_scores(staged, runs, toy_world, tmp_path):
    export_model(runs / "toy" / "stage3", tmp_path / "exports" / "toy")
    assert evaluate(tmp_path / "exports" / "toy", toy_world, tmp_path) == 0
    scores, rows = results(tmp_path / "exports_toy")
    assert scores == staged["stage3"][0]
    lines = [each["vlnqa.jsonl"].splitlines() for each in (rows, staged["stage3"][1])]
    for ours, theirs in zip(*lines, strict=True):
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(torch.tensor(ours["letters"]), torch.tensor(theirs["letters"]), atol=1e-4, rtol=1e-4)


def test_a_folder_in_the_form_of_videollama2_has_the_scores_of_the_stage(staged, runs, toy_world, tmp_path):
    export_model(runs / "toy" / "stage0", tmp_path / "weights" / "demonstrator", "videollama2")
    assert evaluate(tmp_path / "weights" / "demonstrator", toy_world, tmp_path) == 0
    assert results(tmp_path / "weights_demonstrator") == staged["stage0"]


@pytest.fixture
def released(runs, tmp_path):
    """Write a tiny checkpoint with the keys of the released ones: whole tower, and nothing of this repository."""
    folder = tmp_path / "DAMO-NLP-SG" / "VideoLLaMA2-7B"
    export_model(runs / "toy" / "stage0", folder, "videollama2")
    settings = json.loads((folder / "config.json").read_text())
    described = settings.pop("exo2ego")
    shape = described["network"]["encoder"]
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=1,
            image_size=shape["image_size"],
            patch_size=shape["patch_size"],
        )
    )
    loaded = Exo2Ego.from_pretrained(folder)
    tensors = {name: tensor.detach() for name, tensor in loaded.model.part("language_model").items()}
    depth = described["network"]["projector"]["depth"]
    projector = STCConnector(64, loaded.model.language_model.dim, depth, padding=0)
    tensors |= {f"model.mm_projector.{name}": value.detach() for name, value in projector.named_parameters()}
    for name, value in tower.state_dict().items():
        if "position_ids" not in name:
            name = f"vision_model.{name.removeprefix('vision_model.')}"
            tensors[f"model.vision_tower.vision_tower.{name}"] = value.contiguous()
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings |= {"mm_projector_type": "stc_connector_v35", "rope_theta": 1e6, "torch_dtype": "bfloat16"}
    for name in ("rope_parameters", "dtype"):
        settings.pop(name, None)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_released_checkpoint_is_answered_with_its_own_shapes(released, toy_world, tmp_path):
    description = open_model(released).description
    encoder = description.network.encoder
    assert (encoder.width, encoder.layers, encoder.heads, encoder.mlp_ratio) == (64, 3, 1, 2.0)
    assert (description.dtype, description.clips.num_frames, description.clips.frame_fit) == ("bfloat16", 2, "pad")
    assert (description.network.projector.padding, description.network.projector.mlp_depth) == (0, 2)
    model = Exo2Ego.from_pretrained(released)
    assert model.model.language_model.causal_lm.config.rope_parameters["rope_theta"] == 1e6
    assert evaluate(released, toy_world, tmp_path / "runs") == 0
    scores, rows = results(tmp_path / "runs" / "DAMO-NLP-SG_VideoLLaMA2-7B")
    assert {score.metric for score in scores} >= {"accuracy", "accuracy_likelihood"}
    # Its tokenizer has a chat template; the form of VideoLLaMA2's first release is other text.
    system = "data.init_args.prompt={style: mistral_sys, system: Answer.}"
    assert evaluate(released, toy_world, tmp_path / "runs", system) == 2
    assert evaluate(released, toy_world, tmp_path / "runs", system, "--force") == 0
    assert results(tmp_path / "runs" / "DAMO-NLP-SG_VideoLLaMA2-7B")[1] != rows


def test_a_checkpoint_without_tower_is_refused(released):
    tensors = Exo2Ego.from_pretrained(released).model.part("language_model")
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    save_file(tensors, released / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"holds no vision tower .*, so it cannot answer alone. Name a checkpoint"):
        open_model(released)


def test_mistakes_are_one_line_before_any_work(runs, toy_world, tmp_path, capsys):
    def refused(*words):
        assert main(["evaluate", *map(str, words)]) == 2
        return capsys.readouterr().err

    run = runs / "toy" / "stage3"
    assert "--benchmarks: a model without an experiment answers benchmarks only" in refused(DATA, "--model", run)
    folder = tiny.EXPERIMENTS / "toy"
    assert "is a folder: name a file with the key egobench" in refused(folder, "--model", run, "--benchmarks=all")
    cpu = tiny.EXPERIMENTS / "hardware" / "cpu.yaml"
    assert "key egobench.benchmarks is missing" in refused(cpu, "--model", run, "--benchmarks=all")
    here = [f"data_root={toy_world}", f"--out={tmp_path}", "--benchmarks=all"]
    assert "nowhere: no such folder" in refused(DATA, "--model", tmp_path / "nowhere", *here)
    message = refused(DATA, "--model", run, "egobench.cyclc=true", *here)
    assert "egobench.cyclc: no such key in egobench" in message
    assert "egobnch: no such key" in refused(DATA, "--model", run, "egobnch.cyclic=true", *here)
    assert "benchmark egschema: not in egobench.benchmarks" in refused(
        DATA, "--model", run, *here[:2], "--benchmarks=egschema"
    )
    assert list(tmp_path.iterdir()) == []
