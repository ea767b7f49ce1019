"""Compute the demonstrator's answers about all pairs once, for stage 2 to read: ``make demonstrate``.

The demonstrator is frozen in stage 2 and sees no augmentation, so that its answers about a pair never change.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.batch import IGNORE_INDEX, ClipBatch
from datamodules.clips.loader import ResumableLoader
from datamodules.clips.sampler import BatchRequest, GlobalBatchSampler
from datamodules.ego_exo_clip.datamodule import EgoExoClipDataModule, EgoExoClipDataset
from datamodules.ego_exo_clip.demonstrations import Answer, Demonstrations, split_by_shard
from lightning_modules.config import ConfigError
from lightning_modules.run import Run, build, build_stage
from lightning_modules.stages.answer_guidance import AnswerGuidance
from lightning_modules.weights.tensors import content_digest

_PARTS = ("exo_encoder", "exo_projector", "language_model")
_MICRO_BATCH = 16


class Demonstrator(AnswerGuidance):
    """The frozen demonstrator of stage 2 alone: exocentric encoder, the projector of stage 1, language model."""

    uses = ("exo_encoder", "language_model")

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        """Return the answers about the clips of a ``ClipBatch``, a list of ``Answer``."""
        return self.model.run(self._answer, batch)

    @torch.no_grad()
    def _answer(self, batch: ClipBatch) -> list[Answer]:
        exo = self.model.exo_encoder(self.video_of(batch, "exo"))
        rows, distributions = self.demonstrate(exo, batch)
        top = distributions.top(self.top_k)
        assert top.tokens is not None and top.log_rest is not None
        labels = rows.labels[:, 1:]
        words = labels[labels != IGNORE_INDEX]
        counts = (labels != IGNORE_INDEX).sum(1).tolist()
        parts = [part.cpu().split(counts) for part in (words, top.tokens, top.log_probs, top.log_rest)]
        return [Answer(*of_clip) for of_clip in zip(*parts, strict=True)]


def demonstrate(config: dict[str, Any], force: bool = False) -> None:
    """Compute the answers about all pairs that have none yet; an interrupted call resumes with the same bytes.

    Each process computes shards of its own.

    Args:
        config: resolved configuration of stage 2.
        force: discard answers that exist.

    Raises:
        ConfigError: the stage reads no demonstrations.
        ValueError: weights or data are missing, or the folder has demonstrations of another demonstrator.
    """
    run = build(demonstrator_config(config))
    datamodule = _paired(run)
    datamodule.setup("fit")
    began = time.monotonic()
    work = _Work(config, run, force)
    demonstrations, is_rank_zero = work.demonstrations, run.trainer.is_global_zero
    if not force and demonstrations.is_complete(work.pairs):
        if is_rank_zero:
            demonstrations.require_same(settings(config, datamodule))
            print(f"{demonstrations.folder} has all {len(work.pairs):,} pairs; FORCE=1 computes them again")
        return
    run.trainer.callbacks.append(_ShardWriter(work))  # type: ignore[attr-defined]
    run.trainer.predict(run.stage, datamodule=work, return_predictions=False)
    run.trainer.strategy.barrier()
    if is_rank_zero:
        demonstrations.require_all(work.pairs)
        problems = sum(demonstrations.problem(pair) is not None for pair in work.pairs.tolist())
        size = sum(file.stat().st_size for file in demonstrations.folder.glob("*.safetensors"))
        print(
            f"{demonstrations.folder}: demonstrations of {len(work.pairs):,} pairs, {problems:,} of them corrupt, "
            f"{size / 1e6:,.1f} MB, {work.computed:,} computed by this process in {time.monotonic() - began:,.0f} s"
        )


def use_demonstrations(run: Run) -> None:
    """Give the data of stage 2 the stored answers, if it reads any.

    The first process compares them with the demonstrator and the pairs.

    Raises:
        ConfigError: the data are no synchronised pairs.
        DemonstrationsError: answers are missing, or those of another demonstrator.
    """
    if not isinstance(run.stage, AnswerGuidance) or run.stage.demonstrations is None:
        return
    datamodule = _paired(run)
    datamodule.demonstrations = demonstrations_of(run.config)
    if not run.stage.encodes_exo:
        datamodule.views = [view for view in datamodule.views if view != "exo"]
    if run.trainer.is_global_zero:
        datamodule.setup("fit")
        dataset = datamodule.train_set
        assert isinstance(dataset, EgoExoClipDataset)
        datamodule.demonstrations.require_same(settings(run.config, datamodule))
        datamodule.demonstrations.require_all(dataset.used_pairs())


def demonstrations_of(config: dict[str, Any]) -> Demonstrations:
    """Return the demonstrations that a configuration names.

    Raises:
        ConfigError: it names none.
    """
    folder = config["model"]["init_args"].get("demonstrations")
    if folder is None:
        raise ConfigError(
            f"model.init_args.demonstrations: got null in {config['stage']} of {config['experiment']}: use "
            "lightning_modules.AnswerGuidance, and name a folder for the demonstrator's answers"
        )
    if config["data"]["init_args"].get("exo_policy") == "mean":
        raise ConfigError(
            "data.init_args.exo_policy: got mean, but demonstrations are of one camera each: set "
            "model.init_args.demonstrations to null, or exo_policy to all, best, random, best_first or best_last"
        )
    runs = str(config.get("runs", "runs"))
    elsewhere = "" if runs == "runs" else f" RUNS={runs}"
    return Demonstrations(Path(folder), f"make demonstrate EXPERIMENT={config['experiment']}{elsewhere}")


def demonstrator_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of stage 2 with the demonstrator alone, and every exocentric camera as a sample."""
    demonstrations_of(config)
    changed = copy.deepcopy(config)
    init_args = changed["model"]["init_args"]
    init = {part: source for part, source in (init_args.get("init") or {}).items() if part in _PARTS}
    init_args |= {"init": init, "demonstrations": None, "train": []}
    changed["model"]["class_path"] = f"{Demonstrator.__module__}.{Demonstrator.__name__}"
    changed["data"]["init_args"] |= {"views": ["exo"], "exo_policy": "all", "held_out": None}
    changed["trainer"]["logger"] = False
    return changed


def build_demonstrator(config: dict[str, Any]) -> Demonstrator:
    """Make the demonstrator of a configuration of stage 2; files that it names need not exist."""
    stage = build_stage(demonstrator_config(config))
    assert isinstance(stage, Demonstrator)
    return stage


def settings(config: dict[str, Any], datamodule: EgoExoClipDataModule) -> dict[str, Any]:
    """Return everything that the answers depend on, by name: weights, shapes, frames, texts and precision.

    Args:
        config: resolved configuration of stage 2.
        datamodule: of it, or of the demonstrator, set up.
    """
    stage = build_demonstrator(config)
    assert isinstance(datamodule.train_set, EgoExoClipDataset)
    dataset, network = datamodule.train_set, stage.network
    vocabulary = [sorted(stage.tokenizer.get_vocab().items()), stage.tokenizer.eos_token_id]
    weights = {f"weights of {part}": content_digest(found.tensors) for part, found in stage.sources.items()}
    return weights | {
        "network": {key: asdict(getattr(network, key)) for key in ("encoder", "projector", "language_model")},
        "clips": asdict(datamodule.clips),
        "index": datamodule.fingerprint(),
        "narrated takes": hashlib.sha256(dataset.narrated.tobytes()).hexdigest()[:16],
        "tokenizer": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16],
        "prompt": dataset.prompt,
        "max_text_tokens": datamodule.encoder.max_text_tokens,
        "answer_tokens": stage.answer_tokens,
        "top_k": stage.top_k,
        "kl.tau": stage.kl.tau,
        "precision": [
            str(config["trainer"].get("precision", "32-true")),
            stage.quantization or str(stage.frozen_dtype),
        ],
    }


def _paired(run: Run) -> EgoExoClipDataModule:
    if not isinstance(run.datamodule, EgoExoClipDataModule):
        raise ConfigError(
            f"data.class_path: got {type(run.datamodule).__name__}, but demonstrations are about synchronised pairs: "
            "use datamodules.EgoExoClipDataModule, or set model.init_args.demonstrations to null"
        )
    return run.datamodule


class _Work(L.LightningDataModule):
    """The pairs without an answer, by whole shards, distributed over the processes.

    Args:
        config: resolved configuration of stage 2.
        run: of the demonstrator, whose data have been set up.
        force: discard answers that exist.
    """

    def __init__(self, config: dict[str, Any], run: Run, force: bool) -> None:
        super().__init__()
        self.config, self.force = config, force
        self.source = _paired(run)
        dataset = self.source.train_set
        assert isinstance(dataset, EgoExoClipDataset)
        self.dataset = dataset
        self.demonstrations = demonstrations_of(config)
        self.pairs = dataset.used_pairs(config["data"]["init_args"].get("exo_policy", "all"))
        self.batches: list[tuple[int, NDArray[np.int64], bool]] = []
        self.computed = 0
        self.prepare_data_per_node = False  # all nodes share the folder

    def prepare_data(self) -> None:
        """Check or write the manifest, in the first process while the others wait."""
        if self.force:
            self.demonstrations.discard()
        self.demonstrations.begin(settings(self.config, self.source))

    def predict_dataloader(self) -> _Loader:
        """Return the loader of this process's shards; Lightning starts no process before all have called this."""
        assert self.trainer is not None, "the Trainer calls this"
        missing = self.demonstrations.missing(self.pairs)
        shards = [shard for shard, _ in split_by_shard(missing)]
        rank, world = self.trainer.global_rank, self.trainer.world_size
        wanted = dict(split_by_shard(self.pairs))
        for shard in shards[rank::world]:
            self.batches += self._batches_of(shard, wanted[shard])
        if not self.batches and shards:
            # With nothing to do, a process would not take part in gathering: it computes something that is not kept.
            shard, pairs, _ = self._batches_of(shards[0], wanted[shards[0]])[0]
            self.batches = [(shard, pairs, False)]
        return _Loader(self)

    def _batches_of(self, shard: int, pairs: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64], bool]]:
        """Return the batches of a shard: always the same, so that the shard always has the same bytes."""
        size = self.source.micro_batch_size or _MICRO_BATCH
        parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        return [(shard, part, part is parts[-1]) for part in parts]


class _Order(GlobalBatchSampler):
    """The order of a list of batches, for ``ResumableLoader``."""

    def __init__(self, batches: list[tuple[int, NDArray[np.int64], bool]]) -> None:
        super().__init__(len(batches), 1, 1, 0, 1, 0)
        self.batches = batches

    def __iter__(self) -> Iterator[BatchRequest]:
        """Yield the requests from batch ``start`` onwards."""
        for _, pairs, _ in self.batches[self.start :]:
            yield BatchRequest(0, pairs.tolist(), pairs.tolist(), 1)


class _Loader:
    """Reads the batches of this process; stops like training where too many clips are corrupt.

    Lightning would make a DataLoader of its own out of one.
    """

    def __init__(self, work: _Work) -> None:
        self.work = work

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.work.batches)

    def __iter__(self) -> Iterator[ClipBatch]:
        """Yield the batches."""
        source = self.work.source
        longest_s = 300 + source.decode_timeout_s * (source.micro_batch_size or _MICRO_BATCH)
        loader = ResumableLoader(
            self.work.dataset, _Order(self.work.batches), source.num_workers, source.max_corrupt_fraction, longest_s
        )
        yield from loader


class _ShardWriter(L.Callback):
    """Write a shard as soon as its last batch is answered."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        self.answers: list[Answer] = []
        self.pairs: list[int] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ClipBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the answers of a batch, and write the shard if it is complete."""
        _, pairs, is_last = self.work.batches[batch_idx]
        reasons = dict(line.split(": ", 1) for line in batch.corrupt)
        for name, is_valid, answer in zip(batch.ids, batch.valid.tolist(), outputs, strict=True):
            problem = "" if is_valid else reasons[name]
            self.answers.append(Answer(answer.words, answer.likeliest, answer.log_probs, answer.log_rest, problem))
        self.pairs += pairs.tolist()
        if is_last:
            self.work.demonstrations.write(self.pairs, self.answers)
            self.work.computed += len(self.pairs)
            self.answers, self.pairs = [], []
