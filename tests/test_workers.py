"""Worker processes of loaders share the dataset, ignore the signals that stop a run, and end with the run."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from datamodules.clips.workers import WorkerLoader
from datamodules.ego_exo_clip.index import Strings
from datamodules.io.processes import STOP_SIGNALS

ROWS = 100_000


class Rows(Dataset):
    """Rows of an array with strings, and facts about the process that reads them."""

    def __init__(self, hangs_at=None):
        self.hangs_at = hangs_at
        self.numbers, self.texts, self.empty = np.arange(ROWS), Strings(["one", "zwölf"]), Strings()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.hangs_at:
            time.sleep(600)
        text = self.texts[index % 2] if index % 2 < len(self.texts) else None
        facts = {"pid": os.getpid(), "blocked": blocked(os.getpid()), "shared": not self.numbers.flags.writeable}
        return int(self.numbers[index]), text, len(self.empty), facts


def blocked(pid):
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk:")]
    mask = int(line.split()[1], 16)
    return {number for number in STOP_SIGNALS if mask >> (number - 1) & 1}


def loader(dataset, workers=1, **options):
    return WorkerLoader(dataset, batch_size=None, num_workers=workers, **options)


def test_processes_share_the_arrays_and_block_the_signals_that_stop_a_run():
    rows = Rows()
    read = list(loader(rows))
    assert [tuple(row[:3]) for row in read] == [rows[index][:3] for index in range(len(rows))]
    facts = read[0][3]
    assert facts["pid"] != os.getpid() and facts["shared"] and rows.numbers.flags.writeable
    assert facts["blocked"] == blocked(forkserver._forkserver._forkserver_pid) == set(STOP_SIGNALS)
    assert not blocked(os.getpid())


def test_processes_outlive_signals_to_the_whole_group():
    batches = iter(loader(Rows(), prefetch_factor=1))
    pid = next(batches)[3]["pid"]
    for number in STOP_SIGNALS:
        for process in (pid, forkserver._forkserver._forkserver_pid):
            os.kill(process, number)
    assert {row[3]["pid"] for row in batches} == {pid}


def test_a_process_that_dies_is_noticed_long_before_the_timeout():
    batches = iter(loader(Rows(hangs_at=3), prefetch_factor=1, timeout=300))
    os.kill(next(batches)[3]["pid"], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        list(batches)
    assert time.monotonic() - begun < 60


def test_a_process_that_hangs_is_named_after_the_timeout_and_killed():
    batches = iter(loader(Rows(hangs_at=3), prefetch_factor=1, timeout=1))
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        list(batches)
    del batches
    gc.collect()
    assert multiprocessing.active_children() == []


def test_a_dataset_that_cannot_be_sent_is_refused_with_the_way_out():
    rows = Rows()
    rows.open = lambda: None
    with pytest.raises(TypeError, match=r"Rows: cannot be sent to worker processes .* set num_workers to 0"):
        list(loader(rows))


def test_processes_end_with_the_run():
    """Also one that is in the middle of reading, and the server."""
    program = (
        "import time, test_workers; from multiprocessing import forkserver\n"
        "batches = iter(test_workers.loader(test_workers.Rows(hangs_at=1), prefetch_factor=1))\n"
        "print(next(batches)[3]['pid'], forkserver._forkserver._forkserver_pid, flush=True)\n"
        "next(batches)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"
