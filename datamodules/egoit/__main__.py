"""``python -m datamodules.egoit convert``: rebuild the instruction mix from official annotation files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datamodules.egoit.sources.base import InstructionSource, convert
from datamodules.io.plugins import add_field_options, first_argument, import_dataclass

SOURCES = {
    "egtea": "datamodules.egoit.sources.egtea:Egtea",
    "ssv2": "datamodules.egoit.sources.ssv2:SomethingSomething",
    "egotimeqa": "datamodules.egoit.sources.egotimeqa:EgoTimeQA",
    "openeqa": "datamodules.egoit.sources.openeqa:OpenEQA",
    "egoexolearn": "datamodules.egoit.sources.egoexolearn:EgoExoLearn",
}


def _convert(words: Sequence[str]) -> int:
    name = first_argument(words)
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.egoit convert",
        description=f"Official annotation files to JSON Lines. Sources: {', '.join(SOURCES)}, or module:Class of your "
        "own. Each source has options of its own, see `convert SOURCE --help`.",
    )
    parser.add_argument("source", help="name of a source, or module:Class of your own")
    if name is not None:
        kind = import_dataclass(name, SOURCES, ("name", "official", "read"), "source")
        add_field_options(parser, kind, "folder of the official annotation files")
    parser.add_argument("--out", type=Path, help="file to write (default: data/egoit/<source>[_<part>].jsonl)")
    parser.add_argument("--skip-invalid", action="store_true", help="warn of invalid rows and leave them out")
    given = vars(parser.parse_args(words))
    out, skip_invalid = given.pop("out"), given.pop("skip_invalid")
    del given["source"]
    if not given["root"].is_dir():
        raise ValueError(f"--root: no folder {given['root']}: give the one that holds the official annotation files")
    source: InstructionSource = kind(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    )
    part = given.get("part", "fine")
    out = out or Path("data/egoit") / f"{source.name}{'' if part == 'fine' else f'_{part}'}.jsonl"
    done = convert(source, out, skip_invalid)
    print(done.table)
    print(f"{done.records:,} records written to {out}")
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; return exit status 2 after one line on stderr if it cannot be done."""
    commands = {"convert": _convert}
    parser = argparse.ArgumentParser(prog="python -m datamodules.egoit", description="Rebuild the instruction mix.")
    parser.add_argument("command", choices=commands)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="see `<command> --help`")
    given = parser.parse_args(words)
    try:
        return commands[given.command](given.words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
