"""Instruction tuning on clips of one view, mixed from instruction files: EgoIT (stage 3), or any data of that form."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from datamodules.clips.datamodule import ClipDataModule
from datamodules.clips.dataset import ClipConfig, ClipTextDataset, Span
from datamodules.egoit.first_person import first_person
from datamodules.egoit.mix import NATURAL, Mix, MixConfig, MixSource, epoch_counts, mix_source
from datamodules.egoit.reader import ConversationFile
from datamodules.egoit.records import InstructionRecord, RecordStore
from datamodules.egoit.templates import FOLDER, STYLES, Templates, draw
from datamodules.io.conversation import VIDEO_TAG, Turn
from datamodules.io.jsonl import InvalidRecords
from datamodules.text import EncodedText, TextEncoder

Style = Literal["base", "task", "task_ego"]
AnswerPerson = Literal["raw", "first"]


class InstructionDataset(ClipTextDataset):
    """Clips with conversations. A sample is one record, or several questions about one clip joined to a conversation.

    Args:
        store: records, source by source.
        sizes: number of records of each source.
        root: folder that video paths are relative to.
        view: view whose encoder sees the clips.
        clips: frames of a clip.
        encoder: text to tokens.
        source_names: name of each source.
        turns_per_clip: largest number of records of one source about the same seconds of a video in one sample.
        templates: render records with prompt fields, with another template in each epoch; needed if there are any.
        style: style of rendered prompts, see ``templates.STYLES``.
        seed: seed of the template draw, of the order of joined questions, and of the order in which samples take turns.
        answer_person: ``first`` for answers in the words of the one who wears the camera, see ``first_person``.
    """

    def __init__(
        self,
        store: RecordStore,
        sizes: Sequence[int],
        root: Path,
        view: str,
        clips: ClipConfig,
        encoder: TextEncoder,
        source_names: Sequence[str] = ("all",),
        turns_per_clip: int = 1,
        templates: Templates | None = None,
        style: Style = "task_ego",
        seed: int = 0,
        answer_person: AnswerPerson = "raw",
    ) -> None:
        super().__init__(clips, encoder)
        self.store, self.root, self.view, self.view_names = store, root, view, (view,)
        self.answer_person = answer_person
        self.source_names = tuple(source_names)
        self.templates, self.style, self.seed = templates, style, seed
        ends = np.cumsum(sizes)
        joined = [_join(store, end - size, end, turns_per_clip) for size, end in zip(sizes, ends, strict=True)]
        self.records = np.concatenate([records for records, _ in joined])
        self.first = np.concatenate([[0], np.cumsum(np.concatenate([counts for _, counts in joined]))])
        self.sizes = [len(counts) for _, counts in joined]
        self._source_ends = np.cumsum(self.sizes)
        self.mix = Mix(self.sizes, self.sizes, seed)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.first) - 1

    @property
    def epoch_length(self) -> int:
        """Return the number of samples of an epoch."""
        return len(self.mix)

    def epoch_samples(self, epoch: int) -> NDArray[np.int64]:
        """Return the numbers of the samples of an epoch, int64 [epoch_length], not shuffled."""
        return np.arange(len(self)) if self.mix.counts == self.sizes else self.mix.samples(epoch)

    def source(self, index: int) -> int:
        """Return the place of a sample's source in ``source_names``."""
        return int(np.searchsorted(self._source_ends, index, side="right"))

    def name(self, index: int) -> str:
        """Return the id of the sample's first record."""
        return self.store.id_of(self._records_of(index)[0])

    def groups(self) -> NDArray[np.int32]:
        """Return the number of the video of every sample, int32 [len]."""
        numbers: NDArray[np.int32] = self.store.video_numbers()[self.records[self.first[:-1]]]
        return numbers

    def span(self, index: int, epoch: int) -> Span:
        """Return the seconds of the sample's clip, the whole file if its record has no window.

        Text without video has no paths.
        """
        record = self.store[self._records_of(index)[0]]
        if not record.video:
            return Span({}, 0.0, math.inf)
        return Span({self.view: self.root / record.video}, *(record.window_s or (0.0, math.inf)))

    def turns(self, index: int, epoch: int) -> list[Turn]:
        """Return the sample's conversation in an epoch.

        The seed, the epoch and the records' ids alone decide the templates and the order of joined questions, so a
        resumed run, and any number of ranks, gets the same text.
        """
        records = [self.store[number] for number in self._records_of(index)]
        if len(records) > 1:
            digest = hashlib.sha256(f"{self.seed}/{epoch}/{records[0].id}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(records))
            records = [records[place] for place in order]
        turns: list[Turn] = []
        for record in records:
            if record.prompt is None:
                turns += record.turns
            else:
                assert self.templates is not None, "records with prompt fields need templates"
                turns.append(self.templates.render(record, self.style, draw(self.seed, epoch, record.id)))
        if self.answer_person == "first":
            turns = [(question, first_person(answer)) for question, answer in turns]
        return turns

    def text(self, index: int, epoch: int) -> EncodedText:
        """Return the tokens of the sample's conversation in an epoch."""
        has_video = bool(self.store[self._records_of(index)[0]].video)
        return self.encoder.conversation(self.turns(index, epoch), VIDEO_TAG if has_video else "")

    def words(self, index: int, epoch: int) -> list[str]:
        """Return the questions and answers of the sample in an epoch."""
        return [text for turn in self.turns(index, epoch) for text in turn]

    def _records_of(self, index: int) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        records: list[int] = self.records[self.first[index] : self.first[index + 1]].tolist()
        return records


def _join(store: RecordStore, begin: int, end: int, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return records [begin, end) in the order of their samples, and the number of records of each sample, int64."""
    records = np.arange(begin, end)
    if limit == 1 or not len(records):
        return records, np.ones(len(records), dtype=np.int64)
    # Sort by video and window; where either changes, another clip begins.
    keys = np.column_stack([store.video_numbers()[begin:end], store.windows_s()[begin:end]])
    order = np.lexsort(keys.T[::-1])  # stable, so records about one clip keep their order
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(keys[order], axis=0) != 0).any(axis=1)]))
    sizes = np.diff(np.concatenate([starts, [len(order)]]))
    # Cut the records about one clip into samples of at most ``limit``.
    counts: list[int] = []
    for size in sizes.tolist():
        counts += [limit] * (size // limit)
        counts += [size % limit] if size % limit else []
    return records[order], np.array(counts, dtype=np.int64)


class InstructionDataModule(ClipDataModule):
    """Conversations about clips, mixed from instruction files.

    A file is JSON Lines, or a JSON array, of records with at least ``video`` (a path below ``root``, of a file or a
    folder of frames) and ``conversations``, an even list of ``{"from": "human" | "gpt", "value": text}`` whose first
    value holds ``<video>``. ``start`` and ``end`` in seconds select a window; without them the whole file is used.
    ``image`` in place of ``video`` names an image, which fills all frames of a clip.
    Forms of other stacks are read too, and the conversions are printed, see ``ConversationFile``. Files of
    ``python -m datamodules.egoit`` have ``prompt`` fields instead of a conversation, which are rendered with another
    template in each epoch, see ``records.PromptFields``.

    Args:
        sources: instruction files: paths, or mappings of a file and a weight, a number of samples or splits, see
            ``MixSource``.
        view: view whose encoder sees the clips.
        mix: shares of the sources in an epoch; by default every sample comes once.
        instruction_style: style of rendered prompts: ``base``, ``task`` or ``task_ego``, see ``egoit.templates``;
            ``raw`` takes every conversation as its file has it.
        templates: folder of template banks, see ``egoit.templates``; null for those of this repository.
        turns_per_clip: number of questions of one source about the same seconds of a video that are joined to one
            conversation, so that the clip is read once for them; 1 keeps them apart.
        text_only: accept conversations without any video, too. Their frames are zeros that the encoder sees and the
            language model does not, so that every process runs every module.
        answer_person: ``first`` turns answers about C, or the camera-wearer, into the first person, "I pick up the
            cup.", see ``first_person``; ``raw`` leaves them.
        **shared: see ``ClipDataModule``.

    Raises:
        ValueError: a file is missing, two files have one name, or the mix is impossible.
    """

    def __init__(
        self,
        sources: list[str | dict[str, Any] | MixSource],
        view: Literal["ego", "exo"] = "ego",
        mix: MixConfig = NATURAL,
        instruction_style: Literal["base", "task", "task_ego", "raw"] = "task_ego",
        templates: str | None = None,
        turns_per_clip: int = 1,
        text_only: bool = False,
        answer_person: AnswerPerson = "raw",
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.sources = [mix_source(given, f"data.sources[{number}]") for number, given in enumerate(sources)]
        for source in self.sources:
            if not Path(source.file).is_file():
                raise ValueError(
                    f"data.sources: no file {source.file}: run `make data` for the generated world, "
                    "`make egoit` for EgoIT, or set data.init_args.sources"
                )
        names = [Path(source.file).stem for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"data.sources: got {', '.join(names) or 'none'}, allowed: one file or more, of own names")
        if instruction_style not in (*STYLES, "raw"):
            raise ValueError(f"data.instruction_style: got {instruction_style!r}, allowed: {', '.join(STYLES)}, raw")
        if turns_per_clip < 1:
            raise ValueError(f"data.turns_per_clip: got {turns_per_clip}, allowed: 1 or more")
        if answer_person not in get_args(AnswerPerson):
            allowed = ", ".join(get_args(AnswerPerson))
            raise ValueError(f"data.answer_person: got {answer_person!r}, allowed: {allowed}")
        self.text_only, self.answer_person = text_only, answer_person
        self.source_names, self.view, self.mix, self.turns_per_clip = names, view, mix, turns_per_clip
        self.style: Style | None = None if instruction_style == "raw" else instruction_style
        self._with_bank: set[tuple[str, str]] = set()  # tasks and sources for which there is a template bank
        try:
            self.templates = Templates(FOLDER if templates is None else Path(templates))
        except ValueError as error:
            raise ValueError(f"data.templates: {error}") from None
        epoch_counts([1] * len(names), self.sources, mix)  # so that an impossible mix stops a run at its start

    def read(self) -> InstructionDataset:
        """Read every record of every source, and print the number of samples of each source in an epoch.

        Raises:
            InvalidRecords: records are invalid or no template fits them; names those of all files.
            ValueError: a file has no record of its splits or videos.
        """
        store = RecordStore(raw=self.style is None)
        problems: list[str] = []
        sizes = []
        # Collect the problems of all files, so that one run names every invalid record.
        for source in self.sources:
            before, file = len(store), ConversationFile(Path(source.file), text_only=self.text_only)
            found: Counter[str] = Counter()
            unused = 0
            for record in file:
                found[str(record.split)] += 1
                if source.splits is not None and record.split not in source.splits:
                    continue
                if not source.uses(record.video, self.seed):
                    unused += 1
                    continue
                if problem := self._problem(record):
                    file.problems.append(f"{source.file}: record {record.id}: {problem}")
                store.append(record)
            problems += file.problems
            sizes.append(len(store) - before)
            if report := file.report():
                rank_zero_only(print)(report)
            # A misspelt split would silently leave its records out.
            wanted = found.keys() if source.splits is None else set(source.splits)
            there = ", ".join(sorted(found)) or "no record at all"
            if unused:
                rank_zero_only(print)(f"{source.file}: {unused:,} records left out (videos: {source.videos:g})")
            if unused and not sizes[-1]:
                raise ValueError(
                    f"data.sources: {source.file}: videos is {source.videos:g}, which leaves no record: raise it"
                )
            if not file.problems and (wanted - found.keys() or not sizes[-1]):
                splits = ", ".join(sorted(wanted - found.keys())) or "any split"
                raise ValueError(f"data.sources: {source.file}: no record of {splits} in it, but {there}")
            if others := ", ".join(f"{found[split]:,} of {split}" for split in sorted(found.keys() - wanted)):
                rank_zero_only(print)(f"{source.file}: records of other splits left out: {others}")
        if problems:
            raise InvalidRecords(problems)
        dataset = InstructionDataset(
            store.freeze(),
            sizes,
            self.root,
            self.view,
            self.clips,
            self.encoder,
            self.source_names,
            self.turns_per_clip,
            self.templates,
            self.style or "base",
            self.seed,
            self.answer_person,
        )
        dataset.mix = Mix(dataset.sizes, epoch_counts(dataset.sizes, self.sources, self.mix), self.seed)
        rank_zero_only(print)(_summary(dataset))
        return dataset

    def _problem(self, record: InstructionRecord) -> str:
        """Return the reason why a record has no text in the chosen style; empty if it has one."""
        if self.style is None:
            return "" if record.turns else "has prompt fields only: set instruction_style to base, task or task_ego"
        prompt = record.prompt
        if prompt is None or (prompt.task, record.source) in self._with_bank:
            return ""
        try:
            self.templates.render(record, self.style, 0)
        except ValueError as error:
            return str(error)
        if not prompt.options:  # with the bank known, nothing else can be wrong
            self._with_bank.add((prompt.task, record.source))
        return ""

    def annotation_files(self) -> list[Path]:
        """Return the instruction files."""
        return [Path(source.file) for source in self.sources]


def _summary(dataset: InstructionDataset) -> str:
    """Return a line with the number of samples of each source in an epoch."""
    counts, total = dataset.mix.counts, max(1, len(dataset.mix))
    parts = [
        f"{name} {count:,} of {size:,} ({count / total:.1%})"
        for name, count, size in zip(dataset.source_names, counts, dataset.sizes, strict=True)
    ]
    return f"an epoch is {len(dataset.mix):,} samples: {', '.join(parts)}"
