"""A stage ends at the nearest limit with its weights written, or its limits are refused; 75 means that it resumes."""

import shutil

import pytest
import tiny

from lightning_modules.callbacks.checkpoint import CheckpointFolders, Checkpoints, newest, read_state
from lightning_modules.cli import main
from lightning_modules.signals import STOPPED
from lightning_modules.weights.handoff import read_manifest

TOY = str(tiny.EXPERIMENTS / "toy")


@pytest.fixture
def stage0(toy_world, tmp_path):
    """Run stage 0 on eight samples, two optimiser steps an epoch; gives its exit status."""
    few = tmp_path / "few.jsonl"
    with (toy_world / "instructions" / "initialisation.jsonl").open() as lines:
        few.write_text("".join(next(lines) for _ in range(8)))
    fixed = [
        *tiny.OVERRIDES,
        f"data_root={toy_world}",
        f"run_dir={tmp_path / 'run'}",
        f"data.init_args.sources=[{few}]",
    ]
    fixed += [f"data.init_args.sources=[{few}]", "data.init_args.held_out=null"]
    fixed += ["model.init_args.whiten_patches=false", "trainer.limit_val_batches=0"]

    def run(*more):
        return main(["fit", TOY, "stage0", *fixed, *more])

    return run


@pytest.mark.parametrize(("max_steps", "max_epochs", "last"), [(40, 2, 4), (3, 2, 3), (-1, 2, 4), (4, -1, 4)], ids=str)
def test_the_nearest_limit_ends_a_stage(stage0, tmp_path, max_steps, max_epochs, last):
    assert stage0(f"trainer.max_steps={max_steps}", f"trainer.max_epochs={max_epochs}") == 0
    assert read_manifest(tmp_path / "run" / "handoff")["step"] == last
    # The learning rate has fallen to zero: the schedule has the same length.
    checkpoint = newest(tmp_path / "run" / "checkpoints")
    assert int(checkpoint.name) == last
    assert max(read_state(checkpoint)["learning_rates"].values()) == pytest.approx(0, abs=1e-9)


def test_a_stage_with_epochs_resumes_from_the_end_of_an_epoch(stage0, tmp_path, monkeypatch):
    """The epoch whose last step was saved is not repeated."""
    usual = Checkpoints.stop_requested
    monkeypatch.setattr(Checkpoints, "stop_requested", lambda self: True)
    limits = ("trainer.max_steps=-1", "trainer.max_epochs=2")
    assert stage0(*limits) == STOPPED  # after step 1
    assert stage0(*limits) == STOPPED  # after step 2, the last one of the first epoch
    monkeypatch.setattr(Checkpoints, "stop_requested", usual)
    assert newest(tmp_path / "run" / "checkpoints").name == "0000002"
    assert stage0(*limits) == 0
    assert read_manifest(tmp_path / "run" / "handoff")["step"] == 4


def test_a_stage_that_runs_out_of_time_resumes(stage0, tmp_path, capsys):
    """Each call makes progress, however short its time; whole optimiser steps of several micro-batches."""
    limits = ("trainer.max_steps=3", "trainer.max_time='00:00:00:01'", "checkpoint_every_n_steps=0")
    limits += ("data.init_args.micro_batch_size=2",)
    statuses = []
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_modules.callbacks.checkpoint.time.monotonic", Clock())
            statuses.append(stage0(*limits))
    assert statuses == [STOPPED, STOPPED, 0]
    shown = capsys.readouterr()
    assert "stopped at step 1; run it again" in shown.err and "stopped at step 2; run it again" in shown.err
    assert read_manifest(tmp_path / "run" / "handoff")["step"] == 3


class Clock:
    """A clock that advances by two seconds whenever it is read."""

    now = 0.0

    def __call__(self):
        self.now += 2.0
        return self.now


def test_another_time_limit_may_resume(stage0, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "stop_requested", lambda self: True)
    assert stage0("trainer.max_steps=3") == STOPPED
    monkeypatch.undo()
    assert stage0("trainer.max_steps=3", "trainer.max_time='00:01:00:00'") == 0


def test_a_stop_without_a_checkpoint_is_no_success_to_repeat(stage0, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoints, "stop_requested", lambda self: True)
    monkeypatch.setattr(CheckpointFolders, "_together", lambda self, *arguments: "No space left on device")
    assert stage0("trainer.max_steps=3") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "stage0 was stopped at step 1, but no checkpoint could be written" in error


def test_a_callback_that_ends_training_completes_the_stage(stage0, tmp_path, capsys):
    """Lightning's early stopping: the loss is never below the threshold."""
    stop = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: train/loss, patience: 1, "
    stop += "divergence_threshold: 0.0, check_on_train_epoch_end: true}}"
    assert stage0("trainer.max_steps=40", f"trainer.callbacks=[{stop}]") == 0
    assert read_manifest(tmp_path / "run" / "handoff")["step"] == 2
    assert "stage0 is complete at step 2: a callback of trainer.callbacks ended it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (("max_steps=0",), "trainer.max_steps: got 0, allowed: 1 or more, or -1 for no limit"),
        (("max_steps=-1", "max_epochs=0"), "trainer.max_epochs: got 0, allowed: 1 or more, or -1 for no limit"),
        (("max_epochs=0",), "trainer.max_epochs: got 0, allowed: 1 or more"),
        (("max_steps=-1",), "trainer.max_steps: got no limit: set max_steps or max_epochs"),
        (("max_steps=-1", "max_epochs=null"), "trainer.max_steps: got no limit: set max_steps or max_epochs"),
        (("max_time='00:00:00:00'",), "trainer.max_time: got 00:00:00:00, allowed: above 0"),
        (("limit_train_batches=0",), "trainer.limit_train_batches: got 0, but"),
        (("limit_train_batches=1",), "trainer.limit_train_batches: got 1, but"),
        (("limit_train_batches=0.5", "max_epochs=1"), "trainer.limit_train_batches: got 0.5, but"),
        (("overfit_batches=2",), "trainer.overfit_batches: got 2, but"),
        (("fast_dev_run=true",), "trainer.fast_dev_run: got True, but"),
    ],
    ids=str,
)
def test_limits_that_are_refused(stage0, tmp_path, capsys, limits, message):
    assert stage0(*(f"trainer.{limit}" for limit in limits)) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_limit_train_batches_may_name_all(stage0, tmp_path):
    assert stage0("trainer.limit_train_batches=1.0", "trainer.max_steps=1") == 0
    assert read_manifest(tmp_path / "run" / "handoff")["step"] == 1


@pytest.mark.parametrize("inside", ["", "0000001"])
def test_force_empties_the_folder_behind_a_link(stage0, tmp_path, inside):
    """Checkpoints and weights are on another disk, as where a home folder has a quota."""
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    assert stage0("trainer.max_steps=2") == 0
    scratch.mkdir()
    for name in ("checkpoints", "handoff"):
        shutil.move(run / name, scratch / name)
        (run / name).symlink_to(scratch / name)
    if inside:
        (scratch / "checkpoints" / inside).rename(scratch / inside)
        (scratch / "checkpoints" / inside).symlink_to(scratch / inside)
    for steps in (1, 3):
        assert stage0(f"trainer.max_steps={steps}", "--force") == 0
        assert read_manifest(run / "handoff")["step"] == steps
        kept = sorted(path.name for path in (scratch / "checkpoints").iterdir())
        assert kept == [f"{step:07d}" for step in range(max(1, steps - 1), steps + 1)]
        assert (run / "checkpoints").is_symlink()
