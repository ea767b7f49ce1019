"""``python -m datamodules.egoit convert|export|leaks``: rebuild the instruction mix, export it, check it for leaks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from datamodules.egoit.sources.base import InstructionSource, convert
from datamodules.egoit.templates import FOLDER, STYLES, Templates
from datamodules.tools.export import FORMATS, Rendering, export
from datamodules.tools.leaks import report

SOURCES = {
    "egtea": "datamodules.egoit.sources.egtea:Egtea",
    "ssv2": "datamodules.egoit.sources.ssv2:SomethingSomething",
    "egotimeqa": "datamodules.egoit.sources.egotimeqa:EgoTimeQA",
    "openeqa": "datamodules.egoit.sources.openeqa:OpenEQA",
    "egoexolearn": "datamodules.egoit.sources.egoexolearn:EgoExoLearn",
}


def _source_class(name: str) -> Any:
    """Return the class of a source by its name, or by ``module:Class``.

    Raises:
        ValueError: there is no such source, or the class is not one.
    """
    module, _, attribute = SOURCES.get(name, name).partition(":")
    if not attribute:
        raise ValueError(f"source: got {name!r}, allowed: {', '.join(SOURCES)}, or module:Class of your own")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"source: got {name!r}, which cannot be imported ({error})") from None
    options = {item.name for item in fields(kind)} if isinstance(kind, type) and is_dataclass(kind) else set()
    if "root" not in options or not all(hasattr(kind, member) for member in ("name", "official", "read")):
        raise ValueError(f"source: got {name!r}, expected a dataclass with a field root, a name, official() and read()")
    return kind


def _add_option(parser: argparse.ArgumentParser, item: Field[Any], kind: Any) -> None:
    """Add a field of a source as an option, parsed by its type."""
    name, several = f"--{item.name.replace('_', '-')}", str(kind).startswith("tuple")
    help_text = item.metadata.get("help", "folder of the official annotation files")
    if kind is bool:
        parser.add_argument(name, action="store_true", help=help_text)
        return
    if item.default is not MISSING and item.default not in ((), None):
        shown = " ".join(item.default) if several else item.default
        help_text = f"{help_text} (default: {shown})"
    parser.add_argument(
        name,
        type=Path if "Path" in str(kind) else kind if kind in (int, float) else str,
        nargs="+" if several else None,
        choices=item.metadata.get("choices"),
        required=item.default is MISSING,
        default=None if item.default is MISSING else item.default,
        help=help_text,
    )


def _convert(words: Sequence[str]) -> int:
    names = argparse.ArgumentParser(add_help=False)
    names.add_argument("source", nargs="?")
    name = names.parse_known_args(words)[0].source
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.egoit convert",
        description=f"Official annotation files to JSON Lines. Sources: {', '.join(SOURCES)}, or module:Class of your "
        "own. Each source has options of its own, see `convert SOURCE --help`.",
    )
    parser.add_argument("source", help="name of a source, or module:Class of your own")
    if name is not None:
        kind = _source_class(name)
        hints = get_type_hints(kind)
        for item in fields(kind):
            _add_option(parser, item, hints[item.name])
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


def _export(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.egoit export", description="Write instruction files for other training stacks."
    )
    parser.add_argument("files", nargs="+", type=Path, help="instruction files")
    parser.add_argument("--to", choices=FORMATS, required=True, help="form to write")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--trim",
        type=Path,
        metavar="ROOT",
        help="cut clips out of the videos below this data root, for readers without "
        "windows; videos of the result are below --out",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that cut")
    parser.add_argument("--templates", type=Path, default=FOLDER, help="folder of template banks (default: EgoIT's)")
    parser.add_argument("--style", choices=STYLES, default="task_ego", help="style of prompts (default: task_ego)")
    parser.add_argument("--seed", type=int, default=0, help="draw templates as epoch 0 of a run with this seed")
    given = parser.parse_args(words)
    rendering = Rendering(Templates(given.templates), given.style, given.seed)
    for line in export(given.files, given.to, given.out, given.trim, given.workers, rendering):
        print(line)
    return 0


def _leaks(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.egoit leaks",
        description="Recordings that instruction files share with evaluation benchmarks.",
    )
    parser.add_argument("files", nargs="+", type=Path, help="instruction files")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of the benchmarks' official files")
    parser.add_argument("--clips", type=Path, nargs="+", default=[], help="files that name the Ego4D video of a clip")
    parser.add_argument("--clean", type=Path, metavar="FOLDER", help="write the files without shared recordings here")
    parser.add_argument(
        "--only", nargs="+", metavar="BENCHMARK", help="with --clean, leave out what these share (default: any)"
    )
    given = parser.parse_args(words)
    print(report(given.files, given.benchmarks, tuple(given.clips), given.clean, given.only))
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; return exit status 2 after one line on stderr if it cannot be done."""
    commands = {"convert": _convert, "export": _export, "leaks": _leaks}
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.egoit", description="Rebuild the instruction mix, export it, check it for leaks."
    )
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
