"""Estimate the cost of the benchmarks at their official sizes, without any of their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.model.prefix_cache import SharedPrefix
from lightning_modules.plan.stages import PlanConfig
from lightning_modules.stages.base import Stage
from lightning_modules.validation.report import markdown_table

LEAD_TOKENS = 40
"""Tokens of a system text and an instruction."""


@dataclass(frozen=True)
class Size:
    """Size of a benchmark as its authors released it.

    Attributes:
        clips: distinct clips, each encoded once.
        tokens: tokens after a clip, of questions, options and candidates together.
        pairs: pairs of clip and candidate, the number of clips to encode without a shared prefix.
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
"""Counted in the official files, or reported by their users if those are not public. Tokens are for a vocabulary of
32,000; a common beginning of candidates counts once."""


def cost_table(stage: Stage, num_frames: int, assumed: PlanConfig, devices: int) -> str:
    """Return a Markdown table of the operations and hours of each benchmark, also for scoring pair by pair.

    Args:
        stage: a stage for egocentric clips; its model is built on the meta device here.
        num_frames: frames of a clip.
        assumed: speed of the devices; without their peak there are no hours.
        devices: number of devices that share the clips.
    """
    encode, follow = _flops(stage, num_frames)
    head = ["benchmark", "clips", "tokens after each", "PFLOP"]
    rows = [
        head if assumed.peak_tflops is None else [*head, f"on {devices} device{'s' * (devices > 1)}", "pair by pair"]
    ]
    for name, size in SIZES.items():
        flops = size.clips * (encode + size.tokens * follow)
        alone = size.pairs * (encode + size.tokens * size.clips / size.pairs * follow)
        cells = [name, f"{size.clips:,}", f"{size.tokens:,}", f"{flops / 1e15:,.3g}"]
        if assumed.peak_tflops is not None:
            speed = devices * assumed.peak_tflops * 1e12 * assumed.mfu * 3600
            cells += [_duration(flops / speed), _duration(alone / speed)]
        rows.append(cells)
    return markdown_table(rows)


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _flops(stage: Stage, num_frames: int) -> tuple[float, float]:
    """Return the operations of encoding a clip, and of each token after it with its attention to the clip."""
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
