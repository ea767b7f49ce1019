"""Entry point of ``python -m lightning_modules``."""

import signal

from datamodules.io.processes import STOP_SIGNALS
from lightning_modules.cli import main

status = main()
for number in STOP_SIGNALS:  # the status is final, also if a signal arrives while Python shuts down
    signal.signal(number, signal.SIG_IGN)
raise SystemExit(status)
