"""Conversations about clips of one view, mixed from instruction files: EgoIT (stage 3), or any data of that form."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from datamodules.clips.datamodule import ClipDataModule
from datamodules.clips.dataset import ClipConfig, ClipTextDataset, Span
from datamodules.egoit.datamodule import Conversation, ConversationFile, ConversationStore, Turn, Wording
from datamodules.egoit.mix import NATURAL, Mix, MixConfig, MixSource, epoch_counts, mix_source
from datamodules.egoit.templates import FOLDER, LEVELS, Templates, draw
from datamodules.io.jsonl import InvalidRecords
from datamodules.text import EncodedText, TextEncoder

Level = Literal["base", "task", "task_ego"]


class InstructionDataset(ClipTextDataset):
    """Clips with conversations; a sample is one conversation, or several questions about one clip joined to one.

    Args:
        store: the records, source by source.
        sizes: records of each source.
        root: folder the video paths are relative to.
        view: which encoder the clips are for.
        clips: frames of a clip.
        encoder: text to tokens.
        source_names: of each source.
        turns_per_clip: so many records of one source about the same seconds of a video become one sample at most.
        templates: words templated questions, anew in each epoch; needed if the store holds such.
        level: of prompts.
        seed: of templates, of the order of joined questions, and of which samples take turns.
    """

    def __init__(
        self,
        store: ConversationStore,
        sizes: Sequence[int],
        root: Path,
        view: str,
        clips: ClipConfig,
        encoder: TextEncoder,
        source_names: Sequence[str] = ("all",),
        turns_per_clip: int = 1,
        templates: Templates | None = None,
        level: Level = "task_ego",
        seed: int = 0,
    ) -> None:
        super().__init__(clips, encoder)
        self.store, self.root, self.view = store, root, view
        self.source_names = tuple(source_names)
        self.templates, self.level, self.seed = templates, level, seed
        ends = np.cumsum(sizes)
        joined = [_join(store, end - size, end, turns_per_clip) for size, end in zip(sizes, ends, strict=True)]
        self.records = np.concatenate([records for records, _ in joined])
        self.first = np.concatenate([[0], np.cumsum(np.concatenate([counts for _, counts in joined]))])
        self.sizes = [len(counts) for _, counts in joined]
        self._source_ends = np.cumsum(self.sizes)
        self.mix = Mix(self.sizes, self.sizes, seed)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.first) - 1

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch."""
        return len(self.mix)

    def epoch_samples(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch."""
        return np.arange(len(self)) if self.mix.counts == self.sizes else self.mix.samples(epoch)

    def source(self, index: int) -> int:
        """Place of a sample's source in ``source_names``."""
        return int(np.searchsorted(self._source_ends, index, side="right"))

    def name(self, index: int) -> str:
        """Id of the sample's first record."""
        return self.store.name(self._records_of(index)[0])

    def groups(self) -> NDArray[np.int32]:
        """The video of every sample, int32 [len]."""
        numbers: NDArray[np.int32] = self.store.video_numbers()[self.records[self.first[:-1]]]
        return numbers

    def span(self, index: int, epoch: int) -> Span:
        """The record's window, or the whole file."""
        path, window = self.store.video(self._records_of(index)[0])
        return Span({self.view: self.root / path}, *(window or (0.0, math.inf)))

    def turns(self, index: int, epoch: int) -> list[Turn]:
        """The sample's conversation in an epoch: worded and ordered by the seed, the epoch and the records' ids."""
        records = self._records_of(index)
        if len(records) > 1:
            digest = hashlib.sha256(f"{self.seed}/{epoch}/{self.store.name(records[0])}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(records))
            records = [records[place] for place in order]
        turns: list[Turn] = []
        for record in records:
            content = self.store.content(record)
            if isinstance(content, Wording):
                assert self.templates is not None, "the store holds wordings"
                template = draw(self.seed, epoch, self.store.name(record))
                turns.append(self.templates.turn(content, self.level, template))
            else:
                turns += content
        return turns

    def text(self, index: int, epoch: int) -> EncodedText:
        """All turns of the conversation."""
        return self.encoder.conversation(self.turns(index, epoch))

    def _records_of(self, index: int) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        records: list[int] = self.records[self.first[index] : self.first[index + 1]].tolist()
        return records


def _join(store: ConversationStore, begin: int, end: int, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Records [begin, end) in the order of their samples, and how many each sample takes; both int64."""
    records = np.arange(begin, end)
    if limit == 1 or not len(records):
        return records, np.ones(len(records), dtype=np.int64)
    keys = np.column_stack([store.video_numbers()[begin:end], store.windows_s()[begin:end]])
    order = np.lexsort(keys.T[::-1])  # stable, so records about one clip keep their order
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(keys[order], axis=0) != 0).any(axis=1)]))
    sizes = np.diff(np.concatenate([starts, [len(order)]]))
    counts = [min(limit, size - done) for size in sizes.tolist() for done in range(0, size, limit)]
    return records[order], np.array(counts, dtype=np.int64)


class InstructionDataModule(ClipDataModule):
    """Conversations about clips, mixed from instruction files.

    A file is JSON Lines, or a JSON array, of records with at least ``video`` (a path below ``root``, of a file or a
    folder of pictures) and ``conversations``, an even list of ``{"from": "human" | "gpt", "value": text}`` whose first
    value holds ``<video>``. ``start`` and ``end`` in seconds select a window; without them the whole file is used.
    Other stacks' forms are read too, and what was changed is printed, see ``ConversationFile``. Files of
    ``python -m datamodules.egoit`` also say what their questions were made from, and are worded anew in each epoch.

    Args:
        sources: instruction files: paths, or mappings of a file, and a weight, a number or splits, see
            ``MixSource``.
        view: which encoder the clips are for.
        mix: how sources share an epoch; by default all their samples together are one.
        prompt_level: of templated questions; ``as_written`` leaves every text as its file has it.
        templates: folder of template banks, see ``egoit.templates``; null for those that come with the code.
        turns_per_clip: questions of one source about the same seconds of a video that are put to one conversation, so
            that the clip is read once for them; 1 keeps them apart.
        **shared: see ``ClipDataModule``.

    Raises:
        ValueError: a file is missing, two have one name, or the mix cannot be.
    """

    def __init__(
        self,
        sources: list[str | dict[str, Any] | MixSource],
        view: Literal["ego", "exo"] = "ego",
        mix: MixConfig = NATURAL,
        prompt_level: Literal["base", "task", "task_ego", "as_written"] = "task_ego",
        templates: str | None = None,
        turns_per_clip: int = 1,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.sources = [mix_source(given, f"data.sources[{number}]") for number, given in enumerate(sources)]
        for source in self.sources:
            if not Path(source.file).is_file():
                raise ValueError(
                    f"data.sources: no file {source.file}: run `make data` for the generated world, "
                    "`make egoit` if it is of EgoIT, or set data.init_args.sources"
                )
        names = [Path(source.file).stem for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"data.sources: got {', '.join(names) or 'none'}, allowed: one file or more, of own names")
        if prompt_level not in (*LEVELS, "as_written"):
            raise ValueError(f"data.prompt_level: got {prompt_level!r}, allowed: {', '.join(LEVELS)}, as_written")
        if turns_per_clip < 1:
            raise ValueError(f"data.turns_per_clip: got {turns_per_clip}, allowed: 1 or more")
        self.source_names, self.view, self.mix, self.turns_per_clip = names, view, mix, turns_per_clip
        self.level: Level | None = None if prompt_level == "as_written" else prompt_level
        self._worded: set[tuple[str, str]] = set()  # tasks and sources for which there is a bank
        try:
            self.templates = Templates(FOLDER if templates is None else Path(templates))
        except ValueError as error:
            raise ValueError(f"data.templates: {error}") from None
        epoch_counts([1] * len(names), self.sources, mix)  # so that an impossible mix stops a run at its start

    def read(self) -> InstructionDataset:
        """Read every record of every source, and print what the mix comes to.

        Raises:
            InvalidRecords: records that cannot be read, of all files.
            ValueError: a file has no record of its splits, or one that no template words.
        """
        store = ConversationStore(worded=self.level is not None)
        problems: list[str] = []
        sizes = []
        for source in self.sources:
            before, file = len(store), ConversationFile(Path(source.file))
            found: Counter[str] = Counter()
            for record in file:
                found[str(record.split)] += 1
                if source.splits is None or record.split in source.splits:
                    if problem := self._problem(record):
                        file.problems.append(f"{source.file}: record {record.name}: {problem}")
                    store.append(record)
            problems += file.problems
            sizes.append(len(store) - before)
            if report := file.report():
                rank_zero_only(print)(report)
            wanted = found.keys() if source.splits is None else set(source.splits)
            there = ", ".join(sorted(found)) or "no record at all"
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
            self.level or "base",
            self.seed,
        )
        dataset.mix = Mix(dataset.sizes, epoch_counts(dataset.sizes, self.sources, self.mix), self.seed)
        rank_zero_only(print)(_summary(dataset))
        return dataset

    def _problem(self, record: Conversation) -> str:
        """Why a record cannot be worded; empty if it can, or need not be."""
        wording = record.wording
        if wording is None or self.level is None or (wording.task, wording.source) in self._worded:
            return ""
        try:
            self.templates.turn(wording, self.level, 0)
        except ValueError as error:
            return str(error)
        if not wording.options:  # the bank is there, and nothing else can be wrong
            self._worded.add((wording.task, wording.source))
        return ""

    def annotation_files(self) -> list[Path]:
        """The sources."""
        return [Path(source.file) for source in self.sources]


def _summary(dataset: InstructionDataset) -> str:
    """Samples of each source in an epoch, on one line."""
    counts, total = dataset.mix.counts, max(1, len(dataset.mix))
    parts = [
        f"{name} {count:,} of {size:,} ({count / total:.1%})"
        for name, count, size in zip(dataset.source_names, counts, dataset.sizes, strict=True)
    ]
    return f"an epoch is {len(dataset.mix):,} samples: {', '.join(parts)}"
