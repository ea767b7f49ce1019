"""Measure memory of the loss, clip reading and training steps: ``make bench``, numbers in docs/benchmarks.md.

CPU time, not wall time, methods interleaved in random order, medians: ratios survive a noisy machine.
"""

import csv
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import segment_midpoints
from lightning_modules.config import compose, stage_names
from lightning_modules.model.language_model import LanguageModel, LanguageModelConfig, Spliced
from lightning_modules.run import build


def write_video(path: Path, size: int, seconds: int, gop: int) -> None:
    """Write moving noise at 30 fps as H.264 with B-frames."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (size // 4 + 64, size // 4 + 64, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    options = {"preset": "medium", "crf": "23", "g": str(gop), "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width = stream.height = size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for t in range(30 * seconds):
            x, y = int(100 + 90 * np.sin(t / 17)), int(100 + 90 * np.cos(t / 23))
            frame = np.ascontiguousarray(texture[y : y + size, x : x + size])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def usual_seek(path: Path, times_s: np.ndarray, size: int) -> None:
    """Read a clip as most loaders do: reopen, seek, convert every frame of the span to RGB, resize in torch."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        container.seek(int(times_s[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time >= times_s[0]:
                frames.append(frame.to_ndarray(format="rgb24"))
            if frame.time >= times_s[-1]:
                break
    chosen = torch.from_numpy(np.stack(frames)[np.linspace(0, len(frames) - 1, len(times_s)).astype(int)])
    torch.nn.functional.interpolate(chosen.permute(0, 3, 1, 2), size=(size, size), mode="bicubic", antialias=True)


def interleaved(methods: dict[str, Callable[[float], None]], rounds: int, latest_s: float) -> dict[str, float]:
    """Return the median CPU milliseconds of each method on the same random spans."""
    taken: dict[str, list[float]] = {name: [] for name in methods}
    draw = random.Random(0)
    for _ in range(rounds):
        start_s = draw.uniform(0, latest_s)
        for name in draw.sample(list(methods), len(methods)):
            before = time.process_time()
            methods[name](start_s)
            taken[name].append(1000 * (time.process_time() - before))
    return {name: statistics.median(values) for name, values in taken.items()}


def bench_reader() -> None:
    """Compare the clip reader with usual seek code."""
    print("clip reading, 16 frames at 336 px out of a 448x448 file, CPU ms per clip (median of 40)")
    print("| key frame every | span | ours | usual seek code | ratio |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for gop in (30, 250):
            path = Path(folder) / f"{gop}.mp4"
            write_video(path, 448, 20, gop)
            for span_s in (0.68, 2.0):
                reader = ClipReader()
                methods: dict[str, Callable[[float], None]] = {
                    "ours": lambda s, r=reader, p=path, d=span_s: (
                        r.read(p, segment_midpoints(s, s + d, 16), 336) and None
                    ),
                    "usual": lambda s, p=path, d=span_s: usual_seek(p, segment_midpoints(s, s + d, 16), 336),
                }
                ms = interleaved(methods, 40, 20 - span_s - 0.1)
                ratio = ms["usual"] / ms["ours"]
                print(f"| {gop} | {span_s} s | {ms['ours']:.1f} | {ms['usual']:.1f} | {ratio:.1f} |")


def bench_steps() -> None:
    """Measure an optimiser step of each stage of the default experiment, and the share of waiting for data."""
    print("\noptimiser steps of experiments/toy, 30 steps each, the first 10 left out")
    print("| stage | s per step | samples/s | waiting for data |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for stage in stage_names(folder):
            overrides = [f"runs={folder}", "trainer.max_steps=30", "monitor.every_n_steps=10"]
            overrides += ["trainer.limit_val_batches=0", "checkpoint_every_n_steps=1000", "model.init_args.init=null"]
            overrides += ["trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger"]
            run = build(compose(Path("experiments/toy"), stage, overrides))
            run.trainer.fit(run.stage, datamodule=run.datamodule)
            with (run.folder / "metrics.csv").open() as file:
                rows = list(csv.DictReader(file))[1:]
            values = {k: statistics.mean(float(r[f"perf/{k}"]) for r in rows) for k in ("samples_per_s", "data_wait")}
            seconds = run.datamodule.global_batch_size / values["samples_per_s"]
            print(f"| {stage} | {seconds:.2f} | {values['samples_per_s']:.0f} | {100 * values['data_wait']:.0f} % |")


def bench_vtg_memory() -> None:
    """Compare peak memory of loss and backward pass with logits at supervised positions and at all positions."""
    print("\nvideo-text generation, vocabulary 32,000, 3,000 visual and 80 text tokens, 24 of them supervised, float32")
    print("| clips | logits where supervised | logits everywhere | ratio | largest difference of gradients |")
    print("|---:|---:|---:|---:|---:|")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "sliding_window": None, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig("mistral", overrides=sizes), 32_000)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # frozen, as in stages 1 and 2: gradients reach the visual tokens

    def supervised(spliced: Spliced) -> torch.Tensor:
        logits, targets = model.supervised_logits(spliced)
        return torch.nn.functional.cross_entropy(logits, targets)

    def everywhere(spliced: Spliced) -> torch.Tensor:
        mask, labels = spliced.attention_mask, spliced.labels
        loss: torch.Tensor = model.causal_lm(inputs_embeds=spliced.embeds, attention_mask=mask, labels=labels).loss
        return loss

    for clips in (1, 2, 4):
        ids = torch.randint(3, 32_000, (clips, 81))
        ids[:, 1] = VIDEO_TOKEN_ID
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, -24:] = ids[:, -24:]
        visual = torch.randn(clips, 3000, 256)
        peaks, gradients = [], []
        for loss_of in (supervised, everywhere):
            tokens = visual.clone().requires_grad_()
            spliced = model.splice(ids, ids != 0, labels, tokens)
            before = _reset_peak_mib()
            loss_of(spliced).backward()
            peaks.append(_peak_mib() - before)
            gradients.append(tokens.grad)
        difference = float((gradients[0] - gradients[1]).abs().max())
        print(f"| {clips} | {peaks[0]:,.0f} MiB | {peaks[1]:,.0f} MiB | {peaks[1] / peaks[0]:.1f} | {difference:.1e} |")


def _reset_peak_mib() -> float:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the resident set
    return _peak_mib()


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench_vtg_memory()
    bench_reader()
    bench_steps()
