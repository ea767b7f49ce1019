"""One model, any number of benchmarks: predictions that outlive an interruption, and scores made of nothing else.

::

    <folder>/
      predictions/<benchmark>.jsonl           a line for each sample, see ``scores``
      predictions/<benchmark>.texts.jsonl     candidates that all samples share
      predictions/<benchmark>.header.json     how many samples there are, which could not be asked, and how it was asked
      predictions/<benchmark>.part<n>.jsonl   answers of process n, until all are there
      submissions/<benchmark>/...             for the authors' servers; never sent
      metrics.json  results.md                made of the predictions alone, again by ``make score``
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
from datamodules.egobench.dataset import BenchmarkDataset
from lightning_modules.egobench.scoring import candidate_rows, header_fields
from lightning_modules.egobench.tasks import TASKS
from lightning_modules.egobench.tasks.base import Result
from lightning_modules.egobench.tasks.multiple_choice import MultipleChoice
from lightning_modules.stages.base import Stage

Places = Mapping[str, Mapping[int, tuple[Path, int]]]
"""File and place in it of the answer about each clip of a sample."""


class OtherPredictions(ValueError):
    """A folder holds predictions that were made in another way; none of them are touched."""


class Predictions:
    """A benchmark's predictions in a folder.

    Args:
        dataset: the benchmark.
        folder: for the files.
        model: what tells this model from others, as JSON.

    Raises:
        ValueError: no sample can be shown.
    """

    def __init__(self, dataset: BenchmarkDataset, folder: Path, model: Mapping[str, Any]) -> None:
        self.dataset, self.loaded = dataset, dataset.loaded
        self.rows, self.texts, self.header = (
            folder / f"{self.loaded.name}{suffix}" for suffix in (".jsonl", ".texts.jsonl", ".header.json")
        )
        samples = hashlib.sha256(repr((self.loaded.samples, self.loaded.candidates)).encode()).hexdigest()[:16]
        self.settings = json.loads(json.dumps({**model, **dataset.settings(), "items": samples}))
        self.missing = self.loaded.missing()
        if len(self.missing) == len(self.loaded.samples):
            first = next(iter(self.missing.values()))
            raise ValueError(
                f"egobench.benchmarks: {self.loaded.name}: none of its videos is below {self.loaded.videos}, such as "
                f"{first}: put them there, or correct videos"
            )

    def require_same(self) -> None:
        """Compare with what is there.

        Raises:
            OtherPredictions: the folder holds those of another model, or of other samples or settings.
        """
        if not self.header.is_file():
            return
        before = json.loads(self.header.read_text(encoding="utf-8"))["settings"]
        keys = sorted(before.keys() | self.settings.keys())
        if changed := [key for key in keys if before.get(key) != self.settings.get(key)]:
            raise OtherPredictions(
                f"{self.rows}: was made with another {', '.join(changed)}: FORCE=1 makes it anew, or move it away"
            )

    def line(self) -> str:
        """How many samples can be shown, and which file is the first that cannot."""
        samples, absent = len(self.loaded.samples), len(self.missing)
        text = f"{self.loaded.name}: {samples - absent:,} of {self.loaded.total:,} samples, {len(self.dataset):,} clips"
        if not absent:
            return text
        first = self.loaded.videos / next(iter(self.missing.values()))
        return f"{text}; {absent:,} samples are left out, since videos are missing, such as {first}"

    def forget(self) -> None:
        """Delete everything."""
        for file in (self.rows, self.texts, *self._parts(), self.header):  # it says of what model the others are
            file.unlink(missing_ok=True)

    def begin(self) -> None:
        """Say how the predictions are made before the first one is."""
        self.rows.parent.mkdir(parents=True, exist_ok=True)
        self._not_missing(name for name, _, _ in _lines(self.rows))
        self._write_header()

    def left(self) -> list[int]:
        """BenchmarkDataset that are not answered yet, but for those of missing videos."""
        return self._left(*self._answered()[:2])

    def part(self, process: int) -> Path:
        """Where a process puts its answers."""
        return self.rows.with_name(f"{self.loaded.name}.part{process}.jsonl")

    def join(self) -> None:
        """Make one file of all answers, a line for each sample in the official order, and delete the parts.

        Nothing is done before every clip is evaluated.
        """
        before, places, problems = self._answered()
        if left := self._left(before, places):
            rank_zero_warn(
                f"{self.loaded.name}: {len(left):,} clips were not asked about (trainer.limit_predict_batches, or "
                "videos that came meanwhile): evaluate again for them"
            )
            return
        self.missing |= problems
        self._not_missing(before)
        if self.loaded.candidates and ("" in places or not self.texts.is_file()):
            priors = [_line_at(*place)["priors"] for place in places.get("", {}).values()]
            _write(self.texts, _as_lines(candidate_rows(self.loaded, priors[0] if priors else None)))
        _write(self.rows, _as_lines(self._joined(before, places)))
        self._write_header()
        for part in self._parts():
            part.unlink()

    def _answered(self) -> tuple[dict[str, int], Places, dict[str, str]]:
        """Return offsets in the joined file, offsets in the part files, and the errors found there, by sample id."""
        places: dict[str, dict[int, tuple[Path, int]]] = defaultdict(dict)
        problems: dict[str, str] = {}
        for part in self._parts():
            for name, at, answer in _lines(part):
                places[name][answer["clip"]] = (part, at)
                if "problem" in answer:
                    problems[name] = answer["problem"]
        return {name: at for name, at, _ in _lines(self.rows)}, places, problems

    def _left(self, before: Mapping[str, int], places: Places) -> list[int]:
        whole = before.keys() | self.missing.keys()
        done = {
            (sample.id, place)
            for sample in self.loaded.samples
            if sample.id in whole
            for place in range(len(sample.clips))
        }
        done |= {(name, clip) for name, clips in places.items() for clip in clips}
        return self.dataset.remaining(done | ({("", 0)} if self.texts.is_file() else set()))

    def _joined(self, before: Mapping[str, int], places: Places) -> Iterator[dict[str, Any]]:
        for sample in self.loaded.samples:
            found = places.get(sample.id, {})
            if sample.id in before:
                yield _line_at(self.rows, before[sample.id])
            elif sample.id not in self.missing:
                results = [_line_at(*found[place]) for place in range(len(sample.clips))]
                yield TASKS[self.loaded.task].row(sample, results)

    def _not_missing(self, answered: Iterable[str]) -> None:
        """Samples that were answered count, though their videos are gone since."""
        for name in answered:
            self.missing.pop(name, None)

    def _parts(self) -> list[Path]:
        return sorted(self.rows.parent.glob(f"{self.loaded.name}.part*.jsonl"))

    def _write_header(self) -> None:
        content = header_fields(self.loaded, self.missing, self.settings, self.dataset.config.invented)
        _write(self.header, [json.dumps(content, indent=1) + "\n"])


class BenchmarkDataModule(L.LightningDataModule):
    """BenchmarkDataset that are left, dealt to the processes by number: none comes twice, whatever their count.

    Args:
        predictions: of each benchmark.
        num_workers: decoding processes per rank.
        force: forget what is there.
    """

    def __init__(self, predictions: Sequence[Predictions], num_workers: int, force: bool) -> None:
        super().__init__()
        self.predictions, self.num_workers, self.force = predictions, num_workers, force
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.prepare_data_per_node = False  # the folder is everyone's

    def prepare_data(self) -> None:
        """Clear and begin the files, by the first process while the others wait."""
        for predictions in self.predictions:
            if self.force:
                predictions.forget()
            predictions.require_same()
            predictions.begin()

    def predict_dataloader(self) -> list[DataLoader[BenchmarkBatch]]:
        """A loader for each benchmark; Lightning lets no process answer before all have come here."""
        assert self.trainer is not None, "the Trainer calls this"
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return [
            DataLoader(p.dataset, sampler=p.left()[rank::world], collate_fn=_only, num_workers=self.num_workers)
            for p in self.predictions
        ]


def _only(batches: list[BenchmarkBatch]) -> BenchmarkBatch:
    (batch,) = batches
    return batch


class _KeepAnswers(L.Callback):
    """Writes the results of every clip at once, so that a killed process loses none but the last."""

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
        """Append the answers to this process's part."""
        if dataloader_idx not in self.files:
            part = self.predictions[dataloader_idx].part(trainer.global_rank)
            whole = sum(len(line) for line in _whole_lines(part))
            self.files[dataloader_idx] = part.open("ab")
            self.files[dataloader_idx].truncate(whole)
        file = self.files[dataloader_idx]
        file.write("".join(json.dumps(answer) + "\n" for answer in outputs).encode())
        file.flush()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the parts."""
        for file in self.files.values():
            file.close()


def predict(trainer: L.Trainer, stage: Stage, benchmarks: BenchmarkDataModule) -> None:
    """Evaluate all clips that are left; one file for each benchmark at the end.

    Raises:
        OtherPredictions: predictions of another model or other settings are there.
    """
    keep = _KeepAnswers(benchmarks.predictions)
    trainer.callbacks.append(keep)  # type: ignore[attr-defined]
    try:
        trainer.predict(stage, datamodule=benchmarks, return_predictions=False)
    finally:
        trainer.callbacks.remove(keep)  # type: ignore[attr-defined]
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        for predictions in benchmarks.predictions:
            predictions.join()
    trainer.strategy.barrier()


def write_submissions(predictions: Sequence[Predictions], folder: Path) -> None:
    """Write the files of authors' servers for benchmarks all of whose samples were answered; nothing is sent.

    Args:
        predictions: joined.
        folder: gets a folder for each benchmark that has a server.
    """
    for kept in predictions:
        task = TASKS[kept.loaded.task]
        if not isinstance(task, MultipleChoice):
            continue
        chosen = {name: task.chosen_option(row) for name, _, row in _lines(kept.rows)}
        if len(chosen) < len(kept.loaded.samples):
            shutil.rmtree(folder / kept.loaded.name, ignore_errors=True)  # of predictions that are forgotten
            continue
        for name, text in kept.loaded.submission(chosen).items():
            (folder / kept.loaded.name).mkdir(parents=True, exist_ok=True)
            _write(folder / kept.loaded.name / name, [text])


def _whole_lines(file: Path) -> Iterator[bytes]:
    """Lines that were written to their end."""
    if file.is_file():
        with file.open("rb") as opened:
            yield from (line for line in opened if line.endswith(b"\n"))


def _lines(file: Path) -> Iterator[tuple[str, int, Result]]:
    """Sample, place in the file and content of each line."""
    at = 0
    for line in _whole_lines(file):
        answer = json.loads(line)
        yield answer["id"], at, answer
        at += len(line)


def _line_at(file: Path, at: int) -> dict[str, Any]:
    with file.open("rb") as opened:
        opened.seek(at)
        content: dict[str, Any] = json.loads(opened.readline())
    return content


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (json.dumps(row) + "\n" for row in rows)


def _write(file: Path, texts: Iterable[str]) -> None:
    """One after another, to a file that is whole or as it was."""
    unfinished = file.with_name(f".{file.name}.new")
    with unfinished.open("w", encoding="utf-8") as out:
        out.writelines(texts)
    unfinished.replace(file)
