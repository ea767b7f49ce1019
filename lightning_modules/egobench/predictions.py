"""Predictions of one model on any number of benchmarks; an interrupted evaluation resumes.

::

    <folder>/
      predictions/<benchmark>.jsonl           one row per sample, see ``scores``
      predictions/<benchmark>.texts.jsonl     candidates that all samples share
      predictions/<benchmark>.header.json     number of samples, the missing ones, and the settings of the evaluation
      predictions/<benchmark>.part<n>.jsonl   results of process n, until all are complete
      submissions/<benchmark>/...             files for the authors' servers; never sent
      metrics.json  results.md                computed from the predictions alone, again by ``make score``
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.batch import BenchmarkBatch
from datamodules.clips.workers import WorkerLoader
from datamodules.egobench.dataset import BenchmarkDataset
from datamodules.io.atomic import atomic_path
from lightning_modules.egobench.scoring import candidate_rows, header_fields
from lightning_modules.egobench.tasks import TASKS
from lightning_modules.egobench.tasks.base import Result
from lightning_modules.egobench.tasks.multiple_choice import MultipleChoice

Places = Mapping[str, Mapping[int, tuple[Path, int]]]
"""File and byte offset of the result for each clip of a sample, by sample id."""


class OtherPredictions(ValueError):
    """A folder holds predictions of another model or other settings; none of them are changed."""


class Predictions:
    """The prediction files of one benchmark.

    Args:
        dataset: the benchmark.
        folder: of the files.
        model: JSON that identifies the model.

    Raises:
        ValueError: no sample has its videos.
    """

    def __init__(self, dataset: BenchmarkDataset, folder: Path, model: Mapping[str, Any]) -> None:
        self.dataset, self.loaded = dataset, dataset.loaded
        self.rows = folder / f"{self.loaded.name}.jsonl"
        self.texts = folder / f"{self.loaded.name}.texts.jsonl"
        self.header = folder / f"{self.loaded.name}.header.json"
        content = repr((self.loaded.samples, self.loaded.candidates))
        inputs = [each for sample in self.loaded.samples for each in sample.shown]
        if inputs:
            content += repr([(each.text, [clip.view for clip in each.clips]) for each in inputs])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.settings = json.loads(json.dumps({**model, **dataset.settings(), "items": digest}))
        self.missing = self.loaded.missing()
        if len(self.missing) == len(self.loaded.samples):
            first = next(iter(self.missing.values()))
            raise ValueError(
                f"egobench.benchmarks: {self.loaded.name}: none of its videos is below {self.loaded.videos}, such as "
                f"{first}: put them there, or correct videos"
            )

    def require_same(self) -> None:
        """Compare the settings with those of existing predictions.

        Raises:
            OtherPredictions: the folder holds predictions of another model, other samples or other settings.
        """
        if not self.header.is_file():
            return
        before = json.loads(self.header.read_text(encoding="utf-8"))["settings"]
        keys = sorted(before.keys() | self.settings.keys())
        changed = [key for key in keys if before.get(key) != self.settings.get(key)]
        if changed:
            raise OtherPredictions(
                f"{self.rows}: was made with different {', '.join(changed)}: FORCE=1 evaluates again, or move the file "
                "away"
            )

    def summary(self) -> str:
        """Return how many samples have their videos, and the first file that is missing."""
        samples, absent = len(self.loaded.samples), len(self.missing)
        text = f"{self.loaded.name}: {samples - absent:,} of {self.loaded.total:,} samples, {len(self.dataset):,} clips"
        if not absent:
            return text
        first = self.loaded.videos / next(iter(self.missing.values()))
        return f"{text}; {absent:,} samples are left out because videos are missing, such as {first}"

    def discard(self) -> None:
        """Delete all files; the header, which names the model of the others, comes last."""
        for file in (self.rows, self.texts, *self._parts(), self.header):
            file.unlink(missing_ok=True)

    def begin(self) -> None:
        """Write the header, before the first result."""
        self.rows.parent.mkdir(parents=True, exist_ok=True)
        self._not_missing(name for name, _, _ in _lines(self.rows))
        self._write_header()

    def remaining(self) -> list[int]:
        """Return the entries of the dataset without a result, except for those of missing videos."""
        offsets, places, _ = self._finished()
        return self._remaining(offsets, places)

    def part(self, process: int) -> Path:
        """Return the file for the results of one process."""
        return self.rows.with_name(f"{self.loaded.name}.part{process}.jsonl")

    def join(self) -> None:
        """Write all results to one file, a row per sample in the official order, and delete the parts.

        Nothing happens before every clip is evaluated.
        """
        offsets, places, errors = self._finished()
        remaining = self._remaining(offsets, places)
        if remaining:
            rank_zero_warn(
                f"{self.loaded.name}: {len(remaining):,} clips were not evaluated (trainer.limit_predict_batches, or "
                "videos that appeared meanwhile): evaluate again for them"
            )
            return
        self.missing |= errors
        self._not_missing(offsets)
        if self.loaded.candidates and ("" in places or not self.texts.is_file()):
            priors = [_line_at(*place)["priors"] for place in places.get("", {}).values()]
            _write(self.texts, _as_lines(candidate_rows(self.loaded, priors[0] if priors else None)))
        _write(self.rows, _as_lines(self._joined(offsets, places)))
        self._write_header()
        for part in self._parts():
            part.unlink()

    def _finished(self) -> tuple[dict[str, int], Places, dict[str, str]]:
        """Return offsets in the joined file, places in the part files, and the errors found there, by sample id."""
        places: dict[str, dict[int, tuple[Path, int]]] = defaultdict(dict)
        errors: dict[str, str] = {}
        for part in self._parts():
            for name, offset, result in _lines(part):
                places[name][result["clip"]] = (part, offset)
                if "problem" in result:
                    errors[name] = result["problem"]
        return {name: offset for name, offset, _ in _lines(self.rows)}, places, errors

    def _remaining(self, offsets: Mapping[str, int], places: Places) -> list[int]:
        complete = offsets.keys() | self.missing.keys()
        done: set[tuple[str, int]] = set()
        for sample in self.loaded.samples:
            if sample.id in complete:
                done.update((sample.id, clip) for clip in range(len(sample.inputs)))
        for name, clips in places.items():
            done.update((name, clip) for clip in clips)
        if self.texts.is_file():
            done.add(("", 0))
        return self.dataset.remaining(done)

    def _joined(self, offsets: Mapping[str, int], places: Places) -> Iterator[dict[str, Any]]:
        task = TASKS[self.loaded.task]
        for sample in self.loaded.samples:
            found = places.get(sample.id, {})
            if sample.id in offsets:
                yield _line_at(self.rows, offsets[sample.id])
            elif sample.id not in self.missing:
                yield task.row(sample, [_line_at(*found[clip]) for clip in range(len(sample.inputs))])

    def _not_missing(self, evaluated: Iterable[str]) -> None:
        """Count samples that were evaluated although their videos are gone now."""
        for name in evaluated:
            self.missing.pop(name, None)

    def _parts(self) -> list[Path]:
        return sorted(self.rows.parent.glob(f"{self.loaded.name}.part*.jsonl"))

    def _write_header(self) -> None:
        content = header_fields(self.loaded, self.missing, self.settings, self.dataset.config.invented)
        _write(self.header, [json.dumps(content, indent=1) + "\n"])


class BenchmarkDataModule(L.LightningDataModule):
    """The remaining clips of benchmarks, distributed over the processes by index without repeats.

    Args:
        predictions: of each benchmark.
        num_workers: decoding processes per rank.
        force: discard existing predictions.
    """

    def __init__(self, predictions: Sequence[Predictions], num_workers: int, force: bool) -> None:
        super().__init__()
        self.predictions, self.num_workers, self.force = predictions, num_workers, force
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.prepare_data_per_node = False  # all nodes share the folder

    def prepare_data(self) -> None:
        """Discard or check the files and write the headers, in the first process while the others wait."""
        for predictions in self.predictions:
            if self.force:
                predictions.discard()
            predictions.require_same()
            predictions.begin()

    def predict_dataloader(self) -> list[DataLoader[BenchmarkBatch]]:
        """Return a loader for each benchmark; Lightning starts no process before all have called this."""
        if self.trainer is None:
            raise RuntimeError("BenchmarkDataModule has no trainer: pass it to Trainer.predict")
        rank, world = self.trainer.global_rank, self.trainer.world_size
        loaders: list[DataLoader[BenchmarkBatch]] = []
        for predictions in self.predictions:
            indices = predictions.remaining()[rank::world]
            loaders.append(
                WorkerLoader(predictions.dataset, sampler=indices, collate_fn=_only, num_workers=self.num_workers)
            )
        return loaders


def _only(batches: list[BenchmarkBatch]) -> BenchmarkBatch:
    (batch,) = batches
    return batch


class _PredictionWriter(L.Callback):
    """Append the results of every clip to a file at once, so that a killed process loses at most the last."""

    def __init__(self, predictions: Sequence[Predictions]) -> None:
        self.predictions = predictions
        self.files: dict[int, BinaryIO] = {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the results to this process's part."""
        if dataloader_idx not in self.files:
            part = self.predictions[dataloader_idx].part(trainer.global_rank)
            complete = sum(len(line) for line in _complete_lines(part))
            self.files[dataloader_idx] = part.open("ab")
            self.files[dataloader_idx].truncate(complete)
        file = self.files[dataloader_idx]
        file.write("".join(json.dumps(result) + "\n" for result in outputs).encode())
        file.flush()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the parts."""
        for file in self.files.values():
            file.close()


def predict(trainer: L.Trainer, stage: L.LightningModule, benchmarks: BenchmarkDataModule) -> None:
    """Evaluate all remaining clips, and write one predictions file for each benchmark.

    Args:
        trainer: runs ``predict_step`` over the remaining clips of each benchmark.
        stage: its ``predict_step`` returns the results of ``Evaluator.evaluate`` for a ``BenchmarkBatch``.
        benchmarks: the clips and files.

    Raises:
        OtherPredictions: predictions of another model or other settings exist.
    """
    writer = _PredictionWriter(benchmarks.predictions)
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    try:
        trainer.predict(stage, datamodule=benchmarks, return_predictions=False)
    finally:
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        for predictions in benchmarks.predictions:
            predictions.join()
    trainer.strategy.barrier()


def write_submissions(predictions: Sequence[Predictions], folder: Path) -> None:
    """Write the files for authors' servers, of benchmarks with a prediction for every sample; nothing is sent.

    Args:
        predictions: joined.
        folder: gets a folder for each benchmark that has a server.
    """
    for of_benchmark in predictions:
        loaded, task = of_benchmark.loaded, TASKS[of_benchmark.loaded.task]
        if not isinstance(task, MultipleChoice):
            continue
        chosen = {name: task.chosen_option(row) for name, _, row in _lines(of_benchmark.rows)}
        if len(chosen) < len(loaded.samples):
            shutil.rmtree(folder / loaded.name, ignore_errors=True)  # of predictions that were discarded
            continue
        for name, text in loaded.submission(chosen).items():
            (folder / loaded.name).mkdir(parents=True, exist_ok=True)
            _write(folder / loaded.name / name, [text])


def _complete_lines(file: Path) -> Iterator[bytes]:
    """Yield the lines that were written to their end."""
    if file.is_file():
        with file.open("rb") as opened:
            yield from (line for line in opened if line.endswith(b"\n"))


def _lines(file: Path) -> Iterator[tuple[str, int, Result]]:
    """Yield the sample id, byte offset and content of each line."""
    offset = 0
    for line in _complete_lines(file):
        content = json.loads(line)
        yield content["id"], offset, content
        offset += len(line)


def _line_at(file: Path, offset: int) -> dict[str, Any]:
    with file.open("rb") as opened:
        opened.seek(offset)
        content: dict[str, Any] = json.loads(opened.readline())
    return content


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (json.dumps(row) + "\n" for row in rows)


def _write(file: Path, texts: Iterable[str]) -> None:
    """Write texts to a file that is complete or unchanged at any moment."""
    with atomic_path(file) as unfinished, unfinished.open("w", encoding="utf-8") as out:
        out.writelines(texts)
