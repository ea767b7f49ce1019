"""README and docs: commands, links and code in them exist, and the README stays short."""

from __future__ import annotations

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_modules.config import RENAMED_KEYS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RULE = re.compile(r"^([a-z0-9%-]+):.* ## .*?(?: \[([A-Z0-9_ ]+)\])?\n((?:\t.*\n)*)", re.MULTILINE)
EXAMPLES = [file for file in sorted((ROOT / "tests" / "examples").rglob("*")) if file.suffix in {".py", ".yaml"}]


def read(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) < 200
    assert len(text.split()) <= 1600


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    makefile = read(ROOT / "Makefile")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    if page.name == "CHANGELOG.md":
        return  # names commands of the past
    for command in re.findall(r"(?:^|`)make ([^`\n#]+)", read(page), re.MULTILINE):
        words = [word for word in re.sub(r'"[^"]*"', "", command).split() if "=" not in word]
        assert set(words) <= targets, f"{page.name}: make {command}"


def test_each_target_lists_the_variables_of_its_recipe():
    makefile = read(ROOT / "Makefile")
    macros = dict(re.findall(r"^([A-Z0-9_]+) :?= ((?:.*\\\n)*.*)$", makefile, re.MULTILINE))
    everywhere = {"PYTHON", "BASE_PYTHON", "CONSTRAINTS", "VENV", "TORCH_INDEX", "READY"}

    def variables(text):
        names = set(re.findall(r"\$\(([A-Z0-9_]+)\)|flag,([A-Z]+)", text))
        names = {first or second for first, second in names}
        for name in names & macros.keys() - everywhere:
            names = names - {name} | variables(macros[name])
        return names

    rules = RULE.findall(makefile)
    assert len(rules) > 30
    defaults = {"INDEX": {"ROOT"}, "RESULTS": {"RUNS"}}
    for target, listed, recipe in rules:
        line = re.search(rf"^{re.escape(target)}:(.*) ## ", makefile, re.MULTILINE)[1]
        used = variables(line + recipe) - everywhere
        for name in used & defaults.keys():
            used = used | defaults[name]
        assert used == set(listed.split()), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_experiments_exist(page):
    if page.name == "CHANGELOG.md":
        return
    for name in re.findall(r"EXPERIMENT=([\w/]+)", read(page)):
        assert (ROOT / "experiments" / name).is_dir(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_functions_exist(page):
    """`model/mapping.py: FeatureMapping` is a file of the repository that contains the name."""
    if page.name == "CHANGELOG.md":
        return
    for path, name in re.findall(r"`([\w./]+\.(?:py|yaml|sh))(?:: (\w+))?`", read(page)):
        places = [ROOT / folder / path for folder in (".", "lightning_modules", "experiments/toy", "tests/examples")]
        file = next((place for place in places if place.is_file()), None)
        assert file or path in ("stage4.yaml",), f"{page.name}: {path}"
        assert not name or name in read(file), f"{page.name}: {path}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_in_code_exist(page):
    for block in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                if node.module == "openai" and not find_spec("openai"):
                    continue  # a client of the server, which an existing environment need not have
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {node.module}.{alias.name}"


def test_the_changelog_names_every_renamed_key():
    changelog = read(ROOT / "CHANGELOG.md")
    for old, renamed in RENAMED_KEYS.items():
        assert f"| `{old}` | `{renamed.new_key}` |" in changelog


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_guide_shows_the_examples(example):
    """Each example file is a code block; a first line may name the file."""
    language = {".py": "python", ".yaml": "yaml"}[example.suffix]
    blocks = code_blocks(ROOT / "docs" / "extending.md", language)
    blocks = [block.removeprefix(f"# {example.name}\n") for block in blocks]
    assert read(example) in blocks, f"docs/extending.md has no block equal to {example.name}"
