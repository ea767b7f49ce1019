"""The terminal during a stage: a banner, one bar, lines above it, and plain lines where there is no terminal."""

import os
import pty
import re
import sys
import threading
import warnings

import lightning as L
import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from lightning_modules import training
from lightning_modules.callbacks.progress import StageProgress, describe
from lightning_modules.callbacks.run_report import RunReport, score_line
from lightning_modules.callbacks.throughput import TrainingMonitor, learning_rates
from lightning_modules.compat import silence_expected_warnings


class Chatty(L.Callback):
    """Prints in every step, as callbacks and libraries do."""

    def on_train_batch_end(self, trainer, *_):
        print(f"line {trainer.global_step}")


def fit(toy_tokenizer, tmp_path, steps=3):
    callbacks = [TrainingMonitor(1), RunReport(tmp_path, "stage2"), Chatty(), StageProgress("stage2", 0.0)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(tiny.make_stage("stage2", toy_tokenizer), DataLoader([tiny.clip_batch()] * steps, batch_size=None))
    return callbacks[0].written


def test_without_a_terminal_there_are_plain_lines(toy_tokenizer, tmp_path, capsys):
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        silence_expected_warnings()
        written = fit(toy_tokenizer, tmp_path)
    assert [str(warning.message) for warning in leaked if "val_dataloader" not in str(warning.message)] == []
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out and "\r" not in printed.out
    assert "==== stage2: DemonstratorLearnerGuidance ====" in printed.out
    assert "steps    3" in printed.out and f"files    {tmp_path}" in printed.out
    lines = [line for line in printed.out.splitlines() if line.startswith("stage2 ")]
    assert [line.split(",")[0] for line in lines] == ["stage2 1/3", "stage2 2/3", "stage2 3/3"]
    assert lines[-1].endswith(describe(written)) and "0:00:00 left" in lines[-1]
    numbers = re.search(r"loss (\S+) = vtg (\S+) \+ kl (\S+) \+ cycle (\S+), lr .*samples/s, data wait", lines[-1])
    loss, *parts = map(float, numbers.groups())
    assert loss == pytest.approx(sum(parts), abs=2e-3)


def test_in_a_terminal_there_is_one_bar_below_all_lines(toy_tokenizer, tmp_path, monkeypatch):
    reader, writer = pty.openpty()
    received = []

    def read():
        try:
            while data := os.read(reader, 65536):
                received.append(data)
        except OSError:  # Linux's end of file
            pass

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        written = fit(toy_tokenizer, tmp_path)
    thread.join()
    os.close(reader)
    screen = draw(b"".join(received).decode())
    assert [line for line in screen if line.startswith("line ")] == ["line 1", "line 2", "line 3"]
    bars = [number for number, line in enumerate(screen) if line.startswith("stage2 ")]
    assert len(bars) == 1, screen
    assert "3/3" in screen[bars[0]]
    assert bars[0] > screen.index("line 3")
    assert " ".join(screen[bars[0] + 1 : bars[0] + 3]).replace("  ", " ").startswith(describe(written)[:60])


def draw(text):
    """Return the lines of a terminal after some output: line feeds, and Rich's moves up and erasures of lines."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            if token.endswith("A"):
                row -= int(token[2:-1] or 1)
            elif token.endswith("K"):
                lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


def test_scores_on_one_line():
    scores = {"ego_choice": 0.5, "ego_caption_verb": 0.75, "ego_loss": 1.5, "exo_choice": 1.0, "egomcq_inter": 0.2}
    assert score_line(scores) == (
        "egocentric choice 50.0 %, loss 1.500; exocentric choice 100.0 %; benchmarks egomcq_inter 20.0 %"
    )


def test_one_curve_for_each_schedule():
    def optimizer(*peaks):
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in peaks]
        names = ("projector_vectors", "projector", "lora", "lora_vectors")
        groups = [
            {"params": [parameter], "lr": peak / 2, "initial_lr": peak, "name": name}
            for parameter, peak, name in zip(parameters, peaks, names, strict=True)
        ]
        return torch.optim.SGD(groups)

    assert learning_rates(optimizer(1.0, 1.0, 1.0, 1.0)) == {"optim/lr": 0.5}
    assert learning_rates(optimizer(1.0, 1.0, 0.1, 0.1)) == {"optim/lr_projector": 0.5, "optim/lr_lora": 0.05}


def test_the_next_command(monkeypatch):
    monkeypatch.chdir(tiny.EXPERIMENTS.parent)

    def following(experiment, stage, run_dir=None):
        run_dir = run_dir or f"runs/{experiment}/{stage}"
        return training._next_commands({"experiment": experiment, "stage": stage, "runs": "runs", "run_dir": run_dir})

    assert following("toy", "stage1") == "next: make stage2 | make tensorboard"
    assert following("toy_qwen3", "stage3") == (
        "next: make chat VIDEO=file EXPERIMENT=toy_qwen3 | make evaluate EXPERIMENT=toy_qwen3 | make tensorboard"
    )
    elsewhere = following("toy", "stage2", "runs/toy/tau 2")
    assert elsewhere == "next: make stage3 ARGS='handoffs.stage2=runs/toy/tau 2/handoff' | make tensorboard"
    assert following("of_mine", "stage1") == "next: make tensorboard"
