"""Check that a dataset is where the configuration says, without importing torch."""

from __future__ import annotations

from pathlib import Path


def require_data(root: str, held_out: str | None) -> None:
    """Require the folder of the data and the file of validation questions.

    Raises:
        ValueError: one of them is missing; the message names the command that makes it and the key to set.
    """
    if not Path(root).is_dir():
        raise ValueError(
            f"data.root: no folder {root}: run `make data` for the generated world, put your videos "
            "there, or set data.init_args.root"
        )
    if held_out is not None and not Path(held_out).is_file():
        raise ValueError(f"data.held_out: no file {held_out}: run `make data`, or set data.init_args.held_out")
