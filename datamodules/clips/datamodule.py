"""Base class of the data modules of all stages: training batches, validation questions, checks of the configuration."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import BenchmarkBatch
from datamodules.clips.dataset import ClipConfig, ClipTextDataset
from datamodules.clips.folders import require_data
from datamodules.clips.loader import ResumableLoader
from datamodules.clips.sampler import GlobalBatchSampler
from datamodules.clips.validation import ValidationDataset
from datamodules.clips.workers import WorkerLoader
from datamodules.text import CHAT, PromptConfig, TextEncoder, unknown_words
from datamodules.video.errors import ClipDecodeError
from datamodules.video.reader import ClipReader
from datamodules.video.remote import data_path

VALIDATION_BATCH = 32
_TEXTS_SAMPLED = 256


class ClipDataModule(L.LightningDataModule, ABC):
    """Training samples of a stage, and the validation questions that every stage is scored on.

    Args:
        root: folder that all video paths are relative to, or an address such as ``s3://bucket/takes``.
        tokenizer: folder or hub name of a Hugging Face tokenizer.
        clips: frames of a clip.
        global_batch_size: samples of one optimiser step, over all ranks and accumulated micro-batches.
        held_out: JSON Lines of validation clips with questions, see ``ValidationRecord``; null for none.
        seed: seed of the order of samples.
        num_workers: decoding processes per rank; 0 decodes in the training process.
        max_text_tokens: longest text, the clip not counted.
        prompt: text around questions and answers.
        pad_to_multiple_of: pad training texts to a multiple of this many tokens, so that batches have few shapes and
            compiled code is reused; 1 pads to the longest text of a micro-batch.
        micro_batch_size: samples on a device at a time, from which the number of accumulated micro-batches follows;
            null to derive it from ``trainer.accumulate_grad_batches``.
        shuffle_block_groups: shuffle recordings, and samples within blocks of that many, so that open files are
            reused; 0 shuffles all samples together.
        max_corrupt_fraction: fraction of samples that may be corrupt before training stops, see ``ResumableLoader``.
        decode_timeout_s: longest wait for one video file, in seconds; a clip that takes longer counts as corrupt.

    Raises:
        ValueError: ``root`` or ``held_out`` is missing, a line of ``held_out`` is invalid, or a number is impossible.
    """

    def __init__(
        self,
        root: str,
        tokenizer: str,
        clips: ClipConfig,
        global_batch_size: int,
        held_out: str | None = None,
        seed: int = 0,
        num_workers: int = 1,
        max_text_tokens: int = 2048,
        prompt: PromptConfig = CHAT,
        micro_batch_size: int | None = None,
        shuffle_block_groups: int = 0,
        max_corrupt_fraction: float = 0.01,
        decode_timeout_s: float = 60.0,
        pad_to_multiple_of: int = 1,
    ) -> None:
        super().__init__()
        for key, number, least in (
            ("global_batch_size", global_batch_size, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("shuffle_block_groups", shuffle_block_groups, 0),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("pad_to_multiple_of", pad_to_multiple_of, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"data.{key}: got {number}, allowed: {least} or more")
        if not 0 <= max_corrupt_fraction <= 1:
            raise ValueError(f"data.max_corrupt_fraction: got {max_corrupt_fraction}, allowed: from 0 to 1")
        if not decode_timeout_s > 0:
            raise ValueError(f"data.decode_timeout_s: got {decode_timeout_s}, allowed: above 0")
        require_data(root, held_out)
        self.root, self.held_out = data_path(root), None if held_out is None else Path(held_out)
        self.clips, self.global_batch_size, self.seed, self.num_workers = clips, global_batch_size, seed, num_workers
        self.micro_batch_size, self.shuffle_block_groups = micro_batch_size, shuffle_block_groups
        self.max_corrupt_fraction, self.decode_timeout_s = max_corrupt_fraction, decode_timeout_s
        self.pad_to_multiple_of = pad_to_multiple_of
        self.encoder = TextEncoder(tokenizer, max_text_tokens, prompt)
        self.train_set: ClipTextDataset | None = None
        self.benchmarks: list[Dataset[BenchmarkBatch]] = []  # evaluated at every validation
        if held_out is not None:
            self.held_out_set()  # so that an invalid file stops a run at its start, not at the first validation
        # There may be fewer validation clips than ranks.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @abstractmethod
    def read(self) -> ClipTextDataset:
        """Read annotations and return the training samples, without decoding a video."""

    @abstractmethod
    def annotation_files(self) -> list[Path]:
        """Return the files that define the training samples; the fingerprint is computed from their bytes."""

    def setup(self, stage: str) -> None:
        """Read the annotations once, for training only."""
        if stage == "fit" and self.train_set is None:
            self.train_set = self.read()
            self.train_set.reader = ClipReader(timeout_s=self.decode_timeout_s)
            self.train_set.pad_to_multiple_of = self.pad_to_multiple_of
            samples = self.train_set.epoch_length
            if samples < self.global_batch_size:
                raise ValueError(
                    f"data.global_batch_size: got {self.global_batch_size}, but there are only {samples} "
                    "training samples"
                )
            self._warn_of_unknown_words()

    def _warn_of_unknown_words(self) -> None:
        """Warn if the tokenizer lacks words of a sample of the training texts, or of the validation questions."""
        assert self.train_set is not None, "setup() comes first"
        sample = torch.linspace(0, len(self.train_set) - 1, min(len(self.train_set), _TEXTS_SAMPLED)).long().tolist()
        texts = {"training texts": [text for index in sample for text in self.train_set.words(index, 0)]}
        if self.held_out is not None:
            questions = self.held_out_set().all_questions()
            texts[str(self.held_out)] = [text for q in questions for text in (q.question, q.answer, *q.options)]
        for name, found in texts.items():
            if unknown := unknown_words(self.encoder.tokenizer, found):
                rank_zero_only(print)(f"warning: {name}: {unknown}", file=sys.stderr)

    def fingerprint(self) -> str:
        """Return the SHA-256 over the annotation files, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for file in self.annotation_files():
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    def steps_per_epoch(self) -> int:
        """Return the optimiser steps of one epoch."""
        assert self.train_set is not None, "setup() comes first"
        return self.train_set.epoch_length // self.global_batch_size

    def accumulation(self, world: int) -> int:
        """Return the micro-batches of one optimiser step on each of ``world`` ranks, if ``micro_batch_size`` is set.

        Raises:
            ValueError: the global batch cannot be split in this way.
        """
        together, size = self.global_batch_size, self.micro_batch_size
        assert size is not None, "without micro_batch_size the Trainer says how many are accumulated"
        if together % (world * size):
            # Name the nearest settings that fit.
            below, share = together // (world * size) * world * size, together // world
            fits = [f"global_batch_size {n}" for n in (below, below + world * size) if n]
            if together % world == 0:
                sizes = [n for n in range(1, share + 1) if share % n == 0]
                fits += [f"micro_batch_size {n}" for n in sorted(sorted(sizes, key=lambda n: abs(n - size))[:2])]
            raise ValueError(
                f"data.global_batch_size: {together} does not split into {world} ranks times micro-batches of "
                f"{size} (data.micro_batch_size); near it, these do: {', '.join(fits)}"
            )
        return together // (world * size)

    def sample_frames(self, clips: int) -> Tensor:
        """Read the frames of evenly spread training clips, uint8 [at most clips * views * T, S, S, 3].

        Clips that cannot be read are left out here, and reported when their turn in training comes.

        Raises:
            ClipDecodeError: none of them can be read.
        """
        assert self.train_set is not None, "setup() comes first"
        frames: list[Tensor] = []
        failure: ClipDecodeError | None = None
        for index in torch.linspace(0, len(self.train_set) - 1, clips).long().tolist():
            try:
                span = self.train_set.span(index, 0)
                frames += self.train_set.videos(span).values() if span.paths else ()
            except ClipDecodeError as error:
                failure = error
        if failure is not None and not frames:
            raise failure
        return torch.cat(frames)

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of this rank's shuffled micro-batches."""
        assert self.train_set is not None and self.trainer is not None, "the Trainer calls this"
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if self.global_batch_size % (accumulate * world):
            raise ValueError(
                f"data.global_batch_size: {self.global_batch_size} does not split into {world} ranks times "
                f"{accumulate} accumulated micro-batches (trainer.accumulate_grad_batches)"
            )
        if self.micro_batch_size is not None and accumulate != self.accumulation(world):
            raise ValueError(
                f"trainer.accumulate_grad_batches: got {accumulate}, but data.micro_batch_size {self.micro_batch_size} "
                f"needs {self.accumulation(world)}: set it to that"
            )
        sampler = GlobalBatchSampler(
            self.train_set.epoch_length,
            self.global_batch_size,
            accumulate,
            self.trainer.global_rank,
            world,
            self.seed,
            self.train_set.groups() if self.shuffle_block_groups else None,
            self.shuffle_block_groups,
            self.train_set.epoch_samples,
        )
        longest_s = self._longest_wait_s(self.global_batch_size // (accumulate * world))
        return ResumableLoader(self.train_set, sampler, self.num_workers, self.max_corrupt_fraction, longest_s)

    def _longest_wait_s(self, clips: int) -> float:
        """Return the time limit of a batch; it must not end before those of its files, and catches all other hangs."""
        return 300 + self.decode_timeout_s * clips

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Held-out questions, then the samples of each benchmark."""
        return [*self.test_dataloader(), *(self._share(benchmark, list) for benchmark in self.benchmarks)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader of the validation questions, if there are any."""
        if self.held_out is None:
            return []
        dataset = self.held_out_set()
        return [self._share(dataset, dataset.collate)]

    def _share(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        """Return a loader of this rank's share of clips, in a fixed order whose first batches come from many takes."""
        assert self.trainer is not None, "the Trainer calls this"
        order = np.random.default_rng(0).permutation(len(dataset))  # type: ignore[arg-type]
        return WorkerLoader(
            dataset,
            sampler=order[self.trainer.global_rank :: self.trainer.world_size].tolist(),
            batch_size=VALIDATION_BATCH,
            collate_fn=collate,
            num_workers=self.num_workers,
            timeout=self._longest_wait_s(VALIDATION_BATCH) if self.num_workers else 0,
        )

    def held_out_set(self) -> ValidationDataset:
        """Return the validation clips.

        Raises:
            ValueError: there are none, or a line of the file is invalid.
        """
        if self.held_out is None:
            raise ValueError("data.held_out: got null, but validation clips are needed: set data.init_args.held_out")
        return ValidationDataset(self.root, self.held_out, self.clips, self.encoder, self.decode_timeout_s)
