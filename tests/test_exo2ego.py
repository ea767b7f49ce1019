"""Test the wiring of the shared model's parts."""

import pytest
import tiny
import torch
from torch import nn

from lightning_modules.model.exo2ego import PARTS, Exo2EgoModel

VOCAB = 40
MODULES = ("exo_encoder", "ego_encoder", "ego_to_exo", "exo_to_ego")


def build(parts=PARTS, seed=0, **changes):
    torch.manual_seed(seed)
    model = Exo2EgoModel(tiny.network(**changes), VOCAB, parts).eval()
    tiny.scatter(model)
    return model


@pytest.mark.parametrize("stage", tiny.STAGES.values(), ids=tiny.STAGES)
def test_only_the_parts_of_a_stage_are_built(stage):
    model = build(stage.uses)
    assert set(model.parts) == set(stage.uses)
    assert {name for name in MODULES if hasattr(model, name)} == set(stage.uses) & set(MODULES)
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert bool(adapters) == ("lora" in stage.uses)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_share_nothing_and_leave_nothing_out(tied):
    model = build(tied=tied)
    parts = [id(parameter) for part in PARTS for parameter in model.part(part).values()]
    assert len(parts) == len(set(parts))
    assert set(parts) == {id(parameter) for parameter in model.parameters()}
    heads = [name for name in model.part("language_model") if "lm_head" in name or "embed_tokens" in name]
    assert len(heads) == (1 if tied else 2)


def test_adapters_are_a_part_of_their_own():
    adapted, plain = build(), build([part for part in PARTS if part != "lora"])
    assert adapted.part("language_model").keys() == plain.part("language_model").keys()
    assert {name.rpartition(".")[2] for name in adapted.part("lora")} == {"lora_A", "lora_B"}
    assert not plain.part("lora")


def test_learner_tokens_are_x_then_f_of_x():
    model, video = build(), tiny.video(2, seed=3)
    ego = model.ego_encoder(video)
    x, mapped = model.project(ego), model.project(model.ego_to_exo(ego))
    assert not torch.allclose(x, mapped, atol=1e-3)
    assert torch.equal(model.learner_tokens(video), torch.cat([x, mapped], dim=1))
    for name, expected in (("ego", x), ("mapped", mapped)):
        model.visual_inputs = (name,)
        assert torch.equal(model.learner_tokens(video), expected)


def test_visual_inputs_come_from_the_network():
    both, ego = build(), build(visual_inputs=["ego"])
    video = tiny.video(1, 0)
    assert both.learner_tokens(video).shape[1] == 2 * ego.learner_tokens(video).shape[1]


@pytest.mark.parametrize("names", [[], ["exo"], ["mapped", "ego"], ["ego", "ego"]])
def test_other_visual_inputs_are_refused(names):
    expected = rf"network.visual_inputs: got \[{', '.join(names)}\], allowed: \[ego, mapped\]"
    with pytest.raises(ValueError, match=expected):
        tiny.network(visual_inputs=names)


def test_each_view_has_its_own_encoder():
    model, video = build(), tiny.video(1, seed=0)
    demonstrator, learner = model.demonstrator_tokens(video), model.learner_tokens(video)
    for parameter in model.ego_encoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert torch.equal(model.demonstrator_tokens(video), demonstrator)
    assert not torch.allclose(model.learner_tokens(video), learner, atol=1e-3)


def test_token_count_is_the_projectors():
    model = build()
    count = model.projector.num_tokens(tiny.FRAMES, *model.exo_encoder.grid)
    assert model.demonstrator_tokens(tiny.video(3, 0)).shape == (3, count, model.language_model.dim)
