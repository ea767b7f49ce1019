"""A run that is asked to stop while it has nothing to save ends at once, and is called resumable."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from datamodules.io.processes import STOP_SIGNALS
from lightning_modules.signals import STOPPED, ExitOnSignal, take_pending

WAITING = """
import ctypes, sys
from lightning_modules.signals import ExitOnSignal, take_pending
with ExitOnSignal(lambda name: sys.stderr.write(f"stopped by {name}")):
    print(flush=True)
    library = ctypes.CDLL(None)
    for _ in range(100):
        library.usleep(100_000)  # an uninterruptible wait for other processes would be as deaf
    print(take_pending(), flush=True)
"""


def start(program, **variables):
    environment = os.environ | {"PYTHONPATH": str(tiny.EXPERIMENTS.parent)} | variables
    words = [sys.executable, "-c", program]
    run = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.readline()
    return run


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_run_that_has_nothing_to_save(number):
    run = start(WAITING)
    run.send_signal(number)
    assert run.communicate(timeout=30)[1] == f"stopped by {signal.Signals(number).name}"
    assert run.returncode == STOPPED


def test_a_process_that_rank_zero_launched_keeps_the_signal_and_ends_with_it():
    launcher = (
        "import os, signal, subprocess, sys\n"
        f"other = subprocess.Popen([sys.executable, '-c', {WAITING!r}], env=os.environ | {{'LOCAL_RANK': '1'}})\n"
        "print(other.pid, flush=True); other.wait()"
    )
    run = start(launcher)
    (other,) = [int(pid) for pid in open(f"/proc/{run.pid}/task/{run.pid}/children").read().split()]
    run.stdout.readline()  # it has its handlers now
    os.kill(other, signal.SIGTERM)
    time.sleep(0.3)
    assert run.poll() is None and os.path.exists(f"/proc/{other}")
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{other}") and open(f"/proc/{other}/stat").read().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with ExitOnSignal(print):
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert not take_pending()
