"""Checkpoints are complete or absent, damage is named, and a save that fails costs nothing but the save."""

import json
import math
import os
import shutil
import signal
import stat
import subprocess

import lightning as L
import pytest
import tiny
import torch
from torch.utils.data import DataLoader

from datamodules.io.processes import STOP_SIGNALS
from lightning_modules import DemonstratorSelfPreparation
from lightning_modules.callbacks import checkpoint
from lightning_modules.callbacks.checkpoint import (
    CheckpointError,
    CheckpointFolders,
    Checkpoints,
    check_files,
    newest,
    read_state,
)
from lightning_modules.callbacks.finite_check import Diverged, FiniteCheck

STEPS = 4


def trainer(steps, callbacks, **options):
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        plugins=[CheckpointFolders()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(tokenizer, folder, steps=STEPS, every=1, callbacks=()):
    stage = tiny.make_stage("stage3", tokenizer)
    run = trainer(steps, [*callbacks, FiniteCheck(), Checkpoints(folder, every)])
    run.fit(stage, DataLoader([tiny.clip_batch(seed) for seed in range(steps)], batch_size=None))
    return stage, run


@pytest.fixture(scope="module")
def written(toy_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    fit(toy_tokenizer, folder)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_the_last_two_stay(written):
    assert sorted(path.name for path in written.iterdir()) == ["0000003", "0000004"]
    assert newest(written).name == "0000004"
    check_files(newest(written))
    assert read_state(newest(written))["global_step"] == 4


def test_what_is_written_is_of_the_moment_of_the_call(toy_tokenizer, tmp_path):
    """Training continues in place while the writer writes."""
    stage, run = fit(toy_tokenizer, tmp_path, every=0)
    folders = run.strategy.checkpoint_io
    release = []

    def slow(*arguments):
        while not release:
            pass
        return usual(*arguments)

    usual, folders._write = folders._write, slow
    run.save_checkpoint(tmp_path / "0000009", weights_only=False)
    lora = stage.model.part("lora")
    before = {name: parameter.detach().clone() for name, parameter in lora.items()}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.zero_()
    release.append(True)
    folders.wait()
    tensors = {f"model.language_model.causal_lm.{name}": torch.ones_like(value) for name, value in before.items()}
    checkpoint.read_tensors(tmp_path / "0000009", {"state_dict": tensors})
    assert all(torch.equal(tensors[f"model.language_model.causal_lm.{name}"], value) for name, value in before.items())
    assert any(value.any() for value in before.values())


def test_files_and_folders_follow_the_umask(toy_tokenizer, tmp_path):
    before = os.umask(0o027)
    try:
        fit(toy_tokenizer, tmp_path / "checkpoints", steps=1)
    finally:
        os.umask(before)
    written = [tmp_path / "checkpoints", *(tmp_path / "checkpoints").rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in written}


FILES = [".metadata", "state.pt", "__0_0.distcp"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_damage_is_named_with_its_fix(copied, file, damage):
    path = newest(copied) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"empty": b"", "cut": content[:-10], "flipped": content}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    with pytest.raises(CheckpointError) as error:
        check_files(newest(copied))
    assert str(error.value).startswith(f"checkpoint {copied}/0000004: damaged, {file}")
    assert str(error.value).endswith("delete the folder to resume from 0000003")
    check_files(copied / "0000003")


def test_a_damaged_manifest_is_named(copied):
    (copied / "0000004" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"0000004: damaged, its manifest.json .*resume from 0000003"):
        check_files(copied / "0000004")


def test_another_format_is_refused(copied):
    manifest = newest(copied) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format is 99, this version reads 1"):
        read_state(newest(copied))


@pytest.mark.parametrize("left", ["0000004", ".0000005.new"])
def test_a_folder_that_was_not_finished_is_not_taken_for_a_checkpoint(copied, left):
    torn = copied / left
    torn.mkdir(exist_ok=True)
    (torn / "manifest.json").unlink(missing_ok=True)
    assert newest(copied).name == ("0000003" if left == "0000004" else "0000004")


def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")


def test_a_full_disk_keeps_the_previous_checkpoint_and_training_continues(written, toy_tokenizer, tmp_path, capfd):
    """The disk has room for the first checkpoint only."""
    small_disk(tmp_path / "disk", 3 * sum(file.stat().st_size for file in newest(written).iterdir()) // 2)
    try:
        folder = tmp_path / "disk" / "checkpoints"
        _, run = fit(toy_tokenizer, folder)
        assert run.global_step == STEPS
        assert sorted(path.name for path in folder.iterdir()) == ["0000001"]
        check_files(newest(folder))
        shown = capfd.readouterr().err.splitlines()
        failed = [line for line in shown if "could not be written" in line]
        assert len(failed) == STEPS - 1
        assert failed[0].startswith(f"checkpoint {folder}/0000002 could not be written: ")
        assert "No space left on device" in failed[0] and f"{folder}/0000001 is kept, training continues" in failed[0]
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("file", ["checkpoints", "checkpoints/.."])
def test_a_folder_that_cannot_be_written_is_reported(toy_tokenizer, tmp_path, capfd, file):
    """There is a file where the folder should be, or its parent."""
    blocked = tmp_path / "run"
    folder = blocked / "checkpoints"
    blocked = folder if file == "checkpoints" else blocked
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("in the way")
    _, run = fit(toy_tokenizer, folder)
    assert run.global_step == STEPS
    reports = [line for line in capfd.readouterr().err.splitlines() if "could not be written" in line]
    assert len(reports) == STEPS and "there is none before it, training continues" in reports[0]


class Signal(L.Callback):
    """Sends this process a signal after a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_and_stops_after_the_step(toy_tokenizer, tmp_path, number):
    _, run = fit(toy_tokenizer, tmp_path / "stopped", every=0, callbacks=[Signal(number, 1)])
    assert run.global_step == 2 and newest(tmp_path / "stopped").name == "0000002"


def test_a_signal_that_is_repeated_at_once_is_one_request(toy_tokenizer, tmp_path):
    """Make and timeout pass on what the whole process group has received."""

    class Twice(Signal):
        def on_train_batch_start(self, *arguments):
            super().on_train_batch_start(*arguments)
            super().on_train_batch_start(*arguments)

    _, run = fit(toy_tokenizer, tmp_path / "stopped", every=0, callbacks=[Twice(signal.SIGTERM, 1)])
    assert run.global_step == 2 and newest(tmp_path / "stopped").name == "0000002"


def test_a_signal_leaves_no_time_for_a_validation(toy_tokenizer, tmp_path, monkeypatch):
    validated = []
    monkeypatch.setattr(DemonstratorSelfPreparation, "on_validation_epoch_start", lambda stage: validated.append(1))
    stage = tiny.make_stage("stage1", toy_tokenizer)
    callbacks = [Checkpoints(tmp_path, 0), Signal(signal.SIGTERM, 1)]
    run = trainer(STEPS, callbacks, val_check_interval=STEPS)
    batches = DataLoader([tiny.clip_batch(seed) for seed in range(STEPS)], batch_size=None)
    run.fit(stage, batches, batches)
    assert run.global_step == 2 and not validated


def test_losses_that_are_no_numbers_stop_before_the_step(toy_tokenizer, tmp_path):
    """The third batch's loss is made infinite; two checkpoints were written before it."""

    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                batch.ids = ["bad one", "bad two"]
                batch.label_tokens = 1e-45

    with pytest.raises(Diverged) as error:
        fit(toy_tokenizer, tmp_path, callbacks=[Spoil()])
    assert str(error.value).startswith("step 3: the norm of the gradients is ")
    assert "rank 0: loss inf on bad one, bad two" in str(error.value)
    assert newest(tmp_path).name == "0000002"
    assert all(math.isfinite(float(t.sum())) for t in saved(newest(tmp_path)).values())


def saved(folder):
    shapes = checkpoint.stored_tensors(folder)
    names = [name.removeprefix("state_dict.") for name in shapes if name.startswith("state_dict.")]
    tensors = {name: torch.empty(shapes[f"state_dict.{name}"]) for name in names}
    checkpoint.read_tensors(folder, {"state_dict": tensors})
    return tensors
