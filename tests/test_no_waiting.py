"""A training step never reads a value back from the device, so that the host runs ahead of a GPU."""

import itertools

import lightning as L
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch, Demonstration, TextBatch
from lightning_modules.callbacks.finite_check import FiniteCheck
from lightning_modules.stages.guidance import ContrastiveConfig, CycleConfig, SelectionConfig

WAITING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.bincount,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.repeat_interleave,  # without output_size
}
STEPS = ["stage0", "stage1", "stage2", "stage3", "answers", "stored answers"]


class NoWaiting(TorchDispatchMode):
    """Refuse operators whose result, or its shape, the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, kwargs = func.overloadpacket, kwargs or {}
        assert packet not in WAITING or "output_size" in kwargs, f"{func} reads from the device"
        if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} with a mask reads its number of elements from the device"
        return func(*args, **kwargs)


def stage_and_batch(name, tokenizer, **changes):
    extra = {}
    if name == "stage0":
        extra = {"bow_weight": 0.5, "grounding_weight": 0.5, "num_frames": tiny.FRAMES}
    if name == "stage2":
        extra = {"contrastive": ContrastiveConfig(0.1), "cycle": CycleConfig(norm="channel_std")}
        extra["selection"] = SelectionConfig("likelihood", least=0.01)
    batch = tiny.clip_batch()
    if name == "stored answers":  # of one pair that is narrated and one that is not
        name, batch.narrated = "answers", torch.tensor([True, False])
        extra = {"demonstrations": "demonstrations", "init": {"exo_projector": "handoff:projector"}}
        extra["selection"] = SelectionConfig("right")
        likeliest, log_probs = torch.tensor([[3, 7]] * 5), torch.full((5, 2), -1.0)
        batch.demonstration = Demonstration(tiny.clip_batch().text, likeliest, log_probs, log_probs[:, 0])
    if name in ("stage2", "answers"):
        batch.other_exo_video = torch.stack([tiny.video(1, seed=20), tiny.video(1, seed=21)])
        batch.other_exo = torch.tensor([[True], [False]])
    stage = tiny.make_stage(name, tokenizer, **extra, **changes)
    batch.source, batch.source_names = torch.tensor([1, 0]), ("one", "two")
    return stage, batch.to("cpu")


def as_on_a_gpu(monkeypatch):
    """Skip the checks that are made where values are at hand, as on the CPU."""
    monkeypatch.setattr("lightning_modules.model.language_model._at_hand", lambda tensor: False)


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_reads_nothing_back(toy_tokenizer, monkeypatch, name):
    as_on_a_gpu(monkeypatch)
    stage, batch = stage_and_batch(name, toy_tokenizer)
    stage.configure_model()
    stage.train()
    _ = stage.tokenizer  # read before the step
    optimizer = stage.optim.optimizer((part, parameter) for part, _, parameter in stage.trainable())
    with NoWaiting():
        stage.training_step(batch, 0).backward()
        stage.on_before_optimizer_step(optimizer)
        parameters = [parameter for _, _, parameter in stage.trainable()]
        stage.gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        stage.configure_gradient_clipping(optimizer, 1.0, "norm")
    assert stage.source_losses is not None


@pytest.mark.parametrize("name", STEPS[1:])
def test_losses_need_no_values(toy_tokenizer, name):
    """On the meta device there are none, so any look at a value or a number of elements is an error."""
    stage, batch = stage_and_batch(name, toy_tokenizer)
    stage.attach(stage.on_meta())
    stage.to("meta")
    stage.train()
    losses = stage.losses(batch.to("meta"))
    sum(losses.values()).backward()
    assert all(loss.is_meta for loss in losses.values())


def test_the_check_sees_operators_that_wait():
    values = torch.arange(3)
    for wait in (
        lambda: values.sum().item(),
        lambda: bool((values > 1).all()),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: values.tolist() and int(values[0]),
        lambda: values.repeat_interleave(values),
    ):
        with NoWaiting(), pytest.raises(AssertionError, match="from the device"):
            wait()


@pytest.mark.parametrize("seed", range(4))
def test_places_of_supervised_tokens_known_on_the_host_are_those_in_the_labels(toy_tokenizer, seed):
    """Rows with and without a placeholder, supervised in several turns, the first token supervised or not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (5, 9), generator=generator)
    for row, column in enumerate(torch.randint(0, 5, (4,), generator=generator).tolist()):
        ids[row, column] = VIDEO_TOKEN_ID
    mask = torch.arange(9)[None] < torch.randint(5, 10, (5, 1), generator=generator)
    chosen = torch.rand(5, 9, generator=generator) < 0.5
    labels = ids.where(mask & chosen & (ids != VIDEO_TOKEN_ID), IGNORE_INDEX)
    text = TextBatch(ids.where(mask, 0), mask, labels).to("cpu")
    stage = tiny.make_stage("stage1", toy_tokenizer)
    stage.configure_model()
    model = stage.model.language_model
    visual = torch.randn(5, 3, model.dim, generator=generator)
    known = model.splice(text.input_ids, text.attention_mask, text.labels, visual, text.supervised)
    looked_up = model.splice(text.input_ids, text.attention_mask, text.labels, visual)
    assert known.supervised.tolist() == looked_up.supervised.tolist()
    with torch.no_grad():
        (logits, targets), (others, expected) = (model.supervised_logits(each) for each in (known, looked_up))
    assert torch.equal(logits, others) and torch.equal(targets, expected)


class Clipped(L.Callback):
    """Records the norm after clipping, and how often a norm of all gradients is computed."""

    def __init__(self):
        self.norms = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))


def test_the_norm_for_clipping_is_computed_once_and_clips_as_before(toy_tokenizer, tmp_path, monkeypatch):
    computed = itertools.count()
    usual = torch.nn.utils.get_total_norm

    def counted(*args, **kwargs):
        next(computed)
        return usual(*args, **kwargs)

    monkeypatch.setattr("torch.nn.utils.get_total_norm", counted)
    monkeypatch.setattr("torch.nn.utils.clip_grad._get_total_norm", counted)
    results = {}
    for kind, callbacks in (("shared", [FiniteCheck()]), ("alone", [])):
        stage, _ = stage_and_batch("stage2", toy_tokenizer)
        clipped = Clipped()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=2,
            gradient_clip_val=0.01,
            callbacks=[*callbacks, clipped],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        before = next(computed)
        trainer.fit(stage, torch.utils.data.DataLoader(Batches(4), batch_size=None, collate_fn=lambda item: item))
        results[kind] = [p.detach().clone() for p in stage.parameters()], next(computed) - before - 1
        assert clipped.norms and all(norm <= 0.0101 for norm in clipped.norms)
    assert results["shared"][1] == results["alone"][1] == 2
    assert all(torch.equal(a, b) for a, b in zip(results["shared"][0], results["alone"][0], strict=True))


class Batches(torch.utils.data.Dataset[ClipBatch]):
    """A few equal batches."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index >= self.length:
            raise IndexError(index)
        return tiny.clip_batch(index)
