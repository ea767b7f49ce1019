"""``make probe``: what y, x and F(x) of a finished stage 2 tell about clips, bars of its KL, norms of its gradients."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch

from lightning_modules.cli import main
from lightning_modules.probe import ridge

TOY = str(tiny.EXPERIMENTS / "toy")


def test_ridge_finds_what_is_linear_and_no_more():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(3).repeat(40)
    noise = torch.randn(120, 200, generator=generator)  # more channels than clips
    signal = noise.clone()
    signal[:, :30] += 3 * torch.nn.functional.one_hot(classes).repeat(1, 10)
    accuracy = [
        float((ridge(x[:90], classes[:90], x[90:]).argmax(1) == classes[90:]).float().mean()) for x in (signal, noise)
    ]
    assert accuracy[0] > 0.9 and accuracy[1] < 0.6


def test_ridge_equals_the_normal_equations_of_the_same_strength():
    generator = torch.Generator().manual_seed(0)
    x, classes = torch.randn(50, 4, generator=generator), torch.arange(2).repeat(25)
    z = (x - x.mean(0)) / x.std(0)
    target = torch.nn.functional.one_hot(classes).double() - 0.5
    z, eigenvalues = z.double(), torch.linalg.eigvalsh((z @ z.T).double())
    scores = ridge(x, classes, x)
    strengths = [eigenvalues.mean() * 10.0**power for power in range(-3, 4)]
    by_hand = [z @ torch.linalg.solve(z.T @ z + s * torch.eye(4, dtype=z.dtype), z.T @ target) + 0.5 for s in strengths]
    assert min(float((scores - other).abs().max()) for other in by_hand) < 1e-4


@pytest.fixture(scope="module")
def runs(toy_runs, tmp_path_factory):
    return shutil.copytree(toy_runs, tmp_path_factory.mktemp("probed") / "runs")


@pytest.fixture(scope="module")
def arguments(runs, toy_world):
    return [*tiny.OVERRIDES, f"data_root={toy_world}", f"runs={runs}", "--samples", "32"]


def test_a_finished_stage_2_is_probed(arguments, runs, capsys):
    assert main(["probe", TOY, "stage2", *arguments]) == 0
    printed = capsys.readouterr().out
    found = json.loads((runs / "toy" / "stage2" / "probe.json").read_text())
    assert list(found["accuracy"]) == ["verb", "object", "colour", "hand"]  # no narration says yes or no
    for name, row in found["accuracy"].items():
        assert f"| {name}" in printed
        assert all(0 <= row[column] <= 1 for column in ("y", "x", "mapped", "most frequent"))
        assert 0 < row["training clips"] <= 32
    kl = found["kl"]["validation"]
    # Two steps leave F near the identity, but on its way to y.
    assert kl["guidance/mapping_change"] < 0.1
    assert 0.8 < kl["guidance/kl"] / kl["guidance/kl_without_mapping"] < 1
    assert 0 < kl["guidance/kl_mean"] < kl["guidance/kl_uniform"] * 1.5
    assert found["kl"]["training"]["other_camera"] > 0
    assert "mean of y at each position" in printed and "another camera" in printed
    assert found["gradients"].keys() == {"vtg", "kl", "cycle"}
    assert found["gradients"]["vtg"]["exo_to_ego"] == 0 < found["gradients"]["cycle"]["exo_to_ego"]
    # The losses of features reach F alone (`detach_input`).
    reached = {name for name, norms in found["gradients"].items() if norms["ego_encoder"] > 0}
    assert reached == {"vtg"} and all(norms["ego_to_exo"] > 0 for norms in found["gradients"].values())


def test_a_stage_without_guidance_or_without_weights_is_refused(arguments, capsys, tmp_path):
    assert main(["probe", TOY, "stage1", *arguments]) == 2
    assert "stage: got stage1, but only guidance has y" in capsys.readouterr().err
    assert main(["probe", TOY, "stage2", *arguments, f"runs={tmp_path}"]) == 2
    assert "No stage2 weights" in capsys.readouterr().err
