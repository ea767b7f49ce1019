"""Estimate the cost of an experiment without allocating anything: ``make plan EXPERIMENT=name``.

The stage's own losses run forward and backward on the meta device, which has shapes and no memory. Operations are
counted as they are called, so frozen parts cost what autograd really does for them: no weight gradients, but the full
backward of attention. Saved tensors are counted as autograd saves them.

Letters: ``B`` clips, ``N`` visual tokens, ``D`` language model width, ``L`` text tokens, ``M`` supervised tokens,
``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from datamodules.batch import ClipBatch, Demonstration, TextBatch
from lightning_modules.compat import flash_attention, flash_attention_backward, storage_id, tree_leaves
from lightning_modules.model.quantize import BITS, quantizable
from lightning_modules.stages.answer_guidance import AnswerGuidance
from lightning_modules.stages.base import Stage
from lightning_modules.validation.report import markdown_table

_GIB = 2**30
_SLACK, _CONTEXT_GIB = 1.1, 1.5


@dataclass(frozen=True)
class PlanConfig:
    """Assumptions of a plan that the rest of the configuration does not state.

    Attributes:
        samples: training samples of an epoch; None leaves steps and hours out.
        text_tokens: L, text tokens of a usual sample.
        label_tokens: M, supervised ones among them.
        gpu_memory_gib: memory of one device; None leaves the check out.
        peak_tflops: dense bfloat16 peak of one device (A100 and A800: 312, H100 and H200: 989); None leaves hours out,
            and MFU while training.
        mfu: share of the peak that is reached.
    """

    samples: int | None = None
    text_tokens: int = 80
    label_tokens: int = 24
    gpu_memory_gib: float | None = None
    peak_tflops: float | None = None
    mfu: float = 0.4

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0 < self.label_tokens < self.text_tokens:
            raise ValueError(
                f"plan.label_tokens: got {self.label_tokens}, allowed: 1 to text_tokens - 1 = {self.text_tokens - 1}"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"plan.mfu: got {self.mfu}, allowed: above 0, at most 1")


@dataclass(frozen=True)
class PartActivations:
    """Memory that the blocks of one part hold for the backward pass of one sample, and the cost of recomputing it.

    Attributes:
        held: bytes inside of the blocks.
        inputs: bytes of the blocks' inputs, which are all that is held if the rest is recomputed.
        transient: bytes of the largest block.
        flops: operations of recomputing the blocks.
    """

    held: int
    inputs: int
    transient: int
    flops: int


@dataclass(frozen=True)
class StagePlan:
    """The cost of one stage.

    Attributes:
        name: ``stage0`` to ``stage3``.
        parts: parameters of each part, and whether it trains.
        visual_tokens, text_tokens: read by the language model for one sample.
        flops, flops_recomputed: of one sample, forward and backward, without and with checkpointed activations.
        activations, activations_checkpointed: bytes that autograd holds for one sample; with checkpointing that is the
            blocks' inputs, ``transient`` not included.
        transient: bytes of the largest block, which exist while it is recomputed.
        states: bytes of weights, gradients and optimiser on one device.
        cpu_states: the same in the memory of the CPU, for one device.
        further_fixes: how states take less, for messages.
        frozen_itemsize: bytes of a parameter that does not train.
        checkpointing: whether activations are checkpointed, or the parts whose blocks do so.
        devices, micro_batch, accumulate: how a global batch is split.
        steps, warmup_steps: of the whole stage; None if the number of samples is unknown.
        captions: that the demonstrator generates for a micro-batch, on average.
        gathers: times that the layers of the language model are gathered in a micro-batch; None if nothing is sharded.
        gathered: bytes of all parts that a device receives in a micro-batch for gathering; None if nothing is sharded.
        activations_by_part: of the parts with blocks, by name.
    """

    name: str
    parts: dict[str, tuple[int, bool]]
    visual_tokens: int
    text_tokens: int
    flops: int
    flops_recomputed: int
    activations: int
    activations_checkpointed: int
    transient: int
    states: int
    frozen_itemsize: int
    checkpointing: bool | tuple[str, ...]
    devices: int
    micro_batch: int
    accumulate: int
    steps_per_epoch: int | None
    steps: int | None
    warmup_steps: int | None
    captions: float = 0.0
    gathers: int | None = None
    gathered: int | None = None
    activations_by_part: dict[str, PartActivations] = field(default_factory=dict)
    cpu_states: int = 0
    further_fixes: tuple[str, ...] = ()

    @property
    def global_batch(self) -> int:
        """Return the number of samples of one optimiser step."""
        return self.devices * self.micro_batch * self.accumulate

    def needed(self, micro_batch: int, checkpointing: bool | tuple[str, ...]) -> float:
        """Return the bytes on one device, with 10 % of slack for the allocator and the device's own context."""
        held = self.activations
        if checkpointing is True:
            held = self.activations_checkpointed + self.transient
        elif checkpointing:
            parts = [self.activations_by_part[part] for part in checkpointing]
            held += sum(part.inputs - part.held for part in parts) + max(part.transient for part in parts)
        return _SLACK * (self.states + micro_batch * held) + _CONTEXT_GIB * _GIB

    def least_recomputation(self, memory_gib: float | None) -> tuple[str, ...]:
        """Return the parts to recompute with the fewest operations so that the plan fits; all if it never does."""
        parts = [name for name, part in self.activations_by_part.items() if part.held > part.inputs]
        choices = [choice for size in range(len(parts) + 1) for choice in combinations(parts, size)]
        for choice in sorted(choices, key=lambda names: sum(self.activations_by_part[name].flops for name in names)):
            if memory_gib is not None and self.needed(self.micro_batch, choice) <= memory_gib * _GIB:
                return choice
        return tuple(parts)

    def hours(self, peak_tflops: float, mfu: float) -> float | None:
        """Return the duration of the stage; recomputation does not count as useful work."""
        if self.steps is None:
            return None
        return self.steps * self.global_batch * self.flops / (self.devices * peak_tflops * 1e12 * mfu) / 3600

    def require_fit(self, memory_gib: float | None) -> None:
        """Compare the plan with the memory of one device.

        Raises:
            ValueError: it does not fit; the message names the keys to change. Never with None.
        """
        needed = self.needed(self.micro_batch, self.checkpointing)
        if memory_gib is None or needed <= memory_gib * _GIB:
            return
        fixes = []
        if self.needed(self.micro_batch, True) < needed:
            fixes.append("set model.init_args.activation_checkpointing: true")
        largest = max((b for b in range(1, self.micro_batch) if self.needed(b, True) <= memory_gib * _GIB), default=0)
        if largest:
            sizes = [b for b in range(largest, 0, -1) if self.global_batch % (self.devices * b) == 0]
            fixes.append(f"lower data.init_args.micro_batch_size to {sizes[0]}")
        if self.states > memory_gib * _GIB / _SLACK / 2:
            fixes.append("shard weights and optimiser over the devices (trainer.strategy)")
            if self.frozen_itemsize > 2 and not all(trained for _, trained in self.parts.values()):
                fixes.append("keep frozen parts in bfloat16 (model.init_args.frozen_dtype)")
            fixes += self.further_fixes
        raise ValueError(
            f"{self.name}: needs {needed / _GIB:.0f} GiB a device, plan.gpu_memory_gib is {memory_gib:g}: "
            f"{', or '.join(fixes) or 'use a smaller model'}"
        )


def plan_stage(config: dict[str, Any], stage: Stage) -> StagePlan:
    """Count operations, memory and steps of one stage.

    Args:
        config: resolved configuration.
        stage: made from it; its model is built on the meta device here.
    """
    assumed = PlanConfig(**(config.get("plan") or {}))
    data, trainer = config["data"]["init_args"], config["trainer"]
    devices = device_count(trainer)
    micro_batch, accumulate = _split(data, trainer, devices)
    stage.num_frames = num_frames = config["clips"]["num_frames"]
    low_precision = str(trainer.get("precision", "32-true")).startswith("bf16")
    probe = _Probe(stage, num_frames, assumed, torch.bfloat16 if low_precision else torch.float32)
    captions = _captioned_fraction(stage, data)
    held, inputs, transient = probe.saved_bytes(captions)
    flops = probe.mean_flops(captions)
    gathers, gathered = probe.gathers(captions)
    samples = assumed.samples
    steps_per_epoch = None if samples is None else samples // int(data["global_batch_size"])
    max_steps, max_epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    steps = None if max_steps < 0 else max_steps
    if steps_per_epoch is not None and max_epochs is not None and max_epochs >= 0:
        # The stage ends at the nearer limit.
        in_epochs = steps_per_epoch * max_epochs
        steps = in_epochs if steps is None else min(steps, in_epochs)
    parts = {
        part: (sum(p.numel() for p in stage.model.part(part).values()), part in stage.trained)
        for part in stage.model.parts
    }
    trained = sum(count for count, trains in parts.values() if trains)
    frozen = sum(count for count, trains in parts.values() if not trains)
    strategy = str(trainer.get("strategy", "auto"))
    states, cpu_states = _state_bytes(stage, trained, frozen, strategy, devices)
    sharded = "fsdp" in strategy
    if sharded:
        states += _gathered_bytes(stage, 2 if low_precision else 4, whole_language_model=captions > 0)
    plan = StagePlan(
        name=str(config["stage"]),
        parts=parts,
        visual_tokens=stage.network.visual_tokens(num_frames) * stage.num_visual_inputs,
        text_tokens=assumed.text_tokens,
        flops=flops,
        flops_recomputed=flops,
        activations=held,
        activations_checkpointed=inputs,
        transient=transient,
        frozen_itemsize=stage.frozen_dtype.itemsize,
        states=states,
        cpu_states=cpu_states,
        further_fixes=_further_fixes(stage, strategy),
        checkpointing=False,
        activations_by_part=probe.by_part(),
        devices=devices,
        micro_batch=micro_batch,
        accumulate=accumulate,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=None if steps is None else math.ceil(stage.optim.warmup_fraction * steps),
        captions=captions * micro_batch,
        gathers=gathers if sharded else None,
        gathered=gathered * (devices - 1) // devices if sharded else None,
    )
    wanted = stage.activation_checkpointing
    checkpointing: bool | tuple[str, ...]
    if isinstance(wanted, bool):
        checkpointing = wanted
    else:
        checkpointing = plan.least_recomputation(assumed.gpu_memory_gib) if wanted == "auto" else tuple(wanted)
    stage.model.checkpoint_activations(None if isinstance(checkpointing, bool) else checkpointing)
    return replace(plan, checkpointing=checkpointing, flops_recomputed=probe.mean_flops(captions))


def flops_per_sample(config: dict[str, Any], stage: Stage) -> int:
    """Return the useful operations of one sample, forward and backward, without recomputation that saves memory.

    Args:
        config: resolved configuration.
        stage: made from it; its model is built on the meta device here.
    """
    stage.num_frames = config["clips"]["num_frames"]
    probe = _Probe(stage, stage.num_frames, PlanConfig(**(config.get("plan") or {})), torch.float32)
    return probe.mean_flops(_captioned_fraction(stage, config["data"]["init_args"]))


def plan_demonstrations(config: dict[str, Any], demonstrator: AnswerGuidance) -> str:
    """Return a line on the cost of computing the demonstrator's answers about the pairs of an epoch.

    Args:
        config: resolved configuration of the stage that reads them.
        demonstrator: encoder, projector and language model alone; its model is built on the meta device here.
    """
    assumed, devices = PlanConfig(**(config.get("plan") or {})), device_count(config["trainer"])
    probe = _Probe(demonstrator, config["clips"]["num_frames"], assumed, torch.float32)
    captions = _captioned_fraction(demonstrator, config["data"]["init_args"])
    shares = {False: 1 - captions, True: captions}
    flops = round(sum(share * probe.demonstration_flops(captioned) for captioned, share in shares.items()))
    parts = [f"{flops / 1e12:.3g} TFLOP a pair"]
    if assumed.samples is not None:
        tokens = (1 - captions) * assumed.label_tokens + captions * demonstrator.answer_tokens
        size = assumed.samples * tokens * (8 * min(demonstrator.top_k, demonstrator.vocab_size) + 8)
        parts.append(f"{size / 1e9:,.1f} GB for {assumed.samples:,} pairs")
        if assumed.peak_tflops is not None:
            hours = assumed.samples * flops / (devices * assumed.peak_tflops * 1e12 * assumed.mfu) / 3600
            parts.append(f"{hours:,.1f} hours")
    return f"`make demonstrate`, once before {config['stage']}: {', '.join(parts)}"


def plan_table(plans: Sequence[StagePlan], assumed: Sequence[PlanConfig]) -> str:
    """Return a Markdown table: parameters of each part, then the costs, with a column for each stage."""
    parts = list(dict.fromkeys(part for plan in plans for part in plan.parts))
    rows = [["million parameters", *(plan.name for plan in plans)]]
    rows += [[part, *(_count(plan.parts.get(part)) for plan in plans)] for part in parts]
    rows += [["together", *(f"{sum(n for n, _ in p.parts.values()) / 1e6:,.1f}" for p in plans)]]
    rows += [["trained", *(f"{sum(n for n, t in p.parts.values() if t) / 1e6:,.1f}" for p in plans)]]
    costs: list[tuple[str, Callable[[StagePlan, PlanConfig], str | None]]] = [
        ("visual tokens", lambda p, a: f"{p.visual_tokens:,}"),
        ("with text", lambda p, a: f"{p.visual_tokens + p.text_tokens:,}"),
        ("TFLOP a sample", lambda p, a: f"{p.flops / 1e12:.3g}"),
        ("with recomputation", lambda p, a: f"{p.flops_recomputed / 1e12:.3g}" if p.checkpointing else None),
        ("captions generated a micro-batch", lambda p, a: f"{p.captions:.3g}" if p.captions else None),
        ("language model gathered a micro-batch", lambda p, a: None if p.gathers is None else f"{p.gathers} times"),
        ("GB gathered a micro-batch", lambda p, a: None if p.gathered is None else f"{p.gathered / 1e9:.1f}"),
        ("recomputed blocks", lambda p, a: _recomputed(p.checkpointing)),
        ("global batch", lambda p, a: f"{p.global_batch:,}"),
        ("devices x micro-batch x accumulated", lambda p, a: f"{p.devices} x {p.micro_batch} x {p.accumulate}"),
        ("steps an epoch", lambda p, a: None if p.steps_per_epoch is None else f"{p.steps_per_epoch:,}"),
        ("steps", lambda p, a: None if p.steps is None else f"{p.steps:,}"),
        ("of them warm-up", lambda p, a: None if p.warmup_steps is None else f"{p.warmup_steps:,}"),
        ("GiB of weights and optimiser", lambda p, a: f"{p.states / _GIB:.2f}"),
        ("on the CPU", lambda p, a: f"{p.cpu_states / _GIB:.2f}" if p.cpu_states else None),
        ("GiB a sample, everything held", lambda p, a: f"{p.activations / _GIB:.2f}"),
        ("GiB a sample, checkpointed", lambda p, a: f"{p.activations_checkpointed / _GIB:.2f}"),
        ("and while recomputing", lambda p, a: f"{p.transient / _GIB:.2f}"),
        ("GiB a device", lambda p, a: f"{p.needed(p.micro_batch, p.checkpointing) / _GIB:.1f}"),
        ("of", lambda p, a: None if a.gpu_memory_gib is None else f"{a.gpu_memory_gib:g}"),
        ("hours", lambda p, a: _hours(p, a)),
    ]
    rows.append(["cost", *("" for _ in plans)])
    for title, value in costs:
        values = [value(plan, a) for plan, a in zip(plans, assumed, strict=True)]
        if any(v is not None for v in values):
            rows.append([title, *(v or "" for v in values)])
    return markdown_table(rows)


def _count(part: tuple[int, bool] | None) -> str:
    if part is None:
        return ""
    return f"{part[0] / 1e6:,.2f}{' *' if part[1] else '  '}"


def _recomputed(checkpointing: bool | tuple[str, ...]) -> str:
    if isinstance(checkpointing, bool):
        return "all" if checkpointing else "none"
    return ", ".join(checkpointing) or "none"


def _hours(plan: StagePlan, assumed: PlanConfig) -> str | None:
    if assumed.peak_tflops is None or plan.steps is None:
        return None
    return f"{plan.hours(assumed.peak_tflops, assumed.mfu):,.1f}"


def device_count(trainer: dict[str, Any]) -> int:
    """Return the number of devices of all nodes.

    Raises:
        ValueError: the configuration leaves it to the machine.
    """
    devices = trainer.get("devices", 1)
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices: got {devices!r}; a plan needs a number: make plan ARGS=trainer.devices=8")
    return devices * int(trainer.get("num_nodes", 1))


def _split(data: dict[str, Any], trainer: dict[str, Any], devices: int) -> tuple[int, int]:
    """Return micro-batch size and number of accumulated micro-batches."""
    together, micro_batch = int(data["global_batch_size"]), data.get("micro_batch_size")
    per_device = together // devices
    if micro_batch is None:
        micro_batch = per_device // int(trainer.get("accumulate_grad_batches") or 1)
    if micro_batch < 1 or together % (devices * micro_batch):
        raise ValueError(
            f"data.init_args.micro_batch_size: {together} samples do not split into {devices} devices times "
            f"{micro_batch}: allowed are divisors of {per_device}"
        )
    return micro_batch, per_device // micro_batch


def _state_bytes(stage: Stage, trained: int, frozen: int, strategy: str, devices: int) -> tuple[int, int]:
    """Count bytes of weights, gradients and optimiser on a device and, where they are offloaded, on the CPU.

    Trained parameters have float32 weights, gradients, two moments (8 bits each with ``adamw8bit``) and a bfloat16 copy
    during computation; DDP adds buckets. Quantised weights are whole on each device, with one of them dequantised.
    """
    layers = _quantized(stage)
    weights = [layer.weight.numel() for layer in layers]
    quantized = sum(weights)
    held = 0
    if stage.quantization is not None:
        held = math.ceil(BITS[stage.quantization] / 8 * quantized) + 2 * max(weights, default=0)
    frozen_bytes = stage.frozen_dtype.itemsize * (frozen - quantized)
    if "fsdp" in strategy:
        shard = (16 * trained + frozen_bytes) // devices
        return (held, shard) if "offload" in strategy else (held + shard, 0)
    moments = 2 if stage.optim.algorithm == "adamw8bit" else 8
    buckets = 4 if devices > 1 else 0
    return (10 + moments + buckets) * trained + frozen_bytes + held, 0


def _quantized(stage: Stage) -> list[nn.Linear]:
    """Return the layers of a model, on the meta device, that would be quantised."""
    if stage.quantization is None or "language_model" in stage.trained:
        return []
    return [layer for block in stage.model.language_model.blocks() for layer in quantizable(block)]


def _further_fixes(stage: Stage, strategy: str) -> tuple[str, ...]:
    fixes = []
    if stage.quantization is None and stage.frozen_dtype.itemsize == 2 and "language_model" not in stage.trained:
        fixes.append("store the frozen language model in 8 bits (model.init_args.frozen_dtype: int8)")
    if "offload" not in strategy:
        fixes.append("keep what trains on the CPU (trainer.strategy: fsdp2_cpu_offload)")
    return tuple(fixes)


def _gathered_bytes(stage: Stage, itemsize: int, whole_language_model: bool) -> int:
    """Count the gathered parameters during computation: those outside all inner units, one unit, and the next one.

    Args:
        stage: with its model on any device.
        itemsize: bytes of a gathered parameter.
        whole_language_model: all of its layers are gathered at the same time, to generate captions.
    """
    *inside, (_, around) = _unit_sizes(stage)
    sizes = dict(inside)
    together = 2 * max(sizes.values())
    if whole_language_model:
        together = max(together, sum(sizes[layer] for layer in stage.model.language_model.blocks()))
    return itemsize * (around + together)


def _unit_sizes(stage: Stage) -> list[tuple[nn.Module, int]]:
    """Return the units that are gathered one by one with the number of their own parameters, the model last."""
    counted = {id(layer.weight) for layer in _quantized(stage)}
    sizes = []
    for unit in stage.model.units():
        own = [parameter for parameter in unit.parameters() if id(parameter) not in counted]
        counted |= {id(parameter) for parameter in own}
        sizes.append((unit, sum(parameter.numel() for parameter in own)))
    return sizes


def _captioned_fraction(stage: Stage, data: dict[str, Any]) -> float:
    """Return the fraction of samples for which the demonstrator generates a caption: those without narration.

    Args:
        stage: to plan.
        data: arguments of its data.
    """
    if not isinstance(stage, AnswerGuidance) or stage.demonstrations is not None:
        return 0.0
    narration = data.get("narration") or {}
    fraction, ratio = float(narration.get("ego_text_fraction", 1.0)), narration.get("unnarrated_ratio")
    others = 1 - fraction if ratio is None else min(1 - fraction, float(ratio) * fraction)
    if others and narration.get("share") is not None:
        return 1 - float(narration["share"])
    return others / (fraction + others)


def _convolution_backward_flop(
    grad_out: Shape, x: Shape, weight: Shape, *settings: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count a forward each for the gradients of input and weight; torch's own count treats depthwise as dense."""
    transposed, wanted = settings[4], settings[7]
    positions = math.prod((x if transposed else grad_out)[2:])
    return int(2 * x[0] * positions * math.prod(weight) * sum(wanted[:2]))


def _attention_backward_flop(
    grad_out: Shape, query: Shape, key: Shape, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Count twice the forward; the recomputation of attention weights in a fused kernel is no useful work."""
    return int(8 * math.prod(query) * key[2])


Shape = Sequence[int]
_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.convolution_backward: _convolution_backward_flop,
    flash_attention_backward(): _attention_backward_flop,
}


@dataclass
class _Call:
    """One call of a block: bytes held inside of it and of its inputs, and operations of its forward pass."""

    module: nn.Module
    held: int = 0
    inputs: int = 0
    flops: int = 0


class _Probe:
    """Runs one sample through a stage's losses on the meta device."""

    def __init__(self, stage: Stage, num_frames: int, assumed: PlanConfig, dtype: torch.dtype) -> None:
        self.stage, self.assumed = stage, assumed
        stage.attach(stage.on_meta())
        stage.to("meta")
        for parameter in stage.parameters():
            parameter.data = parameter.data.to(dtype)
        for part in stage.model.parts:
            for parameter in stage.model.part(part).values():
                parameter.requires_grad_(part in stage.trained)
        stage.train()
        side = stage.network.encoder_shape.image_size
        length = assumed.text_tokens
        with torch.device("meta"):
            video = torch.empty(1, num_frames, side, side, 3, dtype=torch.uint8)
            ids = torch.empty(1, length, dtype=torch.int64)
            text = TextBatch(ids, torch.empty(1, length, dtype=torch.bool), ids)
            self.batch = ClipBatch(["meta"], text, float(assumed.label_tokens), video, video)
            self.prompt = torch.empty(length - assumed.label_tokens, dtype=torch.int64)
            self.batch.prompt = self.prompt
        stage.read_text = self._read_text  # type: ignore[method-assign]
        self.generating = False
        if isinstance(stage, AnswerGuidance):
            self.answer_tokens = stage.answer_tokens
            stage.answers = self._answers  # type: ignore[method-assign]
            if stage.demonstrations is not None:
                self._read_demonstrations(stage)

    def _read_demonstrations(self, stage: AnswerGuidance) -> None:
        """Give the batch stored answers, in the place of exocentric video where that is not needed."""
        if not stage.encodes_exo:
            self.batch.exo_video = None
        shape = (self.assumed.label_tokens, min(stage.top_k, stage.vocab_size))
        likeliest = torch.empty(shape, dtype=torch.int64, device="meta")
        log_probs = torch.empty(shape, device="meta")
        self.batch.demonstration = Demonstration(self.batch.text, likeliest, log_probs, log_probs[:, 0])

    def mean_flops(self, captions: float) -> int:
        """Count operations of a sample on average, if that fraction of all samples has a caption generated."""
        counts = [
            self.flops(captioned) if share else 0 for captioned, share in ((False, 1 - captions), (True, captions))
        ]
        return round((1 - captions) * counts[0] + captions * counts[1])

    def gathers(self, captions: float) -> tuple[int, int]:
        """Count how often the language model's layers are gathered in a micro-batch, and the bytes of all parts.

        A unit is gathered for each call of its forward, and for its backward pass; the parameters around all units are
        gathered once. Where captions are generated, the layers stay gathered for all of their tokens and the pass that
        follows.
        """
        model = self.stage.model
        *units, (_, around) = _unit_sizes(self.stage)
        itemsize = next(model.parameters()).element_size()
        times = dict.fromkeys((unit for unit, _ in units), 0)

        def called(unit: nn.Module, args: Any, output: Any) -> None:
            if not self.generating:
                times[unit] += 1 + any(leaf.requires_grad for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

        handles = [unit.register_forward_hook(called) for unit, _ in units]
        with _flash_attention():
            self._loss(captions > 0)
        for handle in handles:
            handle.remove()
        (of_language_model,) = {times[layer] for layer in model.language_model.blocks()}
        return of_language_model, itemsize * (around + sum(times[unit] * size for unit, size in units))

    def flops(self, captioned: bool = False) -> int:
        """Count operations of forward and backward; a multiplication and an addition are two.

        Args:
            captioned: the sample has no narration, and the demonstrator generates a caption for it.
        """
        with _flash_attention(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            self._loss(captioned).backward()
        return int(counter.get_total_flops())

    def demonstration_flops(self, captioned: bool) -> int:
        """Count operations of the demonstrator's answer about one pair, see ``flops``."""
        stage = self.stage
        assert isinstance(stage, AnswerGuidance) and self.batch.exo_video is not None
        self._set_narrated(captioned)
        with torch.no_grad(), _flash_attention(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            stage.demonstrate(stage.model.exo_encoder(self.batch.exo_video), self.batch)
        return int(counter.get_total_flops())

    def by_part(self) -> dict[str, PartActivations]:
        """Return what each part holds inside of its blocks, by name, for the kind of sample that was counted last."""
        parts = {}
        for part, blocks in self.stage.model.blocks().items():
            calls = [call for call in self._calls if call.module in blocks]
            parts[part] = PartActivations(
                held=sum(call.held for call in calls),
                inputs=sum(call.inputs for call in calls),
                transient=max((call.held for call in calls), default=0),
                flops=sum(call.flops for call in calls if call.held),
            )
        return parts

    def saved_bytes(self, captions: float) -> tuple[int, int, int]:
        """Count bytes that autograd holds after forward, the same with checkpointed blocks, and the largest block.

        Args:
            captions: fraction of the samples that have a caption generated; the larger kind of sample counts.
        """
        kinds = [kind for kind, share in ((False, 1 - captions), (True, captions)) if share]
        counts = [self._saved_bytes(kind) for kind in kinds]
        held, inputs, transient = (max(of_kind) for of_kind in zip(*counts, strict=True))
        return held, inputs, transient

    def _saved_bytes(self, captioned: bool) -> tuple[int, int, int]:
        seen: set[int] = {storage_id(p) for p in self.stage.parameters()} | {
            storage_id(b) for b in self.stage.buffers()
        }
        outside = 0
        self._calls: list[_Call] = []
        running = False
        entered: list[Tensor] = []
        kept: list[Tensor] = []  # so that no two storages share an address

        def pack(tensor: Tensor) -> Tensor:
            nonlocal outside
            if storage_id(tensor) not in seen:
                seen.add(storage_id(tensor))
                kept.append(tensor)
                size = tensor.untyped_storage().nbytes()
                if running:
                    self._calls[-1].held += size
                else:
                    outside += size
            return tensor

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal running, entered
            running = True
            self._calls.append(_Call(module, flops=-counter.get_total_flops()))
            entered = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

        counted: set[int] = set()

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal running
            running = False
            self._calls[-1].flops += counter.get_total_flops()
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
                for tensor in entered:
                    if storage_id(tensor) not in counted:
                        counted.add(storage_id(tensor))
                        kept.append(tensor)
                        self._calls[-1].inputs += tensor.untyped_storage().nbytes()

        counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        with _hooks(self.stage.model, enter, leave), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with _flash_attention(), counter:
                loss = self._loss(captioned)
        del loss
        held, inputs = (sum(getattr(call, name) for call in self._calls) for name in ("held", "inputs"))
        return outside + held, outside + inputs, max((call.held for call in self._calls), default=0)

    def _loss(self, captioned: bool) -> Tensor:
        self.stage.step_log = {}
        self._set_narrated(captioned)
        return torch.stack(list(self.stage.losses(self.batch).values())).sum()

    def _set_narrated(self, captioned: bool) -> None:
        self.batch.narrated = torch.empty(1, dtype=torch.bool, device="meta") if captioned else None

    def _read_text(self, visual: Tensor, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Replace ``Stage.read_text``: labels follow the prompt, so that their place needs no values."""
        ids = batch.text.input_ids
        labels = ids.shape[1] - len(self.prompt)
        logits = self._logits(visual, ids, labels)
        return logits[0], torch.empty(labels, dtype=torch.int64, device="meta")

    def _answers(self, visual: Tensor, batch: ClipBatch) -> TextBatch:
        """Replace ``AnswerGuidance.answers``: token by token costs as much as one pass over all of them."""
        ids = torch.empty(1, len(self.prompt) + self.answer_tokens, dtype=torch.int64, device="meta")
        self.generating = True
        self._logits(visual, ids, self.answer_tokens)
        self.generating = False
        return TextBatch(ids, torch.empty_like(ids, dtype=torch.bool), ids)

    def _logits(self, visual: Tensor, input_ids: Tensor, labels: int) -> Tensor:
        """Return the logits of the last tokens of a row, float32 [1, labels, V]."""
        model = self.stage.model.language_model
        text = model.embed(input_ids)
        embeds = torch.cat([visual.to(text.dtype), text], dim=1)
        length = embeds.shape[1]
        mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
        position = torch.arange(length, device="meta")[None]  # OPT would derive it from the mask
        decoder = model.causal_lm.get_decoder()
        hidden = decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
        ).last_hidden_state
        return model.logits(hidden[:, -labels - 1 : -1])


@contextmanager
def _hooks(model: Any, enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    handles = []
    for blocks in model.blocks().values():
        for block in blocks:
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Compute attention as a GPU does: with a fused kernel that holds no matrix of weights."""
    usual = nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if repeats := query.shape[1] // key.shape[1] - 1:
            key, value = (tensor.repeat_interleave(1 + repeats, dim=1) for tensor in (key, value))
        return flash_attention(query, key, value)

    nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = usual
