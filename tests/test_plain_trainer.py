"""A stage is an ordinary LightningModule: the everyday uses with a plain ``lightning.Trainer``, as in a notebook."""

import math

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, Question, QuestionBatch, TextBatch
from lightning_modules import OptimConfig
from lightning_modules.stages.guidance import CycleConfig, KLConfig

STAGES = pytest.mark.parametrize("name", tiny.STAGES)


def plain_trainer(folder, **options):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(default_root_dir=folder, **(settings | options))


def batches(count=3):
    return DataLoader([tiny.clip_batch(seed) for seed in range(count)], batch_size=None)


def same_batch(count):
    """A loader that resumes exactly: a plain DataLoader starts again with its first batch."""
    return DataLoader([tiny.clip_batch()] * count, batch_size=None)


def make_stage(name, tokenizer, **changes):
    return tiny.make_stage(name, tokenizer, network=tiny.network(dropout=0.0), **changes)


def weights(stage):
    return {name: tensor.clone() for name, tensor in stage.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def question_batch():
    """A caption, a question and a choice of two options about two clips."""
    questions = [
        Question(0, "caption", "Describe.", "a b", parts={"verb": "a"}),
        Question(1, "qa_hand", "Which hand?", "left"),
        Question(1, "choice", "Which?", "b", options=("a", "b")),
    ]

    def rows(count, answered):
        ids = torch.tensor([[1, VIDEO_TOKEN_ID, 5, 6 + row] for row in range(count)])
        labels = torch.full_like(ids, IGNORE_INDEX)
        if answered:
            labels[:, -1] = ids[:, -1]
        return TextBatch(ids, torch.ones_like(ids, dtype=torch.bool), labels)

    return QuestionBatch(
        ids=["a", "b"],
        ego_visible=[True, False],
        questions=questions,
        prompts=rows(2, answered=False),
        prompt_clip=torch.tensor([0, 1]),
        options=rows(2, answered=True),
        option_clip=torch.tensor([1, 1]),
        ego_video=tiny.video(2, 0),
        exo_video=tiny.video(2, 1),
    )


@STAGES
def test_1_fit_with_any_loader_of_clip_batches(toy_tokenizer, tmp_path, name):
    stage = make_stage(name, toy_tokenizer)
    stage.configure_model()
    before = weights(stage)
    trainer = plain_trainer(tmp_path, max_steps=2)
    trainer.fit(stage, batches())
    assert trainer.global_step == 2
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
    assert any(not torch.equal(before[key], tensor) for key, tensor in weights(stage).items())


@pytest.fixture(params=["stage2", "stage3"])
def interrupted(request, toy_tokenizer, tmp_path):
    """A stage after four steps, and the ModelCheckpoint file that another run left after two of them."""
    straight = make_stage(request.param, toy_tokenizer)
    plain_trainer(tmp_path, max_steps=4).fit(straight, same_batch(4))
    stage = make_stage(request.param, toy_tokenizer)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = plain_trainer(tmp_path, max_steps=4, enable_checkpointing=True, callbacks=[keep])
    trainer.fit(stage, same_batch(4))
    return straight, tmp_path / "step=2.ckpt"


def test_2_and_3_model_checkpoint_saves_what_fit_resumes_from(interrupted, tmp_path):
    straight, file = interrupted
    content = torch.load(file, weights_only=True)
    assert content["global_step"] == 2
    assert content["state_dict"].keys() == straight.state_dict().keys()  # everything, frozen parts included
    resumed = type(straight).load_from_checkpoint(file)
    assert any(not torch.equal(t, resumed.state_dict()[key]) for key, t in straight.state_dict().items())
    trainer = plain_trainer(tmp_path, max_steps=4)
    trainer.fit(resumed, same_batch(4), ckpt_path=file)
    assert trainer.global_step == 4
    assert_equal(weights(straight), weights(resumed))


def test_4_load_from_checkpoint_needs_the_file_alone(interrupted):
    straight, file = interrupted
    loaded = type(straight).load_from_checkpoint(file)
    assert loaded.network == straight.network and loaded.optim == straight.optim
    assert_equal(torch.load(file, weights_only=True)["state_dict"], loaded.state_dict())
    if hasattr(straight, "cycle"):
        assert loaded.cycle == straight.cycle


def test_5_save_weights_only(toy_tokenizer, tmp_path):
    stage = make_stage("stage2", toy_tokenizer)
    keep = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    trainer = plain_trainer(tmp_path, max_steps=2, enable_checkpointing=True, callbacks=[keep])
    trainer.fit(stage, batches(2))
    assert "optimizer_states" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    loaded = type(stage).load_from_checkpoint(tmp_path / "weights.ckpt")
    assert_equal(weights(stage), weights(loaded))


@STAGES
def test_6_and_7_calls_return_the_visual_tokens(toy_tokenizer, name):
    stage = make_stage(name, toy_tokenizer)
    stage.configure_model()
    stage.eval()
    video, model = tiny.video(2, 0), stage.model
    learner = "ego_encoder" in model.parts
    expected = {"ego": model.learner_tokens(video) if learner else model.demonstrator_tokens(video)}
    if "exo_encoder" in model.parts:
        expected["exo"] = model.demonstrator_tokens(video)
    assert torch.equal(stage(video), expected["ego"])
    for view, tokens in expected.items():
        assert torch.equal(stage(video, view), tokens)
        assert torch.equal(model(video, view), tokens)
    assert torch.equal(model(video), expected["ego"])


def test_a_view_without_an_encoder_is_refused(toy_tokenizer):
    stage = make_stage("stage3", toy_tokenizer)
    stage.configure_model()
    with pytest.raises(ValueError, match=r"view: got 'exo', but this model has only ego_encoder, projector"):
        stage(tiny.video(1, 0), "exo")


def test_8_hparams_hold_every_argument(toy_tokenizer):
    optim = OptimConfig(learning_rate=0.5, lr_mult={"projector": 2.0})
    stage = make_stage("stage2", toy_tokenizer, optim=optim, cycle=CycleConfig(weight=2.0), kl=KLConfig(tau=0.5))
    assert stage.hparams.network["encoder"]["width"] == tiny.WIDTH
    assert stage.hparams.optim["lr_mult"] == {"projector": 2.0}
    assert stage.hparams.cycle["weight"] == 2.0 and stage.hparams.kl["tau"] == 0.5
    assert stage.hparams.tokenizer == str(toy_tokenizer)
    assert stage.hparams.seed == 0


def test_9_max_epochs_with_any_loader(toy_tokenizer, tmp_path):
    stage = make_stage("stage3", toy_tokenizer)
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = plain_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[Rates()])
    trainer.fit(stage, batches(4))
    assert trainer.global_step == stage.total_steps() == 4
    assert rates[-1] == pytest.approx(0, abs=1e-12)  # the schedule ends with the last epoch
    with pytest.raises(ValueError, match=r"trainer.max_steps: got no limit: set max_steps or max_epochs"):
        plain_trainer(tmp_path, max_epochs=-1).fit(make_stage("stage3", toy_tokenizer), batches(4))


@STAGES
def test_10_validate_with_any_loader_of_question_batches(toy_tokenizer, tmp_path, name):
    stage = make_stage(name, toy_tokenizer)
    questions = DataLoader([question_batch(), question_batch()], batch_size=None)
    (metrics,) = plain_trainer(tmp_path).validate(stage, questions, verbose=False)
    scores = ("caption", "caption_verb", "qa_hand", "qa", "choice", "loss")
    assert metrics.keys() == {f"val/{view}_{score}" for view in stage.views for score in scores}
    assert len(stage.results.predictions) == 2 * 3 * len(stage.views)
    assert metrics["val/ego_loss"] > 0
    trainer = plain_trainer(tmp_path, max_steps=2, val_check_interval=2)
    trainer.fit(stage, batches(2), questions)
    assert "val/ego_choice" in trainer.callback_metrics
