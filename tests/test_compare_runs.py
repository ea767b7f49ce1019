"""Differences of two runs are paired by question, and their intervals are over takes."""

from __future__ import annotations

import json
import sys

import pytest
from bench import compare_runs


def write(folder, right):
    """Write the answers to a choice about four clips of each of two takes, the first ``right`` of a take correct."""
    folder.mkdir()
    rows = [
        {
            "clip": f"{take}/{clip}",
            "view": view,
            "ego_visible": clip > 0,
            "question": "Which?",
            "scores": {"choice": score},
        }
        for take in ("a", "b")
        for clip in range(4)
        for view, score in (("ego", float(clip < right)), ("exo", 0.0))
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_differences_are_paired_and_averaged_over_seeds(tmp_path):
    ours = [compare_runs.read(write(tmp_path / f"ours{seed}", right)) for seed, right in enumerate((3, 4))]
    theirs = compare_runs.read(write(tmp_path / "theirs", 1))
    assert {name: len(of) for name, of in theirs.items()} == {"choice": 8, "choice, hidden": 2}
    differences = {key: [of["choice"][key] - theirs["choice"][key] for of in ours] for key in theirs["choice"]}
    # Both takes gain the same, so that the interval has no width: (2 + 3) / 2 of four clips.
    assert compare_runs.interval(differences) == (0.625, 0.625, 0.625)


def test_a_run_for_each_seed(tmp_path, monkeypatch, capsys):
    folder = str(write(tmp_path / "run", 2))
    monkeypatch.setattr(sys, "argv", ["compare_runs", folder, "--minus", folder, folder])
    with pytest.raises(SystemExit):
        compare_runs.main()
    assert "--minus: got 2 folders for 1: name as many" in capsys.readouterr().err


def test_answers_from_one_input_are_paired_with_those_from_all(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "run", 3)
    rows = [
        {
            "clip": f"{take}/{clip}",
            "ego_visible": clip > 0,
            "task": "choice",
            "question": "Which?",
            "right": {"x": clip < 1, "mapped": clip < 3, "both": clip < 3},
        }
        for take in ("a", "b")
        for clip in range(4)
    ]
    (folder / "consistency.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["compare_runs", str(folder), "--minus", str(folder), "--alone", "x"])
    compare_runs.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| choice | 75.0 | 25.0 | +50.0 [+50.0, +50.0] |",
        "| choice, hidden | 100.0 | 100.0 | +0.0 [+0.0, +0.0] |",
    ]
