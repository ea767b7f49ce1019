"""Measure the training step of each stage at full size on one GPU: ``make bench-gpu``.

Weights are random and clips are synthetic, so nothing is downloaded; the step itself is the one of a run: the stage's
own ``training_step`` and optimiser under a ``lightning.Trainer`` in bfloat16. Every case prints milliseconds, TFLOP/s,
MFU (useful operations as ``make plan`` counts them, recomputation excluded, over the card's dense bfloat16 peak), peak
memory next to the plan's, and the time of forward, backward and optimiser. A profile of one step of each case follows,
by kind of kernel, then the losses of fsdp2 on one device next to those without it, and how many clips a second worker
processes decode to the device next to what the measured steps read. The cases that tell most come first, and one that
fails does not stop the others. Results go to standard output and a file next to ``--out`` as Markdown and to ``--out``
as JSON, after every case, so that a run that is cut short keeps what it measured.

``--smoke`` runs all kinds of cases on a CPU with the tiny network of the default experiment. ``--roofline`` measures
nothing: it counts operations and bytes of the same steps, and the least time that an H100 needs for them, see
``roofline.py``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from bench_steps import write_video
from roofline import CARDS, HEAVY, by_kind, fused, largest, least_ms, record
from torch import Tensor
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch, TextBatch
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import segment_midpoints
from lightning_modules.config import compose
from lightning_modules.model.exo2ego import PARTS, Exo2EgoModel
from lightning_modules.plan.stages import PlanConfig, plan_stage
from lightning_modules.run import build_stage
from lightning_modules.stages.base import Stage
from lightning_modules.strategy import FSDP2, shard
from lightning_modules.validation.report import markdown_table
from lightning_modules.weights.loading import load_weights

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "A800": 312.0}
"""Dense bfloat16 peak of a card, by a word of its name."""
WARMUP_STEPS, STEPS, SMOKE_STEPS = 2, 4, 2
FAMILIES = {
    "attention": ("flash", "fmha", "attention"),
    "convolution": ("conv", "cudnn", "wgrad", "dgrad", "implicit"),
    "matrix product": ("gemm", "nvjet", "cutlass", "xmma"),
    "normalisation": ("norm", "reduce"),
    "optimiser": ("multi_tensor", "adam"),
    "copy": ("memcpy", "memset", "copy", "cat", "gather", "scatter", "index"),
}
"""Kinds of kernels by a part of their names, the first match counts; all others are elementwise."""


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels of ``scaled_dot_product_attention`` that a case may prescribe."""
VIEWS = {"stage1": 1, "stage2": 2, "stage3": 1}
"""Clips that a sample of a stage decodes."""


@dataclass(frozen=True)
class Case:
    """One measured configuration.

    Attributes:
        stage: name of the stage.
        experiment: folder in ``experiments``.
        micro_batch: samples in a step.
        checkpointing: parts whose blocks recompute their activations in the backward pass.
        compiled: blocks are compiled with ``torch.compile``.
        attention: the only kernel that attention may use, one of ``KERNELS``; or ``eager`` for transformers' own
            implementation in the language model; PyTorch's choice by default.
        strategy: of the Trainer, ``auto`` or ``fsdp2``.
    """

    stage: str
    experiment: str
    micro_batch: int
    checkpointing: tuple[str, ...]
    compiled: bool = False
    attention: str = ""
    strategy: str = "auto"

    @property
    def title(self) -> str:
        """Short name for tables."""
        recomputed = "all" if set(self.checkpointing) >= set(BLOCKS) else ", ".join(self.checkpointing) or "none"
        mode = "compiled" if self.compiled else "eager"
        mode += f", {self.attention} attention" if self.attention else ""
        mode += "" if self.strategy == "auto" else f", {self.strategy}"
        return f"{self.experiment} {self.stage} | {self.micro_batch} | {mode} | {recomputed}"


@dataclass(frozen=True)
class Decoding:
    """Clips of one video, decoded by worker processes and copied to the device.

    Attributes:
        workers: numbers of processes to measure.
        seconds: duration of each measurement.
        side: of the video's square frames in pixels.
        num_frames, size: T and S of a clip.
    """

    workers: tuple[int, ...]
    seconds: float
    side: int
    num_frames: int
    size: int

    @property
    def title(self) -> str:
        """Short name for messages."""
        return f"decoding with {', '.join(map(str, self.workers))} workers"


BLOCKS = ("exo_encoder", "ego_encoder", "projector", "ego_to_exo", "exo_to_ego", "language_model")
"""Parts that have repeated blocks."""


class SyntheticClips(Dataset[ClipBatch]):
    """The same synthetic micro-batch again and again, in fresh host tensors, as a loader would deliver it.

    Args:
        micro_batch: B.
        num_frames: T.
        size: side of a frame in pixels.
        vocab_size: of the language model.
        assumed: text length L and number of supervised tokens M; texts of the batch have lengths from 3/4 L to L.
        length: number of batches.
    """

    def __init__(
        self, micro_batch: int, num_frames: int, size: int, vocab_size: int, assumed: PlanConfig, length: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (micro_batch, num_frames, size, size, 3)
        self.length = length
        self.video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        columns = assumed.text_tokens + 1  # the placeholder takes one
        self.ids = torch.randint(3, vocab_size, (micro_batch, columns), generator=generator)
        self.ids[:, 4] = VIDEO_TOKEN_ID
        lengths = torch.linspace(columns, 0.75 * columns, micro_batch).long()
        position = torch.arange(columns)[None]
        self.mask = position < lengths[:, None]
        supervised = self.mask & (position >= lengths[:, None] - assumed.label_tokens)
        self.labels = self.ids.where(supervised, IGNORE_INDEX)
        self.ids = self.ids.where(self.mask, 0)
        self.prompt = self.ids[0, : columns - assumed.label_tokens].clone()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ClipBatch:
        if index >= self.length:
            raise IndexError(index)
        text = TextBatch(self.ids.clone(), self.mask.clone(), self.labels.clone())
        names = [str(row) for row in range(len(self.ids))]
        tokens = float((self.labels != IGNORE_INDEX).sum())
        return ClipBatch(names, text, tokens, self.video.clone(), self.video.flip(1), prompt=self.prompt.clone())


class VideoClips(Dataset[Tensor]):
    """Clips of 2 s from random places of one video, without end.

    Args:
        file: video of at least 3 s.
        num_frames: T.
        size: side of a clip's frames in pixels.
    """

    def __init__(self, file: Path, num_frames: int, size: int) -> None:
        self.file, self.num_frames, self.size = file, num_frames, size
        self.reader = ClipReader()

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Tensor:
        start_s = 0.37 * index % 1
        times_s = segment_midpoints(start_s, start_s + 1.9, self.num_frames)
        return torch.as_tensor(self.reader.read(self.file, times_s, self.size).frames)


def decode(work: Decoding, device: torch.device) -> dict[str, float]:
    """Return the clips that arrive on the device in a second, by number of workers."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, work.side, 3, 30)
        for workers in work.workers:
            loader = DataLoader(
                VideoClips(file, work.num_frames, work.size), 4, num_workers=workers, pin_memory=device.type == "cuda"
            )
            batches = iter(loader)
            for _ in range(2 * workers):  # every worker has started
                next(batches)
            began, clips = time.perf_counter(), 0
            while time.perf_counter() - began < work.seconds:
                clips += len(next(batches).to(device, non_blocking=True))
            if device.type == "cuda":
                torch.cuda.synchronize()
            rates[str(workers)] = clips / (time.perf_counter() - began)
            del batches
    return rates


class StepTimer(L.Callback):
    """Clocks the phases of every optimiser step after the warm-up; waits for the device at each border."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.phases: dict[str, list[float]] = defaultdict(list)
        self.last = 0.0

    def _mark(self, phase: str | None, trainer: L.Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if phase is not None and trainer.global_step >= WARMUP_STEPS:
            self.phases[phase].append(1e3 * (now - self.last))
        self.last = now

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Begin the forward pass."""
        if trainer.global_step == WARMUP_STEPS and trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._mark(None, trainer)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        """End the forward pass."""
        self._mark("forward", trainer)

    def on_after_backward(self, trainer: L.Trainer, *_: Any) -> None:
        """End the backward pass."""
        self._mark("backward", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """End the optimiser step; the Trainer has already counted it."""
        assert isinstance(pl_module, Stage)
        self.losses.append(pl_module.step_log["train/loss"])
        if trainer.global_step > WARMUP_STEPS:
            self._mark("optimiser", trainer)

    @property
    def step_ms(self) -> float:
        """Median time of a step."""
        steps = zip(*self.phases.values(), strict=False)
        return statistics.median(sum(step) for step in steps)


class PartClock:
    """Clocks the forward pass of every part of the model on the device, without waiting for it.

    Args:
        model: its parts are hooked.
    """

    def __init__(self, model: Exo2EgoModel) -> None:
        self.events: dict[str, list[torch.cuda.Event]] = defaultdict(list)
        for part in model.parts:
            if part != "lora":
                module = model.get_submodule(part)
                if part == "language_model":
                    module = model.language_model.causal_lm.get_decoder()
                module.register_forward_pre_hook(self._hook(part))
                module.register_forward_hook(self._hook(part))

    def _hook(self, part: str) -> Any:
        def record(*_: Any) -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events[part].append(event)

        return record

    def step_ms(self, steps: int) -> dict[str, float]:
        """Return the forward milliseconds of a step by part, averaged over all steps."""
        torch.cuda.synchronize()
        times = {}
        for part, events in self.events.items():
            begins, ends = events[0::2], events[1::2]
            spent = [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]
            calls = len(spent) // steps
            times[part] = sum(spent[WARMUP_STEPS * calls :]) / (steps - WARMUP_STEPS)
        return times


class StepProfile(L.Callback):
    """Profiles the last step by kind of kernel; ``shares`` maps kinds to their part of the device's time."""

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}
        self.top: list[tuple[str, float]] = []
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start with the last step."""
        if batch_idx == WARMUP_STEPS + STEPS and trainer.strategy.root_device.type == "cuda":
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Sum the kernels' times."""
        if self._profile is None:
            return
        torch.cuda.synchronize()
        self._profile.stop()
        times: dict[str, float] = defaultdict(float)
        kernels: dict[str, float] = defaultdict(float)
        for event in self._profile.key_averages():
            times[kernel_family(event.key)] += event.self_device_time_total
            kernels[event.key] += event.self_device_time_total
        total = sum(times.values()) or 1.0
        self.shares = {kind: spent / total for kind, spent in sorted(times.items(), key=lambda pair: -pair[1])}
        slowest = sorted(kernels.items(), key=lambda pair: -pair[1])[:14]
        self.top = [(name[:110], spent / total) for name, spent in slowest]
        self._profile = None


def kernel_family(name: str) -> str:
    """Return the kind of a kernel by its name."""
    lowered = name.lower()
    for family, words in FAMILIES.items():
        if any(word in lowered for word in words):
            return family
    return "elementwise"


def configuration(case: Case, smoke: bool) -> dict[str, Any]:
    """Compose a case's experiment for one device; its weights start at random."""
    hardware = ["trainer.num_nodes=1", "trainer.devices=1", "trainer.strategy=auto", "plan.samples=null"]
    tiny = ["network.language_model.overrides.vocab_size=512"]  # no tokenizer is read
    overrides = tiny if smoke else hardware
    if case.attention == "eager":
        overrides = [*overrides, "network.language_model.attn_implementation=eager"]
    config = compose(EXPERIMENTS / case.experiment, case.stage, overrides)
    arguments = config["model"]["init_args"]
    arguments["init"] = {}
    arguments.pop("demonstrations", None)  # without stored answers, the demonstrator takes part
    config["data"]["init_args"] |= {"micro_batch_size": case.micro_batch, "global_batch_size": case.micro_batch}
    config["trainer"]["accumulate_grad_batches"] = 1
    return config


def planned(case: Case, smoke: bool) -> dict[str, float]:
    """Count what one sample and one step of a case should take; runs in a process of its own."""
    torch.set_num_threads(1)
    config = configuration(case, smoke)
    stage = build_stage(config)
    plan = plan_stage(config, stage)
    recomputed = tuple(part for part in case.checkpointing if part in plan.activations_by_part)
    return {"flops": plan.flops, "plan_gib": plan.needed(case.micro_batch, recomputed) / 2**30}


@torch.no_grad()
def random_model(stage: Stage, device: torch.device) -> None:
    """Build the stage's model directly on the device with random weights of a usual size, frozen parts in bfloat16."""
    model = Exo2EgoModel(stage.network, stage.vocab_size, stage.uses, empty=PARTS)
    model.language_model.restore_buffers()
    load_weights(model, {}, stage.trained, stage.frozen_dtype, device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    stage.attach(model)
    stage.train()


def shard_in_training(stage: Stage, trainer: L.Trainer) -> None:
    """Have the Trainer shard the stage's model, as ``configure_model`` does with one that it builds."""

    def configure_model() -> None:
        assert stage.device_mesh is not None
        for unit in stage.model.units():
            shard(unit, stage.device_mesh, trainer.precision)

    stage.__dict__["configure_model"] = configure_model


def measure(case: Case, smoke: bool) -> dict[str, Any]:
    """Run one case through the Trainer and return its row."""
    torch.manual_seed(0)
    config = configuration(case, smoke)
    stage = build_stage(config)
    device = torch.device("cpu" if smoke else "cuda")
    stage.__dict__["tokenizer"] = SimpleNamespace(eos_token_id=2)  # only the end of an answer is asked of it
    random_model(stage, device)
    if case.compiled:
        stage.model.compile_blocks()
    stage.model.checkpoint_activations(case.checkpointing)
    clips, assumed = config["clips"], PlanConfig(**(config.get("plan") or {}))
    length = WARMUP_STEPS + (SMOKE_STEPS if smoke else STEPS + 1)  # the last one on a GPU is profiled
    data = SyntheticClips(case.micro_batch, clips["num_frames"], clips["image_size"], stage.vocab_size, assumed, length)
    loader: DataLoader[ClipBatch] = DataLoader(data, batch_size=None, collate_fn=lambda batch: batch)
    timer, trace = StepTimer(), StepProfile()
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        strategy=FSDP2() if case.strategy == "fsdp2" else "auto",
        use_distributed_sampler=False,
        precision="32-true" if smoke else "bf16-mixed",
        max_steps=length,
        gradient_clip_val=1.0,
        callbacks=[timer, trace],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    if case.strategy == "fsdp2":
        shard_in_training(stage, trainer)
    clock = None if smoke else PartClock(stage.model)
    try:
        with sdpa_kernel(KERNELS[case.attention]) if case.attention in KERNELS else nullcontext():
            trainer.fit(stage, loader)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    peak = 0.0 if smoke else torch.cuda.max_memory_allocated() / 2**30
    row = {"case": asdict(case), "step_ms": timer.step_ms, "peak_gib": peak, "kernels": trace.shares, "top": trace.top}
    row |= {f"{phase}_ms": statistics.median(times) for phase, times in timer.phases.items()}
    row["parts_forward_ms"] = clock.step_ms(length) if clock else {}
    row["losses"] = [float(loss) for loss in timer.losses]
    return row


def full_size_cases() -> list[Case | Decoding]:
    """Return the cases in the order of their worth: each stage as it runs, its best settings, then single levers."""
    one = Case("stage1", "exo2ego_7b", 8, BLOCKS)
    two = Case("stage2", "exo2ego_7b", 4, BLOCKS)
    three = Case("stage3", "exo2ego_7b", 4, BLOCKS)
    return [
        one,
        two,
        three,
        replace(one, micro_batch=4, compiled=True, checkpointing=("projector", "language_model")),
        replace(two, micro_batch=2, compiled=True, checkpointing=("projector", "language_model")),
        replace(three, micro_batch=2, compiled=True, checkpointing=("projector", "language_model")),
        Decoding((1, 2, 4, 8), 2.5, 448, 16, 336),
        replace(two, strategy="fsdp2"),
        replace(one, compiled=True),
        replace(two, compiled=True),
        replace(three, compiled=True),
        *(replace(three, attention=kernel) for kernel in ("flash", "efficient", "math", "eager")),
        replace(two, experiment="exo2ego_7b_answer_kl"),
        replace(one, micro_batch=16),
    ]


def smoke_cases() -> list[Case | Decoding]:
    """Return the same kinds of cases for the network of the default experiment, except compiled ones.

    A CPU has no memory-efficient attention: this case fails, and the others are measured.
    """
    one = Case("stage1", "toy", 2, BLOCKS)
    two = replace(one, stage="stage2")
    return [
        one,
        two,
        replace(one, stage="stage3", checkpointing=("language_model",)),
        Decoding((1, 2), 0.2, 64, 4, 32),
        replace(two, strategy="fsdp2"),
        *(replace(one, attention=kernel) for kernel in ("efficient", "math", "eager")),
    ]


def described(row: dict[str, Any], plan: dict[str, float] | None, peak_tflops: float | None) -> dict[str, Any]:
    """Add rates and the plan's numbers to a measured row."""
    if plan is None:
        return row
    tflops = plan["flops"] * row["case"]["micro_batch"] / row["step_ms"] / 1e9
    return row | plan | {"tflops": tflops, "mfu": None if peak_tflops is None else tflops / peak_tflops}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows."""
    measures = ["ms", "forward", "backward", "optimiser", "TFLOP/s", "MFU %", "GiB", "GiB planned"]
    lines = [["stage", "micro-batch", "mode", "recomputed", *measures]]
    for row in rows:
        case = Case(**row["case"])
        if "error" in row:
            lines.append([*case.title.split(" | "), "failed", *[""] * (len(measures) - 1)])
            continue
        phases = [row.get(f"{phase}_ms", math.nan) for phase in ("forward", "backward", "optimiser")]
        mfu = row.get("mfu")
        lines.append(
            [
                *case.title.split(" | "),
                *(f"{number:,.0f}" for number in (row["step_ms"], *phases)),
                f"{row['tflops']:.1f}" if "tflops" in row else "",
                "" if mfu is None else f"{100 * mfu:.1f}",
                f"{row['peak_gib']:.1f}",
                f"{row['plan_gib']:.1f}" if "plan_gib" in row else "",
            ]
        )
    return markdown_table(lines)


def profiles(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line on where a step's device time goes for each profiled row."""
    for row in rows:
        if row.get("kernels"):
            shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in row["kernels"].items())
            yield f"{Case(**row['case']).title}: {shares}"


def sharded_losses(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each case with fsdp2: how far its losses are from those of the same steps without."""
    measured = {Case(**row["case"]): row["losses"] for row in rows if "error" not in row}
    for case, losses in measured.items():
        alone = measured.get(replace(case, strategy="auto"))
        if case.strategy == "fsdp2" and alone is not None:
            furthest = max(abs(one - other) / abs(other) for one, other in zip(losses, alone, strict=True))
            yield (
                f"{case.title}: losses {', '.join(f'{loss:.5f}' for loss in losses)}; on a single device without it "
                f"{', '.join(f'{loss:.5f}' for loss in alone)}; largest relative difference {furthest:.1e}"
            )


def decoding_table(rates: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """Markdown of the decoded clips a second, next to what the fastest measured step of each stage reads."""
    needed: dict[str, float] = defaultdict(float)
    for row in rows:
        if "error" not in row:
            stage = row["case"]["stage"]
            needed[stage] = max(needed[stage], VIEWS[stage] * row["case"]["micro_batch"] / row["step_ms"] * 1e3)
    lines = [["workers", "clips/s", *(f"of the {need:.1f} that {stage} reads" for stage, need in needed.items())]]
    for workers, rate in rates.items():
        lines.append([workers, f"{rate:.1f}", *(f"{100 * rate / need:.0f} %" for need in needed.values())])
    return markdown_table(lines)


def report(result: dict[str, Any]) -> str:
    """Markdown of everything that was measured."""
    rows, parts = result["rows"], [table(result["rows"])]
    parts += ["\n".join(f"- {line}" for line in lines(rows)) for lines in (profiles, sharded_losses)]
    if "clips_per_s" in result:
        parts.append(decoding_table(result["clips_per_s"], rows))
    parts += [f"- {title}: {error}" for title, error in result["errors"].items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def print_rooflines(cases: list[Case], smoke: bool) -> None:
    """Print for each case what a step computes and moves, and the least time for it on an H100."""
    kinds = ["matrix product", "convolution", "attention", "elementwise", "cast", "copy", "normalisation", "optimiser"]
    times = [f"{name}, ms" for card in CARDS for name in (card, f"{card}, fused", f"{card}, heavy alone")]
    lines = [
        ["stage", "micro-batch", "mode", "recomputed", "TFLOP", *(f"GB {kind}" for kind in kinds), "GB fused", *times]
    ]
    for case in cases:
        config = configuration(case, smoke)
        stage, clips = build_stage(config), config["clips"]
        stage.__dict__["tokenizer"] = SimpleNamespace(eos_token_id=2)
        assumed = PlanConfig(**(config.get("plan") or {}))
        sizes = clips["num_frames"], clips["image_size"], stage.vocab_size
        operators = record(stage, SyntheticClips(case.micro_batch, *sizes, assumed, 1)[0], case.checkpointing)
        merged = fused(operators)
        heavy = [each for each in operators if each.kind in HEAVY.values()]
        moved = {kind: gigabytes for kind, (_, gigabytes) in by_kind(operators).items()}
        lines.append(
            [
                *case.title.split(" | "),
                f"{sum(each.flops for each in operators) / 1e12:.0f}",
                *(f"{moved.get(kind, 0.0):,.0f}" for kind in kinds),
                f"{sum(each.moved for each in merged) / 1e9:,.0f}",
                *(f"{least_ms(some, *card):,.0f}" for card in CARDS.values() for some in (operators, merged, heavy)),
            ]
        )
        print(f"{case.title}: {'; '.join(f'{name} {size:.0f} GB' for name, size in largest(operators))}", flush=True)
    print(markdown_table(lines))


def matrix_tflops(device: torch.device) -> float:
    """Measure what the card gives for a large bfloat16 matrix product, in TFLOP/s."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12


def main() -> None:
    """Measure all cases within the time limit, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--seconds", type=float, default=240, help="start no case after this time (default 240)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu.json"), help="file for the results")
    parser.add_argument("--roofline", action="store_true", help="count operations and bytes instead; needs no GPU")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    torch._dynamo.config.cache_size_limit = 64  # blocks of several shapes are compiled one after another
    work = smoke_cases() if options.smoke else full_size_cases()
    cases = list(dict.fromkeys(plain(case) for case in work if isinstance(case, Case)))
    if options.roofline:
        print_rooflines([*cases[:3], *(replace(case, checkpointing=()) for case in cases[:3])], options.smoke)
        return
    name = "CPU" if options.smoke else torch.cuda.get_device_name()
    peak = next((tflops for word, tflops in PEAK_TFLOPS.items() if word in name), None)
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "rows": [], "errors": {}}
    began = time.perf_counter()
    if not options.smoke:
        result["matrix_product_tflops"] = matrix_tflops(torch.device("cuda"))
        print(f"{name}: 8192 x 8192 x 8192 in bfloat16 at {result['matrix_product_tflops']:.0f} TFLOP/s")
    workers, start = (1, "fork") if options.smoke else (3, "spawn")
    with ProcessPoolExecutor(workers, get_context(start)) as pool:
        plans = {case: pool.submit(planned, case, options.smoke) for case in cases}
        for each in work:
            if time.perf_counter() - began > options.seconds:
                print(f"time is up: not measured: {each.title}")
                continue
            note = run_alone(each, options.smoke, result)
            print(f"{time.perf_counter() - began:5.0f} s: {each.title}: {note}", flush=True)
            write(options.out, result)
        for case, plan in plans.items():
            if error := plan.exception():
                result["errors"][f"plan of {case.title}"] = f"{type(error).__name__}: {error}"
        result["rows"] = [described(row, plan_of(row, plans), peak) for row in result["rows"]]
    write(options.out, result)
    print(f"\n{report(result)}")


def run_alone(work: Case | Decoding, smoke: bool, result: dict[str, Any]) -> str:
    """Measure one case into the result, where its error goes if it fails; return what to print about it."""
    try:
        if isinstance(work, Decoding):
            result["clips_per_s"] = decode(work, torch.device("cpu" if smoke else "cuda"))
            return ", ".join(f"{rate:.1f}" for rate in result["clips_per_s"].values()) + " clips a second"
        result["rows"].append(measure(work, smoke))
        return f"{result['rows'][-1]['step_ms']:,.0f} ms a step"
    except Exception as error:  # whatever it is, other cases may work
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        if isinstance(work, Case):
            result["rows"].append({"case": asdict(work), "error": reason})
        result["errors"][work.title] = reason
        return reason
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def plan_of(row: dict[str, Any], plans: dict[Case, Future[dict[str, float]]]) -> dict[str, float] | None:
    """Return the plan of a measured row; None for one that failed, or whose plan did."""
    plan = plans[plain(Case(**row["case"]))]
    return None if "error" in row or plan.exception() else plan.result()


def plain(case: Case) -> Case:
    """Return what the plan of a case depends on."""
    return replace(case, compiled=False, attention="", strategy="auto")


def write(file: Path, result: dict[str, Any]) -> None:
    """Replace the JSON file, and the Markdown next to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(result, indent=1) + "\n"), (file.with_suffix(".md"), report(result))):
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)


if __name__ == "__main__":
    main()
