"""``python -m datamodules.toy_world --root data/toy``: generate the default dataset."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from datamodules.toy_world.release import Settings, generate


def main() -> int:
    """Generate the world; return exit status 2 and print one line if the settings or the folder do not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.toy_world",
        description="Generate synchronised ego-exo recordings in the layout of an Ego-Exo4D release, with questions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the dataset")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of rendering processes"
    )
    for item in fields(Settings):
        option = f"--{item.name.replace('_', '-')}"
        if isinstance(item.default, bool):
            parser.add_argument(option, action="store_true", help="paint the frame number into every frame")
        else:
            parser.add_argument(option, type=type(item.default), default=item.default, help=item.name.replace("_", " "))
    options = vars(parser.parse_args())
    root, workers = options.pop("root"), options.pop("workers")
    try:
        made = generate(root, Settings(**options), workers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{root}: {'generated' if made else 'already there'}")
    return 0


raise SystemExit(main())
