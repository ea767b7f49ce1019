"""Copy modules of this repository into an exported folder, where they import each other and nothing else of it."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("lightning_modules", "datamodules")
ENTRIES = ("configuration_exo2ego", "modeling_exo2ego", "processing_exo2ego")
_CODE = "lightning_modules.inference.transformers_code"
_IMPORT = re.compile(rf"^(\s*)from ((?:{'|'.join(PACKAGES)})[\w.]*) import ", re.MULTILINE)


def write_source_files(folder: Path) -> list[str]:
    """Write the entry modules and everything that they import into one flat folder, as transformers loads it.

    Imports of this repository become relative; nothing else is changed.

    Returns:
        Names of the files.
    """
    waiting = [f"{_CODE}.{entry}" for entry in ENTRIES]
    written: list[str] = []
    while waiting:
        module = waiting.pop()
        name = f"{_flat_name(module)}.py"
        if name in written:
            continue
        source = _source(module)
        waiting += _imported(source, module)
        relative = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat_name(match[2])} import ", source)
        header = f"# A copy of {module.replace('.', '/')} of exo2ego (Apache-2.0), written by `make export`.\n"
        (folder / name).write_text(header + relative, encoding="utf-8")
        written.append(name)
    return sorted(written)


def _flat_name(module: str) -> str:
    """Return the name of a module's copy."""
    if module.startswith(f"{_CODE}."):
        return module.rpartition(".")[2]
    return "exo2ego_" + "_".join(module.split(".")[1:])


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _imported(source: str, where: str) -> list[str]:
    """Return the modules of this repository that a source imports.

    Raises:
        ValueError: in a form that cannot be made relative.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PACKAGES for alias in node.names):
            raise ValueError(f"{where}: `import {node.names[0].name}` cannot be copied: write from ... import ...")
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            found.append(str(node.module))
    return found
