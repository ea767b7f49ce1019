"""One process at a time writes to a run's folder; locks of processes that are gone stop nobody."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import tiny

from lightning_modules import lock
from lightning_modules.cli import main
from lightning_modules.lock import NAME, RunLock, RunLocked

TOY = str(tiny.EXPERIMENTS / "toy")


def write(folder, **changes):
    """Write the lock of another process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).write_text(json.dumps(lock._describe_process() | {"id": "other"} | changes))


def elsewhere(folder, age_s, **changes):
    write(folder, machine="another", host="node7", pid=12, **changes)
    at = time.time() - age_s
    os.utime(folder / NAME, (at, at))


def test_a_second_process_is_refused_and_the_lock_is_gone_at_the_end(tmp_path):
    folder = tmp_path / "toy" / "stage1"
    with RunLock(folder):
        held = json.loads((folder / NAME).read_text())
        assert held["pid"] == os.getpid()
        with (
            pytest.raises(RunLocked, match=rf"stage1: process {os.getpid()} on .* wait until .*delete .*{NAME}"),
            RunLock(folder),
        ):
            pass
        assert json.loads((folder / NAME).read_text()) == held
    assert list(tmp_path.iterdir()) == []
    with RunLock(folder):
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_the_lock_of_a_process_that_is_gone_from_this_machine_is_taken_over(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for changes in ({"pid": gone.pid}, {"started": "1"}):  # the second one's number belongs to another process now
        write(tmp_path, **changes)
        with RunLock(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["id"] != "other"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_counts_for_five_minutes(tmp_path):
    elsewhere(tmp_path, 200, job="33")
    with pytest.raises(RunLocked, match="process 12 of job 33 on node7"), RunLock(tmp_path):
        pass
    elsewhere(tmp_path, 400)
    with RunLock(tmp_path):
        pass
    (tmp_path / NAME).touch()  # created, and not written yet
    with pytest.raises(RunLocked, match="an unknown machine"), RunLock(tmp_path):
        pass


def test_a_requeued_job_waits_for_its_earlier_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "33")
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    elsewhere(tmp_path, 0, job="33")
    with RunLock(tmp_path):
        assert "waits until this job's earlier process on node7 is gone" in capsys.readouterr().out


def test_one_of_many_takes_a_stale_lock_over(tmp_path):
    for _ in range(20):
        write(tmp_path, started="1")
        locks, holding = [RunLock(tmp_path) for _ in range(8)], []
        barrier = threading.Barrier(len(locks))

        def enter(one, barrier=barrier, holding=holding):
            barrier.wait()
            try:
                holding.append(one.__enter__())
            except RunLocked:
                pass

        threads = [threading.Thread(target=enter, args=(one,)) for one in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(holding) == 1
        holding[0].release()
        assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_taken_for_gone_ends(tmp_path):
    program = (
        f"import time; from pathlib import Path; from lightning_modules import lock; lock.BEAT_S = 0.1\n"
        f"with lock.RunLock(Path({str(tmp_path)!r})): print(flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    first = (tmp_path / NAME).stat().st_mtime_ns
    while (tmp_path / NAME).stat().st_mtime_ns == first:
        assert run.poll() is None
        time.sleep(0.02)
    elsewhere(tmp_path, 0)
    assert "node7 writes to this run" in run.communicate(timeout=30)[1] and run.returncode == 2
    assert json.loads((tmp_path / NAME).read_text())["id"] == "other"


@pytest.mark.parametrize("verb", ["fit", "evaluate", "consolidate"])
def test_commands_that_write_to_a_run_are_refused_while_another_does(tmp_path, capsys, verb):
    """Before anything else is checked: there is no data."""
    folder = tmp_path / "toy" / "stage1"
    words = [verb, TOY, "stage1", f"data_root={tmp_path}", f"runs={tmp_path}"]
    with RunLock(folder):
        assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}: process {os.getpid()} on ")


def test_only_the_first_process_of_a_run_holds_the_lock(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "0")
        assert lock.is_rank_zero()
        monkeypatch.setenv(name, "3")
        assert not lock.is_rank_zero()
        monkeypatch.setenv(name, "0")
