"""Check that this Python has the packages of ``pyproject.toml``; run by ``make PYTHON=/my/env/bin/python``.

Nothing is installed, and none of the packages is imported.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  an environment of the user may be older
    raise SystemExit(f"error: PYTHON: {sys.executable} is Python {sys.version.split()[0]}, 3.11 or newer is needed")

import tomllib


def unmet(requirements: list[str]) -> list[str]:
    """Return the requirements that this environment does not meet, each with the version that is installed."""
    found = []
    for line in requirements:
        name = re.split(r"[^\w.-]", line)[0]
        try:
            installed = version(name)
        except PackageNotFoundError:
            found.append(line)
            continue
        from packaging.requirements import Requirement  # comes with many packages, but not with Python

        if not Requirement(line).specifier.contains(installed, prereleases=True):
            found.append(f"{line} (found {installed})")
    return found


if __name__ == "__main__":
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    if missing := unmet(dependencies):
        print(
            f"error: PYTHON: {sys.executable} lacks {', '.join(missing)}: install them there, or run make without "
            "PYTHON to create .venv",
            file=sys.stderr,
        )
        raise SystemExit(2)
