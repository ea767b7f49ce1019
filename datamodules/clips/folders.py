"""Check that a dataset is where the configuration says, without importing torch."""

from __future__ import annotations

from pathlib import Path

from datamodules.video.remote import is_remote, require_reachable


def require_data(root: str, held_out: str | None) -> None:
    """Require the folder of the data and the file of validation questions.

    Args:
        root: folder, or an address such as ``s3://bucket/takes``, of which no request is sent.
        held_out: file of validation questions.

    Raises:
        ValueError: one of them is missing, or a package or cache that an address needs; the message names the command
            that makes it, or the key to set.
    """
    if is_remote(root):
        require_reachable(root, "data.root")
    elif not Path(root).is_dir():
        raise ValueError(
            f"data.root: no folder {root}: run `make data` for the generated world, put your videos "
            "there, or set data.init_args.root"
        )
    if held_out is not None and not Path(held_out).is_file():
        raise ValueError(f"data.held_out: no file {held_out}: run `make data`, or set data.init_args.held_out")
