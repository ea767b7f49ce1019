"""The GPU benchmark on tiny sizes on a CPU: every stage's step runs through it and its results are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_smoke_run_measures_every_stage(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "tests/bench/bench_gpu.py", "--smoke", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(out.read_text())
    rows = result["rows"]
    # A CPU has no such kernel: the case fails, and those after it are measured.
    (failed,) = result["errors"]
    assert "efficient attention" in failed and "error" in rows.pop(4)
    assert [row["case"]["stage"] for row in rows] == ["stage1", "stage2", "stage3", "stage2", "stage1", "stage1"]
    for row in rows:
        assert len(row["losses"]) == 4 and all(0 < loss < 100 for loss in row["losses"])
        phases = sum(row[f"{phase}_ms"] for phase in ("forward", "backward", "optimiser"))
        assert 0.5 * row["step_ms"] < phases < 2 * row["step_ms"]
        assert row["flops"] > 0 and row["tflops"] > 0
    # Neither sharding over one process nor the kernel of attention changes what is learned.
    assert rows[3]["case"]["strategy"] == "fsdp2"
    assert rows[3]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-4)
    assert [row["case"]["attention"] for row in rows[4:]] == ["math", "eager"]
    for row in rows[4:]:
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-4)
    assert result["clips_per_s"].keys() == {"1", "2"} and all(rate > 0 for rate in result["clips_per_s"].values())
    shown = out.with_suffix(".md").read_text()
    assert shown in run.stdout
    assert shown.count("| toy stage") == 7
    assert "largest relative difference" in shown and "that stage2 reads" in shown


@pytest.mark.slow
def test_rooflines_are_counted_without_a_gpu():
    command = [sys.executable, "tests/bench/bench_gpu.py", "--smoke", "--roofline"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line for line in run.stdout.splitlines() if line.startswith("| toy stage")]
    assert len(rows) == 6
