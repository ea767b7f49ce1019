"""Each stage trains the right parts, steps as configured, and resumes to the same weights as an uninterrupted run."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from datamodules import ClipConfig, InstructionDataModule
from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch, TextBatch
from datamodules.text import TextEncoder
from lightning_modules import OptimConfig
from lightning_modules.callbacks.checkpoint import (
    CheckpointError,
    CheckpointFolders,
    Checkpoints,
    newest,
    stored_tensors,
)
from lightning_modules.callbacks.dropout_seed import DropoutSeed
from lightning_modules.callbacks.finite_check import FiniteCheck
from lightning_modules.callbacks.handoff import StageHandoff
from lightning_modules.callbacks.run_report import RunReport
from lightning_modules.callbacks.throughput import TrainingMonitor
from lightning_modules.losses import Knowledge, NextTokens, contrastive_loss, cross_view_attention
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.model.language_model import LanguageModelConfig
from lightning_modules.stages.checks import check_stage
from lightning_modules.stages.guidance import ContrastiveConfig, CycleConfig, KLConfig, SelectionConfig
from lightning_modules.validation.evaluator import QAEvaluator
from lightning_modules.weights.handoff import full_tensors, open_stage_weights, write_stage_weights
from lightning_modules.weights.resolve import FoundWeights
from lightning_modules.weights.tensors import WeightsError


def trainer(max_steps, callbacks=(), **options):
    return L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=False,
        plugins=[CheckpointFolders()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(stage, steps=1, callbacks=(), **options):
    run = trainer(steps, callbacks, **options)
    batches = [tiny.clip_batch(seed) for seed in range(steps)]
    run.fit(stage, DataLoader(batches, batch_size=None))
    assert run.global_step == steps
    return run


def values(stage):
    return {
        part: {name: parameter.detach().clone() for name, parameter in stage.model.part(part).items()}
        for part in stage.model.parts
    }


def moved(before, after):
    return {
        part for part in before if any(not torch.equal(before[part][name], after[part][name]) for name in before[part])
    }


# ------------------------------------------------------------------------------------------------------ what trains


TRAINED = [
    ("stage0", None, {"exo_encoder", "projector", "language_model"}),
    ("stage1", None, {"exo_encoder", "projector"}),
    ("stage1", ["exo_encoder"], {"exo_encoder"}),
    ("stage2", None, {"ego_encoder", "projector", "ego_to_exo", "exo_to_ego"}),
    ("stage2", ["ego_to_exo"], {"ego_to_exo"}),
    ("stage3", None, {"ego_encoder", "projector", "ego_to_exo", "lora"}),
    ("stage3", ["lora"], {"lora"}),
]


@pytest.mark.parametrize(("name", "train", "expected"), TRAINED)
def test_one_step_moves_exactly_what_trains(toy_tokenizer, name, train, expected):
    stage = tiny.make_stage(name, toy_tokenizer, train=train)
    stage.configure_model()
    tiny.scatter(stage.model)
    before = values(stage)
    gradients = {}

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for part in pl_module.model.parts:
                gradients[part] = [p.grad is not None for p in pl_module.model.part(part).values()]

    fit(stage, callbacks=[Gradients()])
    assert moved(before, values(stage)) == expected
    assert {part for part, has in gradients.items() if all(has)} == expected
    assert {part for part, has in gradients.items() if not any(has)} == set(stage.uses) - expected


@pytest.mark.parametrize("name", tiny.STAGES)
def test_frozen_parts_stay_in_evaluation_mode(toy_tokenizer, name):
    stage = tiny.make_stage(name, toy_tokenizer)
    stage.configure_model()
    for change in (stage.train, stage.eval, stage.train):  # as around validation
        change()
    training = {part for part in set(stage.uses) - {"lora"} if stage.model.get_submodule(part).training}
    trained = {"language_model" if part == "lora" else part for part in stage.trains}
    assert training == trained
    assert all(
        module.training == (part in trained)
        for part in training
        for module in stage.model.get_submodule(part).modules()
    )


def test_parts_a_stage_has_not_are_refused(toy_tokenizer):
    for key, value in (("train", ["lora"]), ("init", {"lora": "somewhere"})):
        with pytest.raises(
            ValueError, match=rf"model.{key}: got lora, allowed: exo_encoder, projector, language_model"
        ):
            tiny.make_stage("stage1", toy_tokenizer, **{key: value})


def test_adapters_change_nothing_before_training(toy_tokenizer):
    stage = tiny.make_stage("stage3", toy_tokenizer)
    stage.configure_model()
    parts = [part for part in stage.uses if part != "lora"]
    plain = Exo2EgoModel(stage.network, len(stage.tokenizer), parts)
    for part in parts:
        for name, parameter in plain.part(part).items():
            parameter.data.copy_(stage.model.part(part)[name])
    stage.eval(), plain.eval()
    batch = tiny.clip_batch()
    visual = stage(batch.ego_video, "ego")
    assert torch.equal(visual, plain.learner_tokens(batch.ego_video))
    logits, _ = stage.read_text(visual, batch)
    adapted = stage.evaluator
    stage.model = plain
    assert torch.equal(stage.read_text(visual, batch)[0], logits)
    bare = QAEvaluator(plain, stage.tokenizer, stage.views)
    assert bare.generate(batch.text, visual) == adapted.generate(batch.text, visual)
    assert bare.score(batch.text, visual) == adapted.score(batch.text, visual)


def test_validation_may_have_choices_alone(toy_tokenizer):
    stage = tiny.make_stage("stage3", toy_tokenizer)
    stage.configure_model()
    assert stage.evaluator.generate(TextEncoder.batch([]), torch.zeros(0, 4, stage.model.language_model.dim)) == []


def test_parameters_without_gradient_are_reported_once(toy_tokenizer):
    stage = tiny.make_stage("stage2", toy_tokenizer, cycle=CycleConfig(weight=0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(stage, steps=2, callbacks=[RunReport(Path("run"), "stage")])
    messages = [str(warning.message) for warning in caught if "no gradient" in str(warning.message)]
    count = len(stage.model.part("exo_to_ego"))
    assert len(messages) == 1
    assert messages[0].startswith(f"{count} trained parameters get no gradient, e.g. exo_to_ego.")


def test_a_checkpoint_that_began_from_another_handoff_is_refused(toy_tokenizer, tmp_path, monkeypatch):
    batches = DataLoader([tiny.clip_batch()], batch_size=None)
    stage = tiny.make_stage("stage1", toy_tokenizer)
    monkeypatch.setattr(stage, "started_from", lambda: {"exo_encoder": "then"})
    save(fit(stage, callbacks=[Checkpoints(tmp_path, 0)]), tmp_path / "0000001")
    stage = tiny.make_stage("stage1", toy_tokenizer)
    stage.sources = {}
    stage.configure_model()
    stage.sources = {"exo_encoder": FoundWeights("exo_encoder", "runs/x/stage0/handoff", {}, "now")}
    with pytest.raises(CheckpointError, match=r"different exo_encoder than runs/x/stage0/handoff contains: .*FORCE=1"):
        trainer(2, [Checkpoints(tmp_path, 0)]).fit(stage, batches, ckpt_path=tmp_path / "0000001")


# --------------------------------------------------------------------------------------------------- losses of stages


def test_total_is_the_sum_of_the_weighted_losses(toy_tokenizer):
    batch = tiny.clip_batch()
    losses = {}
    for weight in (1.0, 3.0):
        stage = tiny.make_stage(
            "stage2", toy_tokenizer, cycle=CycleConfig(weight), kl=KLConfig(weight), vtg_weight=weight
        )
        stage.configure_model()
        tiny.scatter(stage.model)
        losses[weight] = stage.losses(batch)
        total = stage.training_step(batch, 0)
        torch.testing.assert_close(total, sum(losses[weight].values()))
    assert losses[1.0].keys() == {"vtg", "kl", "cycle"}
    for name, loss in losses[1.0].items():
        assert loss > 0
        torch.testing.assert_close(losses[3.0][name], 3 * loss)


def test_cycle_directions_add_up(toy_tokenizer):
    cycles = {}
    for forward, backward in ((True, True), (True, False), (False, True)):
        stage = tiny.make_stage("stage2", toy_tokenizer, cycle=CycleConfig(forward=forward, backward=backward))
        stage.configure_model()
        tiny.scatter(stage.model)
        cycles[forward, backward] = stage.losses(tiny.clip_batch())["cycle"]
    assert cycles[True, False] != cycles[False, True]
    torch.testing.assert_close(cycles[True, True], cycles[True, False] + cycles[False, True])


def halves(batch):
    """The two clips of a batch as micro-batches of one."""
    for row in range(2):
        text = TextBatch(
            batch.text.input_ids[row, None], batch.text.attention_mask[row, None], batch.text.labels[row, None]
        )
        videos = (batch.ego_video[row, None], batch.exo_video[row, None])
        yield ClipBatch(batch.ids[row : row + 1], text, batch.label_tokens / 2, *videos, valid=batch.valid[row, None])


def test_cycle_by_channel_deviations_does_not_depend_on_the_micro_batch(toy_tokenizer):
    values, widths = {}, {}
    for split in (False, True):
        stage = tiny.make_stage("stage2", toy_tokenizer, cycle=CycleConfig(norm="channel_std"))
        stage.configure_model()
        tiny.scatter(stage.model)
        values[split] = []
        for step in range(2):
            batch = tiny.clip_batch(seed=step)
            parts = list(halves(batch)) if split else [batch]
            values[split].append(torch.stack([stage.losses(part)["cycle"] for part in parts]).mean())
            stage.on_before_optimizer_step(None)
        widths[split] = {view: s.variance for view, s in stage.cycle_standardizers.items()}
    torch.testing.assert_close(values[True], values[False])
    torch.testing.assert_close(widths[True], widths[False])

    plain = tiny.make_stage("stage2", toy_tokenizer)
    plain.configure_model()
    tiny.scatter(plain.model)
    expected = [plain.losses(tiny.clip_batch(seed=step))["cycle"] for step in range(2)]
    torch.testing.assert_close(values[False][0], expected[0])  # without statistics yet
    assert abs(values[False][1] / expected[1] - 1) > 0.01
    assert not plain.cycle_standardizers.state_dict()


def test_cycle_by_channel_deviations_weighs_channels_alike(toy_tokenizer):
    stage = tiny.make_stage("stage2", toy_tokenizer, cycle=CycleConfig(norm="channel_std"))
    stage.configure_model()
    exo = torch.stack([-torch.arange(1.0, 33), torch.arange(1.0, 33)]).view(2, 1, 1, 1, 32)
    valid = torch.ones(2, dtype=torch.bool)
    stage._cycle("exo", exo, exo, valid)
    stage.on_before_optimizer_step(None)
    assert stage._cycle("exo", exo, 1.5 * exo, valid).item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("where", ["patches", "tokens"])
def test_detached_inputs_keep_guidance_out_of_the_ego_encoder_and_change_no_value(toy_tokenizer, where):
    losses, batch = {}, tiny.clip_batch()
    for detach in (False, True):
        kl, cycle = KLConfig(where=where, detach_input=detach), CycleConfig(detach_input=detach)
        stage = guided(toy_tokenizer, kl=kl, cycle=cycle, contrastive=ContrastiveConfig(weight=0.5))
        losses[detach] = stage.losses(batch)
        for name, loss in losses[detach].items():
            reached = set()
            for part in ("ego_encoder", "ego_to_exo", "exo_to_ego"):
                weights = list(stage.model.part(part).values())
                gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                if any(gradient is not None and gradient.any() for gradient in gradients):
                    reached.add(part)
            expected = {"ego_to_exo"} | ({"exo_to_ego"} if name == "cycle" else set())
            if name == "vtg" or not detach:
                expected.add("ego_encoder")
            assert reached == expected, name
    assert losses[False].keys() == {"vtg", "kl", "contrastive", "cycle"}
    for name, loss in losses[False].items():
        assert torch.equal(loss, losses[True][name])


def test_the_kl_of_answers_cannot_be_kept_out_of_the_ego_encoder(toy_tokenizer):
    with pytest.raises(ValueError, match=r"model.kl.detach_input: .* set it to false"):
        tiny.make_stage("answers", toy_tokenizer, kl=KLConfig(detach_input=True))


def test_features_teach_f_alone_while_answers_teach_the_learner(toy_tokenizer):
    kl = KLConfig(pool="all", detach_input=True)
    stage = guided(toy_tokenizer, "answers", kl=kl, feature_weight=10.0, cycle=CycleConfig(detach_input=True))
    batch = tiny.clip_batch()
    losses = stage.losses(batch)
    assert losses.keys() == {"vtg", "kl", "kl_features", "cycle"}
    assert losses["kl_features"].item() == pytest.approx(10 * stage.step_log["guidance/kl"].item())
    assert losses["kl"].item() == pytest.approx(stage.step_log["guidance/kl_answers"].item())
    for name, expected in (("kl", {"ego_encoder", "ego_to_exo"}), ("kl_features", {"ego_to_exo"})):
        reached = set()
        for part in ("ego_encoder", "ego_to_exo", "exo_to_ego"):
            weights = list(stage.model.part(part).values())
            gradients = torch.autograd.grad(losses[name], weights, retain_graph=True, allow_unused=True)
            if any(gradient is not None and gradient.any() for gradient in gradients):
                reached.add(part)
        assert reached == expected, name
    only_logged = guided(toy_tokenizer, "answers", kl=KLConfig(pool="all"))
    assert "kl_features" not in only_logged.losses(batch)
    worse = {"guidance/gain_over_mean": -0.1}
    assert stage.remarks(worse) and not only_logged.remarks(worse)
    with pytest.raises(ValueError, match="exo video, which this stage needs"):
        stage.losses(replace(batch, exo_video=None))


BARS = {"guidance/kl_uniform", "guidance/kl_mean", "guidance/gain_over_mean", "guidance/mapping_change_back"}


class StepLogs(L.Callback):
    """Keep ``step_log`` of every step."""

    def __init__(self):
        self.logs = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.logs.append(dict(pl_module.step_log))


def test_bars_of_the_kl_are_measured_in_the_steps_that_are_written_and_change_no_gradient(toy_tokenizer):
    logs, weights = {}, {}
    for every in (2, 100):
        stage, of_steps = tiny.make_stage("stage2", toy_tokenizer), StepLogs()
        fit(stage, steps=4, callbacks=[TrainingMonitor(every), of_steps])
        logs[every], weights[every] = of_steps.logs, values(stage)
    assert [BARS & log.keys() for log in logs[100]] == [set()] * 4
    uniform = BARS - {"guidance/kl_mean", "guidance/gain_over_mean"}
    assert [BARS & log.keys() for log in logs[2]] == [set(), uniform, set(), BARS]
    last = logs[2][-1]
    assert last["guidance/gain_over_mean"] == last["guidance/kl_mean"] - last["guidance/kl"]
    assert 0 < last["guidance/mapping_change_back"] < 1
    assert moved(weights[2], weights[100]) == set()


def test_a_run_whose_mapping_maps_nothing_says_so_at_its_end(toy_tokenizer, capsys):
    fit(tiny.make_stage("stage2", toy_tokenizer), steps=2, callbacks=[TrainingMonitor(1)])
    assert "note: F changes x by " in capsys.readouterr().out
    stage = tiny.make_stage("stage2", toy_tokenizer)
    assert stage.remarks({"guidance/mapping_change": 0.2, "guidance/gain_over_mean": 0.01}) == []
    lines = stage.remarks({"guidance/mapping_change": 0.009, "guidance/gain_over_mean": -0.055})
    assert "0.9 % of its norm" in lines[0] and "0.055 above the KL to the mean of y" in lines[1]
    answers = tiny.make_stage("answers", toy_tokenizer)
    assert answers.remarks({"guidance/mapping_change": 0.2, "guidance/gain_over_mean": -0.1}) == []
    assert tiny.make_stage("stage3", toy_tokenizer).remarks({"guidance/mapping_change": 0.0}) == []


@pytest.mark.parametrize("form", ["huber", "squared"])
def test_the_form_of_the_cycle_loss_and_its_width_reach_it(toy_tokenizer, form):
    exo = torch.randn(2, 1, 1, 2, 32, generator=torch.Generator().manual_seed(0))
    stage = tiny.make_stage("stage2", toy_tokenizer, cycle=CycleConfig(form=form, delta=0.5))
    loss = stage._cycle("exo", exo, exo + 0.1, torch.ones(2, dtype=torch.bool))
    assert loss.item() == pytest.approx(0.01 if form == "squared" else 0.01 / (2 * 0.5), rel=1e-4)
    with pytest.raises(ValueError, match=r"model.cycle.delta: got 0, allowed: above 0"):
        tiny.make_stage("stage2", toy_tokenizer, cycle=CycleConfig(delta=0))


def test_immediate_statistics_serve_the_first_step_of_a_stage(toy_tokenizer):
    first = {}
    for statistics in ("delayed", "immediate"):
        stage = guided(toy_tokenizer, statistics=statistics, cycle=CycleConfig(norm="channel_std"))
        first[statistics] = stage.losses(tiny.clip_batch())
        stage.on_before_optimizer_step(None)
    assert first["delayed"]["vtg"] == first["immediate"]["vtg"]
    assert first["delayed"]["kl"] != first["immediate"]["kl"]
    assert first["delayed"]["cycle"] != first["immediate"]["cycle"]


def test_stage2_reads_the_demonstrator_without_moving_it(toy_tokenizer):
    stage = tiny.make_stage("stage2", toy_tokenizer)
    stage.configure_model()
    tiny.scatter(stage.model)
    batch = tiny.clip_batch()
    before = stage.losses(batch)
    batch.exo_video = tiny.video(2, seed=99)
    stage.standardizer.updates.zero_()
    after = stage.losses(batch)
    assert torch.equal(before["vtg"], after["vtg"])  # the language model reads x and F(x) only
    assert before["kl"] != after["kl"]


def guided(tokenizer, name="stage2", **changes):
    stage = tiny.make_stage(name, tokenizer, **changes)
    stage.configure_model()
    tiny.scatter(stage.model)
    return stage


def features_of(stage, batch):
    """Y and F(x) as the encoders and F give them."""
    model = stage.model
    return model.exo_encoder(batch.exo_video), model.ego_to_exo(model.ego_encoder(batch.ego_video))


@pytest.mark.parametrize("pool", ["none", "all"])
def test_kl_on_tokens_compares_what_the_language_model_reads(toy_tokenizer, pool):
    batch = tiny.clip_batch()
    stage = guided(toy_tokenizer, kl=KLConfig(weight=2.0, where="tokens", standardize="token", pool=pool))
    tokens = [F.layer_norm(stage.model.projector(f), (32,)) for f in features_of(stage, batch)]  # [B, N, D]
    if pool == "all":
        tokens = [t.mean(1, keepdim=True) for t in tokens]
    log_p, log_q = (t.log_softmax(-1) for t in tokens)
    by_hand = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    kl = stage.losses(batch)["kl"]
    torch.testing.assert_close(kl, 2 * by_hand)
    on_patches = guided(toy_tokenizer, kl=KLConfig(weight=2.0, standardize="token", pool=pool)).losses(batch)["kl"]
    assert not torch.isclose(kl, on_patches)
    kl.backward()
    assert all(p.grad is not None for p in stage.model.part("ego_to_exo").values())
    assert all(p.grad is None for p in stage.model.part("exo_encoder").values())


def demonstrator_captions(stage, batch):
    """Yield visual tokens of y and the demonstrator's caption, clip by clip."""
    lm, model = stage.model.language_model, stage.model
    for video in batch.exo_video:
        visual = model.project(model.exo_encoder(video[None]))
        ids, eos = batch.prompt[None], stage.tokenizer.eos_token_id
        (caption,) = lm.generate(ids, torch.ones_like(ids, dtype=torch.bool), visual, 6, eos, 0)
        yield visual, caption


def partly_narrated():
    """Two clips of which the second has no narration: nothing of its text is supervised."""
    batch = tiny.clip_batch()
    batch.prompt = torch.tensor([1, VIDEO_TOKEN_ID, 5])
    batch.narrated = torch.tensor([True, False])
    ids, mask = batch.text.input_ids, batch.text.attention_mask
    ids[1], mask[1] = torch.tensor([VIDEO_TOKEN_ID, 0, 0, 0, 0, 0]), torch.arange(6) < 1
    labels = batch.text.labels.clone()
    labels[1] = IGNORE_INDEX
    batch.text = TextBatch(ids, mask, labels)
    return batch


def answer_kl_by_hand(lm, ids, exo_tokens, ego_tokens, count):
    """KL along the last ``count`` tokens of one row, whose first two are a token and the clip's placeholder."""
    log_p, log_q = (
        lm.causal_lm(
            inputs_embeds=torch.cat([lm.embed(torch.tensor([ids[:1]])), visual, lm.embed(torch.tensor([ids[2:]]))], 1)
        )
        .logits[0, -count - 1 : -1]
        .log_softmax(-1)
        for visual in (exo_tokens, ego_tokens)
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_kl_on_answers_follows_the_narration_or_else_the_demonstrators_caption(toy_tokenizer):
    batch = partly_narrated()
    stage = guided(toy_tokenizer, "answers", kl=KLConfig(weight=2.0), answer_tokens=6)
    lm = stage.model.language_model
    (narrated, _), (captioned, caption) = demonstrator_captions(stage, batch)
    caption = [*caption, stage.tokenizer.eos_token_id][:6]
    ego = [stage.model.learner_tokens(video[None]) for video in batch.ego_video]
    expected = torch.stack(
        [
            answer_kl_by_hand(lm, [1, VIDEO_TOKEN_ID, 5, 6, 7, 2], narrated, ego[0], 3),
            answer_kl_by_hand(lm, [1, VIDEO_TOKEN_ID, 5, *caption], captioned, ego[1], len(caption)),
        ]
    )
    losses = stage.losses(batch)
    torch.testing.assert_close(losses["kl"], 2 * expected.mean(), atol=1e-5, rtol=1e-4)
    losses["kl"].backward()
    assert all(p.grad is not None for p in stage.model.part("ego_to_exo").values())
    assert all(p.grad is None for p in stage.model.part("exo_encoder").values())

    # Captions teach nothing but the KL, and that of narrations needs no caption.
    without = guided(toy_tokenizer, "stage2").losses(batch)
    torch.testing.assert_close(losses["vtg"], without["vtg"])
    alone = partly_narrated()
    alone.valid[1] = False
    torch.testing.assert_close(stage.losses(alone)["kl"], expected[0])


def test_one_pass_of_the_learner_serves_narrations_and_captions(toy_tokenizer, monkeypatch):
    stage = guided(toy_tokenizer, "answers", answer_tokens=6)
    decoder, passes = stage.model.language_model.causal_lm.get_decoder(), []
    decoder.register_forward_hook(lambda module, args, output: passes.append(torch.is_grad_enabled()))
    stage.losses(tiny.clip_batch())
    assert passes == [False, True]
    stage.losses(partly_narrated())
    assert sum(passes[2:]) == 1 and passes[-2:] == [False, True]


@pytest.fixture
def of_stage1(toy_tokenizer, tmp_path):
    """Stage weights with the projector of a stage 1."""
    stage = tiny.make_stage("stage1", toy_tokenizer)
    stage.configure_model()
    tiny.scatter(stage.model, seed=1)
    projector = [("projector", full_tensors(stage.model.part("projector")))]
    write_stage_weights(tmp_path / "handoff", projector, stage.network.lora, {"stage": "stage1"})
    return tmp_path / "handoff"


@pytest.mark.parametrize(("name", "where"), [("stage2", "tokens"), ("answers", "patches")])
def test_the_demonstrator_keeps_the_projector_of_stage_1(toy_tokenizer, of_stage1, name, where):
    """The projector of x and F(x) is another one, and changing that one moves no target."""
    batch = tiny.clip_batch()
    batch.prompt = torch.tensor([1, VIDEO_TOKEN_ID, 5])
    kl = KLConfig(where=where, standardize="token")
    kept = guided(toy_tokenizer, name, kl=kl, init={"exo_projector": f"{of_stage1}:projector"})
    shared = guided(toy_tokenizer, name, kl=kl)
    for part, parameters in values(shared).items():
        for name, parameter in kept.model.part(part).items():
            parameter.data.copy_(parameters[name])
    assert not torch.isclose(kept.losses(batch)["kl"], shared.losses(batch)["kl"])
    for name, parameter in kept.model.part("exo_projector").items():
        parameter.data.copy_(shared.model.part("projector")[name])
    torch.testing.assert_close(kept.losses(batch)["kl"], shared.losses(batch)["kl"])


def test_the_projector_of_stage_1_starts_there_and_stays(toy_tokenizer, of_stage1):
    source = f"{of_stage1}:projector"
    kl = KLConfig(where="tokens")
    stage = tiny.make_stage("stage2", toy_tokenizer, kl=kl, init={"exo_projector": source, "projector": str(of_stage1)})
    stage.configure_model()
    before = values(stage)
    stored = {name: tensor.read() for name, tensor in open_stage_weights(of_stage1, "projector").tensors.items()}
    for part in ("exo_projector", "projector"):
        assert all(torch.equal(before[part][name], tensor) for name, tensor in stored.items())
    fit(stage, steps=2)
    assert moved(before, values(stage)) == set(stage.trains)
    assert not stage.model.exo_projector.training
    assert "exo_projector" not in tiny.make_stage("stage2", toy_tokenizer).uses


def test_patches_pass_through_no_projector(toy_tokenizer):
    with pytest.raises(ValueError, match=r"model\.init\.exo_projector: model\.kl\.where is patches"):
        tiny.make_stage("stage2", toy_tokenizer, init={"exo_projector": "runs/toy/stage1/handoff:projector"})


@pytest.mark.parametrize("narrated", [True, False])
def test_kl_on_answers_leaves_out_clips_that_cannot_be_read(toy_tokenizer, narrated):
    batch, alone = tiny.clip_batch(), tiny.clip_batch()
    for each in (batch, alone):
        each.prompt = torch.tensor([1, VIDEO_TOKEN_ID, 5])
        each.narrated = torch.tensor([narrated, narrated])
    batch.valid[1] = False
    ids, mask, labels = (part.clone() for part in (batch.text.input_ids, batch.text.attention_mask, batch.text.labels))
    labels[1] = IGNORE_INDEX
    batch.text = TextBatch(ids, mask, labels)
    alone.text = TextBatch(*(part[[0, 0]] for part in (ids, mask, labels)))
    alone.ego_video[1], alone.exo_video[1] = alone.ego_video[0], alone.exo_video[0]
    stage = guided(toy_tokenizer, "answers", answer_tokens=6)
    torch.testing.assert_close(2 * stage.losses(batch)["kl"], stage.losses(alone)["kl"])


def test_kl_on_answers_needs_one_prompt_for_captions(toy_tokenizer):
    stage = guided(toy_tokenizer, "answers")
    assert stage.losses(tiny.clip_batch())["kl"] > 0  # along narrations
    batch = partly_narrated()
    batch.prompt = None
    with pytest.raises(ValueError, match="AnswerGuidance needs data with one common prompt where pairs have no narr"):
        stage.losses(batch)


def test_kl_on_tokens_has_statistics_of_tokens_and_a_fixed_target(toy_tokenizer):
    batch = tiny.clip_batch()
    stage = guided(toy_tokenizer, kl=KLConfig(where="tokens"))
    stage.losses(batch)
    stage.standardizer.update()
    tokens = stage.model.projector(stage.model.exo_encoder(batch.exo_video)).flatten(0, 1)
    torch.testing.assert_close(stage.standardizer.mean, tokens.mean(0))
    same = tiny.clip_batch()
    same.exo_video = same.ego_video
    stage = guided(toy_tokenizer, kl=KLConfig(where="tokens"), network=tiny.network(dropout=0.0))
    stage.model.exo_encoder.load_state_dict(stage.model.ego_encoder.state_dict())
    stage.model.ego_to_exo = torch.nn.Identity()
    assert stage.losses(same)["kl"].item() == pytest.approx(0, abs=1e-6)


def test_kl_on_tokens_needs_both_visual_inputs(toy_tokenizer):
    with pytest.raises(ValueError, match=r"model.kl.where: got tokens, but network.visual_inputs is \[ego\]"):
        tiny.make_stage(
            "stage2", toy_tokenizer, network=tiny.network(visual_inputs=["ego"]), kl=KLConfig(where="tokens")
        )


class Unsynchronised(L.LightningDataModule):
    """One batch of views that show the same action at different times."""

    synchronised = False

    def train_dataloader(self):
        return DataLoader([tiny.clip_batch()], batch_size=None)


def test_losses_that_compare_instants_refuse_views_that_are_not_synchronised(toy_tokenizer):
    stage = tiny.make_stage("stage2", toy_tokenizer)
    with pytest.raises(
        ValueError, match=r"model\.kl\.pool: got none, .* views of data\.index are not synchronised: set"
    ):
        trainer(1, ()).fit(stage, datamodule=Unsynchronised())
    for kl in (KLConfig(pool="all"), KLConfig(weight=0.0)):
        trainer(1, ()).fit(tiny.make_stage("stage2", toy_tokenizer, kl=kl), datamodule=Unsynchronised())


def test_the_weight_of_the_kl_rises_over_its_warmup(toy_tokenizer):
    stage = tiny.make_stage("stage2", toy_tokenizer, kl=KLConfig(weight=6.0, warmup_fraction=0.5), learning_rate=1e-4)
    weights = []

    class Weights(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights.append(float(pl_module.step_log["train/loss_kl"] / pl_module.step_log["guidance/kl"]))

    fit(stage, steps=4, callbacks=[Weights()])
    assert weights == pytest.approx([2.0, 4.0, 6.0, 6.0])
    with pytest.raises(ValueError, match=r"model.kl.warmup_fraction: got 1.5, allowed: from 0 to 1"):
        tiny.make_stage("stage2", toy_tokenizer, kl=KLConfig(warmup_fraction=1.5))


def test_the_contrastive_term_is_added_and_knows_equal_clips(toy_tokenizer):
    batch = tiny.clip_batch()
    stage = guided(toy_tokenizer, kl=KLConfig(standardize="none"), contrastive=ContrastiveConfig(0.5, tau=0.2))
    losses = stage.losses(batch)
    apart = ~torch.eye(2, dtype=torch.bool)
    expected = contrastive_loss(*features_of(stage, batch), batch.valid, apart, 0.2)
    torch.testing.assert_close(losses["contrastive"], 0.5 * expected)
    batch.ids = ["a", "a"]
    assert stage.losses(batch)["contrastive"] == 0


def test_without_exocentric_video_text_is_learned_and_nothing_else_may_be_asked_for(toy_tokenizer):
    batch = tiny.clip_batch()
    network = tiny.network(visual_inputs=["ego"], dropout=0.0)
    off = {"kl": KLConfig(weight=0.0), "cycle": CycleConfig(weight=0.0)}
    stage = guided(toy_tokenizer, network=network, train=["ego_encoder"], **off)
    expected = stage.losses(batch)["vtg"]
    batch.exo_video = None
    losses = stage.losses(batch)
    assert losses.keys() == {"vtg"}
    assert torch.equal(losses["vtg"], expected)
    for on in ({"kl": KLConfig()}, {"cycle": CycleConfig()}, {"contrastive": ContrastiveConfig(1.0)}):
        with pytest.raises(ValueError, match=r"data.views: got ego alone, .* add exo, or set the"):
            guided(toy_tokenizer, network=network, **(off | on)).losses(batch)


def known_narrations(stage, batch):
    """Measure how well the demonstrator knows the narrations of a batch."""
    with torch.no_grad():
        exo = stage.model.project_exo(stage.model.exo_encoder(batch.exo_video))
        logits, targets = stage.read_text(exo, batch)
    return Knowledge.of(NextTokens.of(logits, 1.0), targets, torch.tensor([0, 0, 0, 1, 1]), 2)


@pytest.mark.parametrize("name", ["stage2", "answers"])
def test_pairs_teach_by_how_well_the_demonstrator_knows_their_narrations(toy_tokenizer, name):
    by_clip = []
    for row in range(2):  # the KL of each clip, with its share of the mean over both
        batch = tiny.clip_batch()
        batch.valid = torch.arange(2) == row
        batch.text.labels[1 - row] = IGNORE_INDEX
        by_clip.append(guided(toy_tokenizer, name).losses(batch)["kl"])
    batch = tiny.clip_batch()
    known = known_narrations(guided(toy_tokenizer, name), batch)
    assert 0 < known.likelihood.min() < known.likelihood.max()
    between = known.likelihood.mean().item()
    for selection, weights in (
        (SelectionConfig("likelihood"), known.likelihood),
        (SelectionConfig("likelihood", least=between), known.likelihood * (known.likelihood > between)),
        (SelectionConfig("right"), known.right.float()),
    ):
        stage = guided(toy_tokenizer, name, selection=selection)
        torch.testing.assert_close(stage.losses(batch)["kl"], (weights * torch.stack(by_clip)).sum())
        torch.testing.assert_close(stage.step_log["guidance/selected"], weights.mean())


def test_pairs_without_narration_teach_features_fully_and_answers_by_their_caption(toy_tokenizer):
    batch, selection = partly_narrated(), SelectionConfig("likelihood")
    stage = guided(toy_tokenizer, selection=selection)
    narrated = known_narrations(stage, tiny.clip_batch()).likelihood[0]
    stage.losses(batch)
    torch.testing.assert_close(stage.step_log["guidance/selected"], (narrated + 1) / 2)
    stage = guided(toy_tokenizer, "answers", selection=SelectionConfig("right"), answer_tokens=6)
    known = known_narrations(stage, tiny.clip_batch())
    stage.losses(batch)
    assert stage.step_log["guidance/selected"] == (known.right[0].item() + 1) / 2


def test_impossible_selections_are_refused(toy_tokenizer, of_stage1):
    for wrong, message in (
        ({"selection": SelectionConfig("right", least=2.0)}, "model.selection.least: got 2.0, allowed: from 0 to 1"),
        ({"selection": SelectionConfig(least=0.5)}, "model.selection.by is none: set by to likelihood or right"),
        ({"selection": SelectionConfig("right"), "kl": KLConfig(0.0)}, "got right, but model.kl.weight is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.make_stage("stage2", toy_tokenizer, **wrong)
    source = {"exo_projector": f"{of_stage1}:projector"}
    stage = tiny.make_stage("stage2", toy_tokenizer, selection=SelectionConfig("right"), init=source)
    assert "exo_projector" in stage.uses


@pytest.mark.parametrize("where", ["patches", "tokens"])
def test_positions_of_the_learner_attend_to_those_of_y_in_the_kl_alone(toy_tokenizer, where):
    batch, kl = tiny.clip_batch(), KLConfig(where=where, standardize="token", align="attention", align_tau=0.2)
    stage = guided(toy_tokenizer, kl=kl)
    losses, equal = stage.losses(batch), guided(toy_tokenizer, kl=replace(kl, align="none")).losses(batch)
    y, mapped = features_of(stage, batch)
    if where == "tokens":
        y, mapped = (stage.model.projector(f)[:, None, None] for f in (y, mapped))
    y, mapped = (F.layer_norm(f, (32,)) for f in (y, mapped))
    log_p, log_q = cross_view_attention(y, mapped, 0.2).log_softmax(-1), mapped.log_softmax(-1)
    torch.testing.assert_close(losses["kl"], (log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert (losses["kl"] != equal["kl"]) == (where == "patches")  # the projector leaves a single token
    assert torch.equal(losses["vtg"], equal["vtg"]) and torch.equal(losses["cycle"], equal["cycle"])
    losses["kl"].backward()
    assert all(p.grad is not None for p in stage.model.part("ego_to_exo").values())
    for wrong, message in (
        (KLConfig(align="attention", pool="all"), "model.kl.align: got attention, but model.kl.pool is all"),
        (KLConfig(align_tau=0.0), "model.kl.align_tau: got 0.0, allowed: above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.make_stage("stage2", toy_tokenizer, kl=wrong)


def seen_by_others(batch):
    """Give the first clip one more camera, and the second clip two; the other place is filled with noise."""
    batch.other_exo_video = torch.stack([tiny.video(2, seed=20), tiny.video(2, seed=21)])
    batch.other_exo = torch.tensor([[True, False], [True, True]])
    return batch


def test_the_mean_over_cameras_is_the_target_of_features_but_not_of_the_cycle(toy_tokenizer):
    batch = seen_by_others(tiny.clip_batch())
    stage = guided(toy_tokenizer, kl=KLConfig(pool="all", standardize="token"))
    with torch.no_grad():
        own, (first, second) = (
            stage.model.exo_encoder(batch.exo_video),
            map(stage.model.exo_encoder, batch.other_exo_video),
        )
        mean = torch.stack([(own[0] + first[0]) / 2, (own[1] + second[0] + second[1]) / 3])
        mapped = stage.model.ego_to_exo(stage.model.ego_encoder(batch.ego_video))
    losses = stage.losses(batch)
    log_p, log_q = (F.layer_norm(f, (32,)).mean((1, 2, 3)).log_softmax(-1) for f in (mean, mapped))
    torch.testing.assert_close(losses["kl"], (log_p.exp() * (log_p - log_q)).sum(-1).mean())
    alone = stage.losses(tiny.clip_batch())
    assert torch.equal(losses["cycle"], alone["cycle"]) and torch.equal(losses["vtg"], alone["vtg"])
    assert losses["kl"] != alone["kl"]
    batch.other_exo[:] = False
    torch.testing.assert_close(stage.losses(batch)["kl"], alone["kl"])


def test_the_mean_over_cameras_is_the_target_of_answers(toy_tokenizer):
    batch = seen_by_others(partly_narrated())
    stage = guided(toy_tokenizer, "answers", answer_tokens=6)
    exo = stage.model.exo_encoder
    with torch.no_grad():
        answers, mean = stage.demonstrate(exo(batch.exo_video), batch, stage.other_exo(batch))
        captions, own = stage.demonstrate(exo(batch.exo_video), batch)
        batch.text, batch.narrated = answers, None  # so that the others read these answers
        first, second = (stage.demonstrate(exo(video), batch)[1] for video in batch.other_exo_video.unbind(1))
    assert torch.equal(answers.input_ids, captions.input_ids)
    p = [given.log_probs.exp() for given in (own, first, second)]
    expected = torch.cat([(p[0] + p[1])[:3] / 2, sum(p)[3:] / 3])
    assert len(expected) > 3
    torch.testing.assert_close(mean.log_probs.exp(), expected)
    batch = seen_by_others(partly_narrated())
    assert stage.losses(batch)["kl"] != stage.losses(partly_narrated())["kl"]


def test_bag_of_words_loss_by_hand(toy_tokenizer):
    stage = tiny.make_stage("stage0", toy_tokenizer)
    size = len(stage.tokenizer)
    stage.model = torch.nn.Module()
    stage.model.word_head = head = torch.nn.Linear(1, size)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.zero_()
        head.bias[7] = math.log(size)  # p(7) = size / (2 size - 1), others 1 / (2 size - 1)
    labels = torch.tensor([[-100, 6, 7, 7, stage.tokenizer.eos_token_id], [-100, 7, -100, -100, -100]])
    loss = stage._bag_of_words_loss(torch.zeros(2, 1, 1), labels)
    first, second = (
        0.5 * (math.log(1 / (2 * size - 1)) + math.log(size / (2 * size - 1))),
        math.log(size / (2 * size - 1)),
    )
    torch.testing.assert_close(loss, torch.tensor(-(first + second) / 2))


def test_grounding_steps_leave_the_language_model_out(toy_tokenizer):
    stage = tiny.make_stage("stage0", toy_tokenizer, grounding_weight=0.5, grounding_steps=2)
    losses, steps = stage.losses, []

    def recorded(batch):
        values = losses(batch)
        steps.append(set(values))
        return values

    stage.losses = recorded
    trainer(4).fit(stage, DataLoader([tiny.clip_batch() for _ in range(4)], batch_size=None))
    assert steps == [{"grounding"}] * 2 + [{"grounding", "vtg"}] * 2


def test_ddp_cannot_leave_a_trained_language_model_out(toy_tokenizer):
    options = {"grounding_weight": 0.5, "grounding_steps": 2}
    stages = [tiny.make_stage("stage0", toy_tokenizer, train=train, **options) for train in (None, ["projector"])]
    for stage in stages:
        stage.trainer = trainer(4, devices=2, strategy="ddp")
    with pytest.raises(ValueError, match=r"trainer\.strategy: ddp, .* in the first 2 steps"):
        stages[0].configure_model()
    stages[1].configure_model()


def test_grounding_steps_need_a_weight(toy_tokenizer):
    with pytest.raises(ValueError, match=r"model\.grounding_steps: got 5 with model\.grounding_weight 0"):
        tiny.make_stage("stage0", toy_tokenizer, grounding_steps=5)


# ---------------------------------------------------------------------------------------------------------- optimiser


def optimiser(toy_tokenizer, optim, max_steps=10, name="stage3"):
    stage = tiny.make_stage(name, toy_tokenizer, optim=optim)
    stage.configure_model()
    stage.trainer = trainer(max_steps)
    return stage, stage.configure_optimizers()


def test_rate_warms_up_then_falls_to_zero_as_a_cosine(toy_tokenizer):
    _, made = optimiser(toy_tokenizer, OptimConfig(learning_rate=1.0, warmup_fraction=0.2))
    factor = made["lr_scheduler"]["scheduler"].lr_lambdas[0]
    expected = {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.5 * (1 + math.sqrt(0.5)), 6: 0.5, 10: 0.0}
    assert {step: factor(step) for step in expected} == pytest.approx(expected)
    assert made["lr_scheduler"]["interval"] == "step"


def test_rate_follows_optimiser_steps_in_training(toy_tokenizer):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    stage = tiny.make_stage("stage1", toy_tokenizer, learning_rate=1.0)
    fit(stage, steps=4, callbacks=[Rates()])
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3, 4)])


def test_groups_by_part_with_their_own_rate_and_without_decay_of_vectors(toy_tokenizer):
    optim = OptimConfig(
        learning_rate=1e-3, warmup_fraction=0.0, weight_decay=0.1, lr_mult={"lora": 5.0, "projector": 0.5}
    )
    stage, made = optimiser(toy_tokenizer, optim)
    groups = {group["name"]: group for group in made["optimizer"].param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {
            "ego_encoder": 1e-3,
            "ego_encoder_vectors": 1e-3,
            "projector": 5e-4,
            "projector_vectors": 5e-4,
            "ego_to_exo": 1e-3,
            "ego_to_exo_vectors": 1e-3,
            "lora": 5e-3,
        }
    )
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if name.endswith("_vectors") else 0.1)
        assert {p.ndim > 1 for p in group["params"]} == {not name.endswith("_vectors")}
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, _, p in stage.trainable())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, "optim.learning_rate: got 0.0, allowed: above 0"),
        ({"learning_rate": 1.0, "warmup_fraction": 1.0}, "optim.warmup_fraction: got 1.0"),
        ({"learning_rate": 1.0, "lr_mult": {"head": 2.0}}, "optim.lr_mult: got head, allowed: exo_encoder"),
    ],
)
def test_impossible_optimisers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**wrong)


def test_gradients_are_clipped_by_their_common_norm(toy_tokenizer):
    stage = tiny.make_stage("stage1", toy_tokenizer)
    stage.configure_model()
    stage.trainer = trainer(1)
    for _, _, parameter in stage.trainable():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for _, _, parameter in stage.trainable())
    optimizer = stage.configure_optimizers()["optimizer"]
    FiniteCheck().on_before_optimizer_step(stage.trainer, stage, optimizer)
    torch.testing.assert_close(stage.step_log["optim/grad_norm"], torch.tensor(math.sqrt(count)))
    stage.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
    clipped = torch.cat([parameter.grad.flatten() for _, _, parameter in stage.trainable()])
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------- checkpoints


def save(run, folder):
    run.save_checkpoint(folder)
    run.strategy.checkpoint_io.wait()


@pytest.mark.parametrize(
    ("name", "own"), [("stage1", set()), ("stage2", {"mean", "variance", "updates"}), ("stage3", set())]
)
def test_checkpoints_hold_trained_tensors_their_moments_and_the_stages_own(toy_tokenizer, tmp_path, name, own):
    stage = tiny.make_stage(name, toy_tokenizer)
    save(fit(stage, callbacks=[Checkpoints(tmp_path, 0)]), tmp_path / "0000001")
    held = set(stored_tensors(tmp_path / "0000001"))
    trained = {key for key, parameter in stage.named_parameters() if parameter.requires_grad}
    kinds = ("exp_avg", "exp_avg_sq", "step")
    moments = {f"optimizer.{key}.{kind}" for key in trained for kind in kinds}
    assert held == {f"state_dict.{key}" for key in trained | {f"standardizer.{key}" for key in own}} | moments


def test_checkpoint_of_another_choice_of_parts_is_refused(toy_tokenizer, tmp_path):
    stage = tiny.make_stage("stage1", toy_tokenizer, train=["exo_encoder"])
    save(fit(stage, callbacks=[Checkpoints(tmp_path, 0)]), tmp_path / "0000001")
    batches = DataLoader([tiny.clip_batch()], batch_size=None)
    with pytest.raises(CheckpointError, match=r"\d+ trained tensors are missing, e.g. model.projector"):
        resume = trainer(2, [Checkpoints(tmp_path, 0)])
        resume.fit(tiny.make_stage("stage1", toy_tokenizer), batches, ckpt_path=tmp_path / "0000001")


class Watch(L.Callback):
    """Keeps the order of the data; breaks the run off when told to, as a crash would."""

    def __init__(self, stop_after=None):
        self.ids, self.modes, self.stop_after = [], [], stop_after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.stop_after:
            raise RuntimeError("power cut")
        self.ids.append(batch.ids)
        self.modes.append({name: module.training for name, module in pl_module.model.named_children()})


def practise(world, folder, watch, workers, checkpoint=None, dropout=0.1, accumulate=2):
    """Stage 3 over two epochs of three steps of two micro-batches, validated within."""
    stage = tiny.make_stage("stage3", world / "tokenizer", network=tiny.network(dropout=dropout), seed=5)
    data = InstructionDataModule(
        sources=[str(world / "instructions" / "egtea.jsonl")],
        view="ego",
        root=str(world),
        tokenizer=str(world / "tokenizer"),
        clips=ClipConfig(tiny.FRAMES, tiny.SIZE, "crop"),
        global_batch_size=8,
        held_out=str(world / "instructions" / "held_out.jsonl"),
        num_workers=workers,
    )
    data.setup("fit")
    assert data.steps_per_epoch() == 3
    callbacks = [
        watch,
        DropoutSeed(),
        FiniteCheck(),
        Checkpoints(folder, 1),
        StageHandoff(str(folder / "handoff"), "stage3", "0"),
    ]
    options = {"use_distributed_sampler": False, "num_sanity_val_steps": 0, "accumulate_grad_batches": accumulate}
    limits = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    run = trainer(6, callbacks, **options, **limits)
    run.fit(stage, datamodule=data, ckpt_path=checkpoint)
    return stage


@pytest.fixture(scope="module")
def uninterrupted(toy_world, tmp_path_factory):
    watch = Watch()
    return practise(toy_world, tmp_path_factory.mktemp("straight"), watch, workers=0), watch


def test_frozen_parts_stay_in_evaluation_mode_after_validation(uninterrupted):
    _, watch = uninterrupted
    trained = {"ego_encoder": True, "projector": True, "ego_to_exo": True, "language_model": True}
    assert watch.modes == [trained] * 12  # the language model holds the adapters' dropout


@pytest.mark.parametrize(
    ("stop_after", "workers"),
    [(2, 0), (3, 0), pytest.param(4, 1, marks=pytest.mark.slow)],
    ids=["in_epoch", "between", "second_epoch"],
)
def test_resumed_run_equals_an_uninterrupted_one(uninterrupted, toy_world, tmp_path, stop_after, workers):
    straight, seen = uninterrupted
    first, second = Watch(stop_after), Watch()
    with pytest.raises(RuntimeError, match="power cut"):
        practise(toy_world, tmp_path, first, workers)
    assert not (tmp_path / "handoff").exists()
    checkpoint = newest(tmp_path)
    assert checkpoint.name == f"{stop_after:07d}"
    resumed = practise(toy_world, tmp_path, second, workers, checkpoint)
    assert first.ids == seen.ids[: 2 * stop_after]
    assert second.ids == seen.ids[2 * stop_after :]
    assert moved(values(straight), values(resumed)) == set()
    assert (tmp_path / "handoff" / "manifest.json").is_file()


def test_epochs_differ_in_order_and_hold_every_sample_once(uninterrupted):
    _, watch = uninterrupted
    epochs = [[name for ids in half for name in ids] for half in (watch.ids[:6], watch.ids[6:])]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 24
    assert epochs[0] != epochs[1]


def test_dropout_takes_part(uninterrupted, toy_world, tmp_path):
    straight, _ = uninterrupted
    assert moved(values(straight), values(practise(toy_world, tmp_path, Watch(), workers=0, dropout=0.0)))


# --------------------------------------------------------------------------------------------------------- full size


@pytest.mark.parametrize("name", tiny.STAGES)
def test_checkpointed_activations_change_no_bit(toy_tokenizer, name):
    gradients, losses = [], []
    for checkpointing in (False, True):
        stage = tiny.make_stage(name, toy_tokenizer, activation_checkpointing=checkpointing)
        stage.configure_model()
        tiny.scatter(stage.model)
        stage.train()
        torch.manual_seed(3)  # dropout of the adapters
        loss = stage.training_step(tiny.clip_batch(), 0)
        loss.backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in stage.model.named_parameters() if p.grad is not None})
    assert torch.equal(*losses)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())


def test_checkpointing_reaches_blocks_of_every_part(toy_tokenizer):
    stage = tiny.make_stage("stage2", toy_tokenizer)
    stage.configure_model()
    stage.model.checkpoint_activations()
    blocks = stage.model.blocks()
    assert set(blocks) == set(stage.uses)
    assert {part: len(found) for part, found in blocks.items()} == {
        "exo_encoder": 1,
        "ego_encoder": 1,
        "projector": 2,
        "ego_to_exo": 1,
        "exo_to_ego": 1,
        "language_model": 2,
    }
    assert all("forward" in vars(block) for found in blocks.values() for block in found)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_frozen_parts_in_bfloat16(toy_tokenizer, name):
    losses = {}
    for frozen in ("float32", "bfloat16"):
        stage = tiny.make_stage(name, toy_tokenizer, frozen_dtype=frozen)
        stage.configure_model()
        for part in stage.uses:
            expected = torch.float32 if part in stage.trains else getattr(torch, frozen)
            assert {p.dtype for p in stage.model.part(part).values()} == {expected}, part
        assert all(buffer.dtype != torch.bfloat16 for buffer in stage.buffers())
        tiny.scatter(stage.model)
        before = values(stage)
        losses[frozen] = stage.losses(tiny.clip_batch())["vtg"] if frozen == "float32" else None
        if frozen == "bfloat16":
            with torch.autocast("cpu", torch.bfloat16):
                losses[frozen] = stage.losses(tiny.clip_batch())["vtg"].float()
            fit(stage, precision="bf16-mixed")
            assert moved(before, values(stage)) == set(stage.trains)
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], atol=0.02, rtol=0.02)


def from_pretrained(tokenizer, folder):
    """A stage whose language model is written to a folder, and one that will start from it."""
    plain = tiny.make_stage("stage1", tokenizer, seed=1)
    plain.configure_model()
    plain.model.language_model.causal_lm.save_pretrained(folder)
    network = tiny.network()
    network.language_model = LanguageModelConfig(pretrained=str(folder))
    return plain, tiny.make_stage("stage1", tokenizer, network=network)


def test_a_stage_starts_from_a_pretrained_language_model(toy_tokenizer, tmp_path):
    plain, stage = from_pretrained(toy_tokenizer, tmp_path)
    stage.configure_model()
    ours, expected = stage.model.part("language_model"), plain.model.part("language_model")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    assert stage.started_from().keys() == {"language_model"}


def test_weights_of_one_unit_at_a_time_are_whole_where_they_are_sharded(toy_tokenizer, tmp_path, monkeypatch):
    """Each unit is cut before the next one is read; here, cutting leaves nothing at all."""
    plain, stage = from_pretrained(toy_tokenizer, tmp_path)
    stage._device_mesh, stage.trainer = object(), trainer(1)
    whole = []

    def cut(unit, mesh, precision, cpu_offload):
        whole.append({name for name, p in stage.model.part("language_model").items() if not p.is_meta})
        unit.to("meta")

    monkeypatch.setattr("lightning_modules.stages.base.shard", cut)
    stage.configure_model()
    read = [held for held in whole if held]
    layers = [{name for name in plain.model.part("language_model") if f"layers.{n}." in name} for n in range(2)]
    assert read[:2] == layers
    assert read[2] == set(plain.model.part("language_model")) - layers[0] - layers[1]  # embeddings and last norm
    assert len(read) == 3


CLIPS = ClipConfig(num_frames=tiny.FRAMES, image_size=tiny.SIZE)


def test_data_that_does_not_suit_the_model_is_refused_before_anything_is_read(toy_tokenizer):
    stage = tiny.make_stage("stage2", toy_tokenizer)
    longest = 4096 * 32  # positions of transformers' Mistral
    with pytest.raises(ValueError, match=r"clips.image_size: got 32, but network.encoder.image_size is 16"):
        check_stage(stage, ClipConfig(num_frames=tiny.FRAMES, image_size=32), 100)
    with pytest.raises(ValueError, match=r"2 visual tokens exceed the 131072 positions .* to at most 131070"):
        check_stage(stage, CLIPS, longest)
    check_stage(stage, CLIPS, longest - 2)
    stage.network.language_model.overrides["vocab_size"] = 3
    with pytest.raises(ValueError, match=r"has \d+ tokens, but network.language_model.overrides.vocab_size is 3"):
        check_stage(stage, CLIPS, 100)


def test_sources_are_looked_at_before_anything_is_read(toy_tokenizer, tmp_path):
    stage = tiny.make_stage("stage1", toy_tokenizer, init={"projector": str(tmp_path / "stage0" / "handoff")})
    with pytest.raises(WeightsError, match=r"No stage0 weights in .*stage0/handoff. Run `make stage0` first"):
        check_stage(stage, CLIPS, 100)


def test_what_trains_is_printed_and_kept(toy_tokenizer, tmp_path, capsys):
    stage = tiny.make_stage("stage3", toy_tokenizer)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[RunReport(Path("run"), "stage")],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(stage, DataLoader([tiny.clip_batch()], batch_size=None))
    printed = capsys.readouterr().out
    assert "==== stage: LearnerSelfPractice ====" in printed and "files    run, curves" in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines}
    lora = sum(p.numel() for p in stage.model.part("lora").values())
    assert cells["lora"] == [f"{lora:,}"] * 2
    assert cells["language_model"][1] == "0"
    trained = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    assert cells["together"] == [f"{sum(p.numel() for p in stage.model.parameters()):,}", f"{trained:,}"]
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    text = events.Tensors("model/parts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == lines
