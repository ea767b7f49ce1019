"""What the benchmarks cost at their official sizes, before any file of theirs is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.model.prefix_cache import SharedPrefix
from lightning_modules.plan import PlanConfig
from lightning_modules.stages.base import Stage
from lightning_modules.validation.report import markdown_table

LEAD_TOKENS = 40
"""Of a system text and an instruction."""


@dataclass(frozen=True)
class Size:
    """A benchmark as its authors released it.

    Attributes:
        clips: distinct ones, each read once.
        tokens: that follow a clip, in all: questions, options, candidates.
        pairs: of clip and candidate; what scoring one by one would read.
    """

    clips: int
    tokens: int
    pairs: int


SIZES = {
    "egoschema": Size(5_031, 250, 5_031 * 5),
    "qaego4d_closed": Size(500, 120, 500 * 4),
    "qaego4d_open": Size(1_850, 60, 1_850),
    "egotaskqa": Size(2_128, 4 * (40 + 2_700), 8_783 * 900),
    "charades_ego": Size(846, 157 * 6, 846 * 157),
    "epic100_mir": Size(9_668, 11_500, 9_668 * 3_842),
    "egoplan": Size(3_355, 150, 3_355 * 4),
    "vlnqa": Size(200, 120, 200 * 4),
    "egomcq": Size(198_755, 12, 198_755),
}
"""Counted in the official files, or where these are not public the counts that their users report; tokens are for a
vocabulary of 32,000, a common beginning of candidates counted once."""


def cost_table(stage: Stage, num_frames: int, assumed: PlanConfig, devices: int) -> str:
    """Markdown: operations and hours of each benchmark, and what scoring pair by pair would take.

    Args:
        stage: its model is built on the meta device here; answers about egocentric clips.
        num_frames: of a clip.
        assumed: what devices do; without their peak, hours are left out.
        devices: that share the clips.
    """
    read, follow = _flops(stage, num_frames)
    head = ["benchmark", "clips", "tokens behind each", "PFLOP"]
    rows = [
        head if assumed.peak_tflops is None else [*head, f"on {devices} device{'s' * (devices > 1)}", "pair by pair"]
    ]
    for name, size in SIZES.items():
        flops = size.clips * (read + size.tokens * follow)
        alone = size.pairs * (read + size.tokens * size.clips / size.pairs * follow)
        cells = [name, f"{size.clips:,}", f"{size.tokens:,}", f"{flops / 1e15:,.3g}"]
        if assumed.peak_tflops is not None:
            speed = devices * assumed.peak_tflops * 1e12 * assumed.mfu * 3600
            cells += [_duration(flops / speed), _duration(alone / speed)]
        rows.append(cells)
    return markdown_table(rows)


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _flops(stage: Stage, num_frames: int) -> tuple[float, float]:
    """Of reading a clip, and of each token behind it, attention to the clip included."""
    stage.attach(stage.on_meta())
    stage.to("meta").eval()
    side, language_model = stage.network.encoder_shape.image_size, stage.model.language_model
    candidate = tuple(range(512))

    def read() -> SharedPrefix:
        visual = stage(torch.empty(1, num_frames, side, side, 3, dtype=torch.uint8, device="meta"), "ego")
        lead = language_model.embed(torch.empty(LEAD_TOKENS, dtype=torch.int64, device="meta"))
        return SharedPrefix(language_model, torch.cat([lead, visual[0]]))

    with torch.no_grad():
        prefix, once = _counted(read)
        _, behind = _counted(lambda: prefix.log_likelihoods([candidate]))
    return once, behind / len(candidate)


def _counted(call: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, int(counter.get_total_flops())
