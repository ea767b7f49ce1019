"""One contract: training, evaluation, the Python API and an exported folder see the same frames, tokens and numbers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from datamodules.batch import VIDEO_TOKEN_ID
from datamodules.clips.dataset import ClipConfig
from datamodules.clips.sampler import BatchRequest
from lightning_modules import Exo2Ego
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.evaluation import trained_run
from lightning_modules.inference import export
from lightning_modules.inference.description import describe
from lightning_modules.inference.export import export_model
from lightning_modules.inference.loading import ModelFiles
from lightning_modules.inference.transformers_code.modeling_exo2ego import Exo2EgoForConditionalGeneration
from lightning_modules.inference.transformers_code.processing_exo2ego import Exo2EgoProcessor
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import open_tensors

ROOT = Path(__file__).parents[1]

PEAK_OF_LOADING = """
import sys
from pathlib import Path
import torch
from lightning_modules.inference.loading import build_model, open_model

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

before, files = peak(), open_model(sys.argv[1])
model = build_model(files, torch.device("cpu"), torch.float32)
size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
print(size, peak() - before)
"""


@pytest.fixture(scope="module")
def run(noisy_runs, toy_runs):
    """Return the run of stage 3 as ``make evaluate`` builds it, with its training data."""
    folder = noisy_runs / "toy" / "stage3"
    run, _ = trained_run(compose(toy_runs / "toy" / "stage3" / "config.yaml", None, [f"run_dir={folder}"]))
    run.stage.configure_model()
    run.stage.eval()
    run.datamodule.setup("fit")
    return run


@pytest.fixture(scope="module")
def model(noisy_runs):
    return Exo2Ego.from_pretrained(noisy_runs / "toy" / "stage3")


@pytest.fixture(scope="module")
def exported(noisy_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "toy"
    assert main(["export", str(noisy_runs / "toy" / "stage3"), str(out)]) == 0
    return out


def next_logits(model, video, question, start, end):
    """Return the next-token logits after a question, float [V]."""
    prompt = model.encoder.prompt(question)
    with model._prefix([prompt], video, start, end, None) as prefix, torch.no_grad():
        after = prompt.input_ids[prompt.input_ids.index(VIDEO_TOKEN_ID) + 1 :]
        return prefix.next_logits([tuple(after)])[0]


@torch.no_grad()
def test_training_and_answering_see_the_same(run, model):
    data = run.datamodule.train_set
    for index in (0, len(data) // 2, len(data) - 1):
        batch = data.__getitems__(BatchRequest(0, [index], [index], 1))
        (path,) = (span := data.span(index, 0)).paths.values()
        end = None if math.isinf(span.end_s) else span.end_s
        clip = model.look(path, span.start_s, end)
        assert torch.equal(clip.frames, batch.ego_video[0])
        question = data.turns(index, 0)[0][0]
        first_label = int((batch.text.labels[0] >= 0).nonzero()[0])
        assert model.encoder.prompt(question).input_ids == batch.text.input_ids[0, :first_label].tolist()
        visual = run.stage.model.learner_tokens(batch.ego_video)
        assert torch.equal(model.visual_tokens(clip.frames), visual[0])
        logits, _ = run.stage.read_text(visual, batch)
        torch.testing.assert_close(
            next_logits(model, path, question, span.start_s, end), logits[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("merge", [True, False])
def test_an_export_is_read_by_this_repository(noisy_runs, model, exported, toy_world, tmp_path, merge):
    folder = exported
    if not merge:
        folder = tmp_path / "unmerged"
        export_model(noisy_runs / "toy" / "stage3", folder, merge=False)
    names = load_file(folder / "model.safetensors")
    assert any(name.endswith(".lora_A") for name in names) is not merge
    loaded = Exo2Ego.from_pretrained(folder)
    video = sorted((toy_world / "takes").rglob("aria*_214-1.mp4"))[0]
    mine, theirs = (next_logits(each, video, "Describe the video.", 1.0, 3.0) for each in (loaded, model))
    torch.testing.assert_close(mine, theirs, atol=1e-4 if merge else 0, rtol=1e-4 if merge else 0)
    question = ["Describe the video.", "Which object?"]
    assert loaded.answer(video, question, 1.0, 3.0, 24) == model.answer(video, question, 1.0, 3.0, 24)


def test_given_answers_are_scored_as_by_choose(exported, noisy_runs, toy_world):
    """By the classes whose copies lie in the folder."""
    video, question = sorted((toy_world / "takes").rglob("aria*_214-1.mp4"))[0], "Describe the video."
    model = Exo2Ego.from_pretrained(exported)
    greedy = model.answer(video, question, 1.0, 3.0, max_new_tokens=3)
    options = [greedy, "the red ball", "Camera-wearer moves the blue cup."]
    expected = model.choose(video, question, options, 1.0, 3.0)
    loaded = Exo2EgoForConditionalGeneration.from_pretrained(exported)
    processor = Exo2EgoProcessor.from_pretrained(exported)
    content = [{"type": "video", "path": str(video), "start": 1.0, "end": 3.0}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    answers = [tuple(tokens) for tokens in processor.encode_answers(question, options)]
    log_p, is_greedy = loaded.log_likelihoods(inputs["input_ids"], inputs["pixel_values_videos"], answers)
    means = log_p / torch.tensor([len(tokens) for tokens in answers])
    torch.testing.assert_close(means.softmax(0).tolist(), list(expected.values()), atol=1e-6, rtol=1e-5)
    # Of an answer and its beginnings, all but an end that comes too early are greedy.
    beginnings = [answers[0][:count] for count in (1, 2, 3)]
    _, is_greedy = loaded.log_likelihoods(inputs["input_ids"], inputs["pixel_values_videos"], [*beginnings, answers[1]])
    assert is_greedy.tolist() == [True, True, True, False]


def test_a_stage_can_start_from_an_export(exported, model):
    found = find_weights([str(exported)], "ego_encoder", model.description.network)
    expected = model.model.part("ego_encoder")
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in found.tensors.items())


def test_the_model_card_and_the_provenance(exported, noisy_runs):
    card = (exported / "README.md").read_text()
    metrics = json.loads((noisy_runs / "toy" / "stage3" / "metrics.json").read_text())
    assert f"On {metrics['clips']} validation clips" in card
    assert f"| ego_choice | {metrics['metrics']['ego_choice']:.4f} | 0.2500 |" in card
    provenance = json.loads((exported / "config.json").read_text())["provenance"]
    assert (provenance["stage"], provenance["step"]) == ("stage3", 2)
    assert not any(str(noisy_runs) in file.read_text() for file in exported.glob("*.json"))


def test_an_existing_folder_is_kept(exported, noisy_runs, capsys):
    before = sorted(exported.iterdir())
    assert main(["export", str(noisy_runs / "toy" / "stage3"), str(exported)]) == 2
    assert "exists: remove it, or name another folder" in capsys.readouterr().err
    assert sorted(exported.iterdir()) == before


@pytest.mark.parametrize(
    ("stage", "to"), [("stage3", "hf"), ("stage3", "peft"), ("stage3", "vllm"), ("stage1", "videollama2")]
)
def test_all_files_of_an_export_have_the_same_mode(noisy_runs, tmp_path, stage, to):
    export_model(noisy_runs / "toy" / stage, tmp_path / "out", to)
    assert len({file.stat().st_mode for file in (tmp_path / "out").rglob("*") if file.is_file()}) == 1


@torch.no_grad()
def test_adapters_open_with_peft_alone(noisy_runs, model, tmp_path):
    peft = pytest.importorskip("peft")
    export_model(noisy_runs / "toy" / "stage3", tmp_path / "adapter", "peft")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(1, 13).view(2, 6)
    expected = model.model.language_model.causal_lm(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
def test_a_demonstrator_is_read_back_from_the_form_of_videollama2(noisy_runs, tmp_path, stage):
    export_model(noisy_runs / "toy" / stage, tmp_path / "out", "videollama2")
    loaded = Exo2Ego.from_pretrained(noisy_runs / "toy" / stage)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["model_type"], settings["mm_projector_type"]) == ("videollama2_mistral", "stc_connector_v35")
    for part in ("exo_encoder", "projector", "language_model"):
        found = find_weights([str(tmp_path / "out")], part, loaded.description.network)
        expected = loaded.model.part(part)
        assert found.tensors.keys() == expected.keys()
        assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in found.tensors.items())


@pytest.mark.parametrize(
    ("stage", "to", "message"),
    [("stage0", "peft", "this stage has no adapters: name stage3"), ("stage3", "videollama2", "name stage0 or stage1")],
)
def test_forms_that_do_not_fit_are_refused(noisy_runs, tmp_path, stage, to, message):
    with pytest.raises(ValueError, match=message):
        export_model(noisy_runs / "toy" / stage, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_the_vision_parts_by_themselves_are_no_model(noisy_runs, tmp_path):
    export_model(noisy_runs / "toy" / "stage3", tmp_path / "out", "vllm")
    with pytest.raises(ValueError, match="holds the vision parts of an export for vLLM alone: export the model with"):
        Exo2Ego.from_pretrained(tmp_path / "out" / "vision")
    assert not list((tmp_path / "out" / "language_model").glob("*.py"))


def test_no_file_stays_mapped_after_its_tensors_were_read(exported, tmp_path):
    file = Path(shutil.copy(exported / "model.safetensors", tmp_path))  # other tests read the exported one
    values = [tensor.read().clone() for tensor in open_tensors(file, "").values()]
    assert values
    assert str(file) not in Path("/proc/self/maps").read_text()


@pytest.mark.slow
def test_loading_holds_the_model_and_at_most_one_shard_more(noisy_runs, tmp_path, monkeypatch):
    network = tiny.network()
    network.language_model.overrides |= {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12}
    parts = ("ego_encoder", "projector", "ego_to_exo", "language_model", "lora")
    described = describe(network, 74, parts, ClipConfig(tiny.FRAMES, tiny.SIZE))
    tokenizer = noisy_runs / "toy" / "stage3" / "handoff" / "tokenizer"
    files = ModelFiles("large", described, {}, str(tokenizer), {})
    monkeypatch.setattr(export, "_SHARD", "100MB")
    export._write_transformers(tmp_path, Exo2EgoModel(described.network, 74, parts), files, merge=False)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_LOADING, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    size, rise = map(float, done.stdout.split())
    print(f"model {size:.0f} MiB, peak of loading {rise:.0f} MiB")
    assert size > 500 and rise < size + 100
