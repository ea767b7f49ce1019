"""Cost of an instruction mix of EgoIT's size: ``python tests/bench/bench_mix.py`` prints loading time and memory.

Files of the five sources are invented (600,000 records together, in the proportions of the official ones) and written
as the converters write them. The mix is then loaded as stage 3 loads it, and prompts of one epoch are rendered. Memory
is the growth of the process, and its peak.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from datamodules.clips.dataset import ClipConfig
from datamodules.egoit.datamodule import InstructionDataModule
from datamodules.egoit.mix import MixConfig
from datamodules.egoit.records import InstructionRecord, PromptFields, to_json, write_rows
from datamodules.toy_world.questions import write_tokenizer

RECORDS = {"egotimeqa": 340_000, "ssv2": 190_000, "egoexolearn": 59_000, "egtea": 9_400, "openeqa": 1_600}
TASKS = {"egotimeqa": "qa", "ssv2": "action", "egoexolearn": "description", "egtea": "action", "openeqa": "qa"}
WORDS = "take put cut open the a knife tomato drawer bowl from into with left right counter while stirring pan".split()
MEBIBYTE = 2**20


def held() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MEBIBYTE


def write_source(folder: Path, name: str, count: int) -> str:
    """Write the file of a source: texts of 3 to 20 words, sixty questions about a clip where there are windows."""
    rng = np.random.default_rng(len(name))
    task, file = TASKS[name], folder / f"{name}.jsonl"

    def text(longest: int) -> str:
        return " ".join(WORDS[int(i)] for i in rng.integers(len(WORDS), size=int(rng.integers(3, longest))))

    def record(number: int) -> InstructionRecord:
        clip = number // 60 if name in ("egotimeqa", "egoexolearn") else number
        start_s = float(np.round(rng.uniform(0, 400), 3))
        query = f"{text(10)}?" if task == "qa" else ""
        return InstructionRecord(
            id=f"{name}/{number:06d}",
            video=f"{name}/{clip:032x}.mp4",
            prompt=PromptFields(task, query, target=text(20 if task == "description" else 6)),
            source=name,
            window_s=(start_s, start_s + 6.0) if name in ("egotimeqa", "egoexolearn") else None,
            split="train",
            video_uid=f"{clip:032x}",
        )

    write_rows(file, (to_json(record(number)) for number in range(count)))
    return str(file)


def main() -> None:
    """Write, load and render a mix, and print times and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=sum(RECORDS.values()))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, scale = Path(scratch), given.records / sum(RECORDS.values())
        start = time.perf_counter()
        files = [write_source(folder, name, round(scale * count)) for name, count in RECORDS.items()]
        size = sum(Path(file).stat().st_size for file in files)
        print(f"{given.records:,} records, {size / MEBIBYTE:.0f} MiB, written in {time.perf_counter() - start:.1f} s")
        write_tokenizer(folder / "tokenizer")
        shared = {"root": scratch, "tokenizer": str(folder / "tokenizer"), "clips": ClipConfig(16, 336)}
        module = InstructionDataModule(files, mix=MixConfig(alpha=0.7), **shared, global_batch_size=64)
        before, start = held(), time.perf_counter()
        samples = module.read()
        loaded_s = time.perf_counter() - start
        print(f"loaded in {loaded_s:.1f} s; {held() - before:.0f} MiB more in use")
        start = time.perf_counter()
        order = samples.epoch_samples(1)
        print(f"samples of an epoch drawn in {1000 * (time.perf_counter() - start):.0f} ms")
        start = time.perf_counter()
        drawn = order[:: max(1, len(order) // 20_000)].tolist()
        for index in drawn:
            samples.turns(index, 1)
        print(f"a prompt rendered in {1e6 * (time.perf_counter() - start) / len(drawn):.0f} microseconds")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEBIBYTE
        print(f"peak of the process {peak:.0f} MiB, {before:.0f} of them before loading")


if __name__ == "__main__":
    main()
