"""Count what a training step computes and moves, and the least time that a card needs for it; no GPU is used.

The stage's own losses run forward and backward on tensors without memory (``FakeTensorMode``) under bfloat16 autocast,
operator by operator, as an eager step would launch them. Each operator takes at least the longer of its operations over
the card's peak and its bytes over the card's bandwidth. ``fused`` is the bound for compiled blocks: everything between
two matrix products, convolutions or attentions counts as one kernel that reads its inputs once and writes only what is
used later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from datamodules.batch import ClipBatch
from lightning_modules.model.exo2ego import PARTS, Exo2EgoModel
from lightning_modules.plan.stages import _FLOPS
from lightning_modules.stages.base import Stage
from lightning_modules.weights.loading import load_weights

CARDS = {"H100, data sheet": (989e12, 3.35e12), "H100, measured": (798e12, 3.0e12)}
"""Dense bfloat16 operations and bytes in a second. Measured: a matrix product of 8192^3, and a large copy."""

ATEN = torch.ops.aten
HEAVY = {
    ATEN.mm: "matrix product",
    ATEN.bmm: "matrix product",
    ATEN.addmm: "matrix product",
    ATEN.baddbmm: "matrix product",
    ATEN.convolution: "convolution",
    ATEN.convolution_backward: "convolution",
    ATEN._scaled_dot_product_flash_attention: "attention",
    ATEN._scaled_dot_product_flash_attention_backward: "attention",
}
COPIES = {
    ATEN._to_copy: "cast",
    ATEN.clone: "copy",
    ATEN.copy_: "copy",
    ATEN.cat: "copy",
    ATEN.gather: "copy",
    ATEN.index: "copy",
    ATEN.index_select: "copy",
    ATEN.embedding: "copy",
    ATEN.native_layer_norm: "normalisation",
    ATEN.native_layer_norm_backward: "normalisation",
    ATEN.native_group_norm: "normalisation",
    ATEN.native_group_norm_backward: "normalisation",
}
NO_TRAFFIC = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "device",
    "_unsafe_view",
    "detach",
}


@dataclass(frozen=True)
class Operator:
    """One kernel.

    Attributes:
        kind: one of the values of ``HEAVY`` and ``COPIES``, ``elementwise`` or ``optimiser``.
        name: of the operator.
        flops: a multiplication and an addition are two.
        reads, writes: bytes by storage.
    """

    kind: str
    name: str
    flops: int
    reads: dict[int, int]
    writes: dict[int, int]

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass
class Recorder(TorchDispatchMode):
    """Records every operator that moves memory."""

    operators: list[Operator] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.ids: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no two storages share an address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet, returns = func.overloadpacket, func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or packet.__name__ in NO_TRAFFIC:
            return result
        reads = self._bytes(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        writes = self._bytes(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if packet in HEAVY:
            self.operators.append(
                Operator(HEAVY[packet], packet.__name__, _flops(packet, args, kwargs, result), reads, writes)
            )
        elif writes:
            self.operators.append(Operator(COPIES.get(packet, "elementwise"), packet.__name__, 0, reads, writes))
        return result

    def _bytes(self, tensors: Iterator[Tensor]) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.ids:
                self.ids[storage._cdata] = len(self.kept)
                self.kept.append(storage)
            elements = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                elements *= size if stride else 1
            key = self.ids[storage._cdata]
            sizes[key] = max(sizes.get(key, 0), elements * tensor.element_size())
        return sizes


def _flops(packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    if packet is ATEN._scaled_dot_product_flash_attention:
        query, key, causal = args[0], args[1], len(args) > 4 and args[4]
        return _attention(query, key, causal)
    if packet is ATEN._scaled_dot_product_flash_attention_backward:
        return int(2.5 * _attention(args[1], args[2], args[11]))
    count = _FLOPS.get(packet)
    if count is not None:
        shapes = [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in args]
        return int(count(*shapes, out_shape=tuple(None if r is None else r.shape for r in result)))
    return int(flop_registry[packet](*args, **kwargs, out_val=result))


def _attention(query: Tensor, key: Tensor, causal: bool) -> int:
    return int(4 * query.numel() * key.shape[2] * (0.5 if causal else 1.0))


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Use the fused attention and dropout of a GPU, and normalise in float32, as autocast does there alone."""
    functional = nn.functional
    names = ("scaled_dot_product_attention", "dropout", "layer_norm", "group_norm")
    usual = {name: getattr(functional, name) for name in names}

    def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> Tensor:
        return ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    def in_float32(norm: Any) -> Any:
        def normalise(x: Tensor, *others: Any, **named: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(x, *others, **named)
            parts = [part.float() if isinstance(part, Tensor) else part for part in others]
            named = {key: part.float() if isinstance(part, Tensor) else part for key, part in named.items()}
            return norm(x.float(), *parts, **named)

        return normalise

    functional.scaled_dot_product_attention, functional.dropout = flash, dropout
    functional.layer_norm = in_float32(usual["layer_norm"])
    functional.group_norm = in_float32(usual["group_norm"])
    try:
        yield
    finally:
        for name, function in usual.items():
            setattr(functional, name, function)


def record(stage: Stage, batch: ClipBatch, recomputed: tuple[str, ...]) -> list[Operator]:
    """Return the operators of forward and backward of one micro-batch, in their order."""
    batch = batch.to("cpu")  # finds the supervised tokens
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder()
    with ExitStack() as stack:
        stack.enter_context(mode)
        model = Exo2EgoModel(stage.network, stage.vocab_size, stage.uses, empty=PARTS)
        model.language_model.restore_buffers()
        load_weights(model, {}, stage.trained, stage.frozen_dtype, torch.device("cpu"))
        stage.attach(model)
        stage.train()
        model.checkpoint_activations(recomputed)
        for owner in (batch, batch.text):
            for each in fields(owner):
                if isinstance(value := getattr(owner, each.name), Tensor):
                    setattr(owner, each.name, mode.from_tensor(value))
        stack.enter_context(as_on_cuda())
        stack.enter_context(recorder)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning does
            loss = torch.stack(list(stage.losses(batch).values())).sum()
        loss.backward()
    trained = sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
    # Norm, clipping, and a fused AdamW: weight, gradient and two moments are read, all but the gradient written.
    recorder.operators.append(Operator("optimiser", "adamw", 0, {-1: 4 * trained * 6}, {-1: 4 * trained * 4}))
    return recorder.operators


def fused(operators: list[Operator]) -> list[Operator]:
    """Merge what lies between two heavy operators into one that reads its inputs once and writes what is used later."""
    last_read: dict[int, int] = {}
    read_at_all: set[int] = set()
    for place, operator in enumerate(operators):
        for key in operator.reads:
            last_read[key] = place
            read_at_all.add(key)
    merged: list[Operator] = []
    group: list[Operator] = []

    def close(end: int) -> None:
        produced: dict[int, int] = {}
        reads: dict[int, int] = {}
        for each in group:
            for key, size in each.reads.items():
                if key not in produced:
                    reads[key] = max(size, reads.get(key, 0))
            produced |= each.writes
        kept = {k: size for k, size in produced.items() if last_read.get(k, end) >= end or k not in read_at_all}
        if group:
            merged.append(Operator("fused", "fused", 0, reads, kept))
        group.clear()

    for place, operator in enumerate(operators):
        if operator.kind in ("matrix product", "convolution", "attention", "optimiser"):
            close(place)
            merged.append(operator)
        else:
            group.append(operator)
    close(len(operators))
    return merged


def least_ms(operators: list[Operator], peak: float, bandwidth: float) -> float:
    """Return the sum of the least times of all operators, in milliseconds."""
    return 1e3 * sum(max(each.flops / peak, each.moved / bandwidth) for each in operators)


def by_kind(operators: list[Operator]) -> dict[str, tuple[float, float]]:
    """Return TFLOP and GB of each kind of operator."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for each in operators:
        sums[each.kind][0] += each.flops / 1e12
        sums[each.kind][1] += each.moved / 1e9
    return {kind: (flops, moved) for kind, (flops, moved) in sums.items()}


def largest(operators: list[Operator], count: int = 12) -> list[tuple[str, float]]:
    """Return the names of the operators that move most, with their GB."""
    sums: dict[str, float] = defaultdict(float)
    for each in operators:
        sums[f"{each.kind}: {each.name}"] += each.moved / 1e9
    return sorted(sums.items(), key=lambda pair: -pair[1])[:count]
