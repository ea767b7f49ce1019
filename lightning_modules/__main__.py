"""Entry point of ``python -m lightning_modules``."""

from lightning_modules.cli import main

raise SystemExit(main())
