"""Test stage weights: exact, complete or absent, with errors that name each tensor that does not fit."""

import copy
import json
import os
import stat
import time

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lightning_modules.model.exo2ego import PARTS, Exo2EgoModel
from lightning_modules.weights import handoff
from lightning_modules.weights.handoff import full_tensors, open_stage_weights, read_manifest, write_stage_weights
from lightning_modules.weights.loading import load_weights, require_fit
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import WeightsError

VOCAB = 40


def build(seed=0, width=tiny.WIDTH, parts=PARTS):
    torch.manual_seed(seed)
    model = Exo2EgoModel(tiny.network(width=width), VOCAB, parts).eval()
    tiny.scatter(model, seed)
    return model


def write(folder, model, parts, manifest):
    """Write parts of a model as a stage does."""
    write_stage_weights(
        folder, ((part, full_tensors(model.part(part))) for part in parts), tiny.network().lora, manifest
    )


def load_part(model, folder, part, source=None):
    """Load a part of a model as a stage does."""
    found = find_weights([f"{folder}:{source or part}"], part, tiny.network())
    require_fit(found, model.part(part))
    load_weights(model, {part: found}, PARTS, torch.float32, torch.device("cpu"))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model():
    return build()


@pytest.fixture
def folder(model, tmp_path):
    """Write stage weights of every part."""
    folder = tmp_path / "toy" / "stage1" / "handoff"
    write(folder, model, PARTS, {"stage": "stage1", "step": 7})
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_every_part_comes_back_bit_equal(model, folder, part):
    other = build(seed=1)
    before = {name: {k: p.clone() for k, p in other.part(name).items()} for name in PARTS}
    load_part(other, folder, part)
    for name in PARTS:
        expected = model.part(name) if name == part else before[name]
        assert expected.keys() == other.part(name).keys()
        assert all(torch.equal(expected[key], value) for key, value in other.part(name).items())
    assert any(not torch.equal(before[part][key], value) for key, value in model.part(part).items())


def test_a_part_can_start_from_another_of_equal_shape(model, folder):
    other = build(seed=1)
    load_part(other, folder, "ego_encoder", source="exo_encoder")
    assert all(torch.equal(value, other.part("ego_encoder")[key]) for key, value in model.part("exo_encoder").items())


def test_manifest_describes_every_tensor(model, folder):
    manifest = read_manifest(folder)
    assert (manifest["format"], manifest["stage"], manifest["step"]) == (1, "stage1", 7)
    assert tuple(manifest["parts"]) == PARTS
    for part in PARTS:
        described = {key: ["float32", list(value.shape)] for key, value in model.part(part).items()}
        assert manifest["parts"][part] == described


def test_nothing_in_it_is_pickled(folder):
    assert {path.suffix for path in files(folder)} == {".json", ".safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["handoff"]


def test_adapter_opens_with_peft(model, folder):
    peft = pytest.importorskip("peft")
    base = build(seed=3, parts=[part for part in PARTS if part != "lora"])
    load_part(base, folder, "language_model")
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        bare = copy.deepcopy(base.language_model.causal_lm)(ids).logits
        adapted = peft.PeftModel.from_pretrained(base.language_model.causal_lm, folder / "adapter").eval()(ids).logits
        expected = model.language_model.causal_lm(ids).logits
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(bare, expected, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_missing_weights_name_the_command_that_writes_it(tmp_path, stage):
    with pytest.raises(WeightsError, match=rf"^No {stage} weights in .*/{stage}/handoff. Run `make {stage}` first.$"):
        read_manifest(tmp_path / stage / "handoff")


def test_missing_part_lists_those_there(model, tmp_path):
    write(tmp_path / "handoff", model, ["projector", "lora"], {"stage": "stage1"})
    with pytest.raises(WeightsError, match=r"no part 'exo_encoder', it has projector, lora"):
        read_manifest(tmp_path / "handoff", "exo_encoder")


def test_other_format_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(
        WeightsError, match=r"manifest.json: field format is 2, this version reads 1. Run `make stage1 FORCE=1`"
    ):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"format": 1}', '{"format": 1, "parts": {"projector": {}}}'])
def test_malformed_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(WeightsError, match=r"manifest.json: .*Run `make stage1 FORCE=1`"):
        read_manifest(folder)


def rewrite(folder, part, change):
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["digest"] = handoff._digest(folder, time.time_ns())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_loaded(folder):
    def change(tensors):
        tensors["readout.9.weight"] = tensors.pop("readout.0.weight")
        tensors["readout.2.bias"] = torch.zeros(5)

    rewrite(folder, "projector", change)
    other = build(seed=1)
    before = {key: value.clone() for key, value in other.part("projector").items()}
    with pytest.raises(WeightsError) as caught:
        load_part(other, folder, "projector")
    message = str(caught.value)
    assert "handoff: does not fit projector of this model" in message
    assert "1 missing (readout.0.weight)" in message
    assert "1 unexpected (readout.9.weight)" in message
    assert "1 mis-shaped (readout.2.bias is [5], expected [32])" in message
    assert "written by stage1" in message and "run `make stage1 FORCE=1`" in message
    assert all(torch.equal(before[key], value) for key, value in other.part("projector").items())


def test_another_model_size_names_a_few_tensors_only(folder):
    with pytest.raises(
        WeightsError, match=r"mis-shaped \((?:[\w.]+ is \[[\d, ]+\], expected \[[\d, ]+\](?:, )?){3}, \.\.\.\)"
    ):
        load_part(build(width=64), folder, "exo_encoder")


@pytest.mark.parametrize("part", ["exo_encoder", "lora"])
@pytest.mark.parametrize("keep", [0, 4, 0.5])
def test_truncated_tensors_are_refused(folder, part, keep):
    file = folder / ("adapter/adapter_model.safetensors" if part == "lora" else f"{part}.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    with pytest.raises(WeightsError, match=rf"^{file}: cannot be read \(.+\). Run `make stage1 FORCE=1`"):
        load_part(build(), folder, part)


def test_removed_file_is_reported(folder):
    (folder / "projector.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"projector.safetensors: no such file. Run `make stage1 FORCE=1`"):
        load_part(build(), folder, "projector")


# ------------------------------------------------------------------------------------------------------------ writing


def test_failed_write_keeps_the_previous_weights(folder, monkeypatch):
    before = files(folder)
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(handoff, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        write(folder, build(seed=2), PARTS, {"stage": "stage1"})
    assert len(calls) == 2
    assert files(folder) == before


def test_first_write_that_fails_leaves_no_weights(model, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handoff, "save_file", failing)
    folder = tmp_path / "stage1" / "handoff"
    with pytest.raises(OSError, match="No space left"):
        write(folder, model, PARTS, {"stage": "stage1"})
    with pytest.raises(WeightsError, match="Run `make stage1` first"):
        read_manifest(folder)


def test_new_weights_replace_all_of_the_previous_ones(folder):
    write(folder, build(seed=2), ["projector"], {"stage": "stage1"})
    assert set(map(str, files(folder))) == {"manifest.json", "projector.safetensors"}
    other = build(seed=5)
    load_part(other, folder, "projector")
    expected = build(seed=2).part("projector")
    assert all(torch.equal(expected[key], value) for key, value in other.part("projector").items())
    assert [path.name for path in folder.parent.iterdir()] == ["handoff"]


def test_files_and_folders_follow_the_umask(model, tmp_path):
    folder = tmp_path / "stage1" / "handoff"
    before = os.umask(0o027)
    try:
        write(folder, model, PARTS, {"stage": "stage1"})
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in modes}


@pytest.mark.parametrize("file", ["exo_encoder.safetensors", "adapter/adapter_model.safetensors"])
def test_a_flipped_bit_is_refused(folder, file):
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)
    part = "lora" if "adapter" in file else "exo_encoder"
    with pytest.raises(WeightsError, match=r"not those that manifest.json describes .* Run `make stage1 FORCE=1`"):
        open_stage_weights(folder, part)
