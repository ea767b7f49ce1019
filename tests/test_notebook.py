"""The notebook runs from its first cell to its last."""

import json
import sys
from pathlib import Path

import pytest

from lightning_modules import Exo2Ego

TOP = Path(__file__).parents[1]
OPTIONS = 'OPTIONS = ["RUNS=runs"]'


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(TOP / "docs")  # where a notebook application starts
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):  # of the make that runs the tests
        monkeypatch.delenv(name, raising=False)
    content = json.loads((TOP / "docs" / "exo2ego.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    short = [
        f"RUNS={tmp_path}/runs",
        f"PYTHON={sys.executable}",
        "ARGS=trainer.max_steps=2 trainer.val_check_interval=2",
    ]
    assert OPTIONS in cells[0]
    cells[0] = cells[0].replace(OPTIONS, f"OPTIONS = {short!r}")
    variables: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "exo2ego.ipynb", "exec"), variables)

    assert isinstance(variables["learner"], Exo2Ego)
    features = variables["features"]
    assert features.isfinite().all() and features.shape[:2] == (3, len(variables["ego_frames"]))
    assert "F changes x by" in capsys.readouterr().out
