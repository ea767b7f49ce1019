"""The curves of a mix: each source's share and loss, over micro-batches and over ranks, at no cost to the loss."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from datamodules.batch import IGNORE_INDEX
from lightning_modules.callbacks import throughput
from lightning_modules.callbacks.throughput import TrainingMonitor
from lightning_modules.losses import loss_by_source

NAMES = ("egtea", "ssv2", "openeqa")


def mixed_batch(*source, seed=0):
    """Two clips of three and two supervised tokens."""
    batch = tiny.clip_batch(seed)
    batch.source_names, batch.source = NAMES, torch.tensor(source)
    return batch


def test_losses_by_source_by_hand():
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    got = loss_by_source(logits, torch.tensor([0, 0, 1]), torch.tensor([2, 0, 2]), 3)
    log2, sure = torch.log(torch.tensor(2.0)), torch.log1p(torch.exp(torch.tensor(-3.0)))
    torch.testing.assert_close(got, torch.tensor([[sure, 1], [0, 0], [2 * log2, 2]]))
    assert loss_by_source(logits[:0], torch.zeros(0).long(), torch.zeros(0).long(), 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("name", tiny.STAGES)
def test_knowing_the_sources_does_not_change_the_loss(toy_tokenizer, name):
    stage = tiny.make_stage(name, toy_tokenizer)
    stage.configure_model()
    stage.eval()
    plain = stage.losses(tiny.clip_batch())
    assert stage.source_losses is None
    mixed = stage.losses(mixed_batch(2, 0))
    assert plain.keys() == mixed.keys()
    assert all(torch.equal(plain[loss], mixed[loss]) for loss in plain)
    assert not stage.source_losses.requires_grad
    losses, tokens = stage.source_losses.T
    assert tokens.tolist() == [2, 0, 3]
    torch.testing.assert_close(losses.sum() / 5, plain["vtg"].detach())  # the batch's tokens are five


def test_each_source_gets_the_tokens_of_its_own_clips(toy_tokenizer):
    stage = tiny.make_stage("stage3", toy_tokenizer)
    stage.configure_model()
    stage.eval()
    stage.losses(mixed_batch(1, 0))
    together = stage.source_losses.clone()
    for row, source in ((0, 1), (1, 0)):
        batch = mixed_batch(1, 0)
        batch.text.labels[1 - row] = IGNORE_INDEX
        logits, targets = stage.read_text(stage.model.learner_tokens(batch.ego_video), batch)
        alone = F.cross_entropy(logits, targets, reduction="sum").detach()
        torch.testing.assert_close(together[source, 0], alone)


def curves(folder, stage, batches, **options):
    logger = CSVLogger(folder, name="", version="")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(stage, DataLoader(batches, batch_size=None))
    header, *rows = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    return [{key: float(cell) for key, cell in zip(header, row, strict=True) if cell} for row in rows]


def test_shares_and_losses_are_written_over_all_micro_batches_since_the_last_write(toy_tokenizer, tmp_path):
    batches = [mixed_batch(0, 1), mixed_batch(1, 1), mixed_batch(2, 2), mixed_batch(2, 0)]
    stage = tiny.make_stage("stage3", toy_tokenizer)
    kept = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(pl_module.source_losses.clone())

    options = {"max_steps": 2, "accumulate_grad_batches": 2, "callbacks": [Keep(), TrainingMonitor(every_n_steps=1)]}
    first, second = curves(tmp_path, stage, batches, **options)
    assert [first[f"data/share_{name}"] for name in NAMES] == [1 / 4, 3 / 4, 0]
    assert [second[f"data/share_{name}"] for name in NAMES] == [1 / 4, 0, 3 / 4]
    for written, parts in ((first, kept[:2]), (second, kept[2:])):
        losses, tokens = sum(parts).T
        for name, loss, count in zip(NAMES, losses.tolist(), tokens.tolist(), strict=True):
            key = f"data/loss_{name}"
            assert (key in written) == (count > 0)
            if count:
                assert written[key] == pytest.approx(loss / count, rel=1e-5)


def test_nothing_is_written_where_nothing_is_mixed(toy_tokenizer, tmp_path):
    options = {"max_steps": 1, "callbacks": [TrainingMonitor(every_n_steps=1)]}
    (written,) = curves(tmp_path, tiny.make_stage("stage3", toy_tokenizer), [tiny.clip_batch()], **options)
    assert "train/loss" in written
    assert not [key for key in written if key.startswith("data/")]


def test_the_last_line_gives_the_peak_memory_of_the_whole_run(toy_tokenizer, tmp_path, monkeypatch, capsys):
    peaks = iter([1.0, 2.0, 3.0, 9.5])
    monkeypatch.setattr(throughput, "_peak_gib", lambda device: next(peaks))
    options = {"max_steps": 4, "callbacks": [TrainingMonitor(every_n_steps=1)]}
    curves(tmp_path, tiny.make_stage("stage3", toy_tokenizer), [tiny.clip_batch()] * 4, **options)
    assert "peak memory 9.5 GiB" in capsys.readouterr().out


class ByRank(IterableDataset):
    """Another batch on each rank: one source on the first, two on the second."""

    def __iter__(self):
        yield mixed_batch(*((0, 0) if dist.get_rank() == 0 else (1, 2)), seed=dist.get_rank())


def test_ranks_are_counted_together(toy_tokenizer, tmp_path):
    stage = tiny.make_stage("stage3", toy_tokenizer, network=tiny.network(dropout=0.0))
    options = {"devices": 2, "strategy": "ddp_spawn", "max_steps": 1, "callbacks": [TrainingMonitor(every_n_steps=1)]}
    (written,) = curves(tmp_path, stage, ByRank(), **options)
    assert [written[f"data/share_{name}"] for name in NAMES] == [2 / 4, 1 / 4, 1 / 4]
    alone = tiny.make_stage("stage3", toy_tokenizer, network=tiny.network(dropout=0.0))
    alone.configure_model()
    for rank, sources in enumerate([(0, 0), (1, 2)]):
        alone.losses(mixed_batch(*sources, seed=rank))
        for source in set(sources):
            loss, tokens = alone.source_losses[source].tolist()
            assert written[f"data/loss_{NAMES[source]}"] == pytest.approx(loss / tokens, rel=1e-5)
