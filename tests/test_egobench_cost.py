"""Cost of the benchmarks at their official sizes, against operations counted on real tensors."""

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.model.prefix_cache import SharedPrefix
from lightning_modules.plan.benchmarks import LEAD_TOKENS, SIZES, cost_table
from lightning_modules.plan.stages import PlanConfig


def hours_of(table):
    """Both durations of each benchmark."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    parts = {row[0]: [cell.replace(",", "").split() for cell in row[4:]] for row in rows}
    return {name: [float(n) / {"h": 1, "min": 60}[unit] for n, unit in cells] for name, cells in parts.items()}


def test_operations_are_those_of_a_clip_that_is_really_read(toy_tokenizer):
    table = cost_table(tiny.make_stage("stage3", toy_tokenizer), tiny.FRAMES, PlanConfig(peak_tflops=1e-6, mfu=1.0), 2)
    stage = tiny.make_stage("stage3", toy_tokenizer)
    stage.configure_model()
    stage.eval()
    language_model, captions = stage.model.language_model, [tuple([3] * 512)]
    # The counter of torch 2.11 leaves out the fused attention of CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as reading:
        visual = stage(tiny.video(1, 0), "ego")[0]
        prefix = SharedPrefix(
            language_model, torch.cat([language_model.embed(torch.zeros(LEAD_TOKENS).long()), visual])
        )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as behind:
        prefix.log_likelihoods(captions)
    size = SIZES["epic100_mir"]
    expected = size.clips * (reading.get_total_flops() + size.tokens * behind.get_total_flops() / 512)
    hours, _ = hours_of(table)["epic100_mir"]
    assert hours == pytest.approx(expected / (2 * 1e6 * 3600), rel=0.01)


def test_reading_a_clip_for_every_pair_costs_more_where_there_are_many(toy_tokenizer):
    table = cost_table(tiny.make_stage("stage3", toy_tokenizer), tiny.FRAMES, PlanConfig(peak_tflops=1e-6, mfu=1.0), 1)
    hours = hours_of(table)
    assert list(hours) == list(SIZES)
    once, pairs = hours["epic100_mir"]
    assert pairs > 3 * once
    assert hours["egomcq"][0] == hours["egomcq"][1]


def test_without_a_peak_there_are_no_hours(toy_tokenizer):
    table = cost_table(tiny.make_stage("stage3", toy_tokenizer), tiny.FRAMES, PlanConfig(), 1)
    assert "pair by pair" not in table and "PFLOP" in table
