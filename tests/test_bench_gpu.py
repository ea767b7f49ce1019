"""The GPU benchmark on tiny sizes on a CPU: every stage's step runs through it and its results are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_smoke_run_measures_every_stage(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "tests/bench/bench_gpu.py", "--smoke", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"]["stage"] for row in rows] == ["stage1", "stage2", "stage3"]
    for row in rows:
        assert 0 < row["loss"] < 100
        phases = sum(row[f"{phase}_ms"] for phase in ("forward", "backward", "optimiser"))
        assert 0.5 * row["step_ms"] < phases < 2 * row["step_ms"]
        assert row["flops"] > 0 and row["tflops"] > 0
    assert run.stdout.count("| toy stage") == 3


@pytest.mark.slow
def test_rooflines_are_counted_without_a_gpu():
    command = [sys.executable, "tests/bench/bench_gpu.py", "--smoke", "--roofline"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line for line in run.stdout.splitlines() if line.startswith("| toy stage")]
    assert len(rows) == 3
