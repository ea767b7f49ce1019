"""Who may import whom, and the constants that two packages agree on without importing each other."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

import datamodules.batch
import lightning_modules.model.language_model as language_model

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_modules", "datamodules")
STAGES = [
    f
    for f in sorted((ROOT / "lightning_modules/stages").glob("[a-z]*.py"))
    if f.stem not in ("base", "checks", "optim")
]


def imports(file):
    """Dotted names a file imports, one for each name of a ``from`` import; a relative import starts with a dot."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def roots(file):
    return {name.split(".")[0] for name in imports(file)}


def files(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def importers(package):
    return {str(file.relative_to(ROOT)) for folder in PACKAGES for file in files(folder) if package in roots(file)}


def test_video_files_are_opened_in_few_places():
    reading = {
        "datamodules/tools/data_check.py",
        *(
            f"datamodules/video/{name}.py"
            for name in ("convert", "decode", "images", "live", "media", "motion", "probe", "reader")
        ),
    }
    writing = {"datamodules/toy_world/video.py", "datamodules/tools/reencode.py", "datamodules/tools/trim.py"}
    assert importers("av") == reading | writing


def test_open_clip_stays_with_the_vision_encoder_and_its_weights():
    assert importers("open_clip") == {
        "lightning_modules/model/encoders/base.py",
        "lightning_modules/model/encoders/clip.py",
        "lightning_modules/weights/clip.py",
    }


def test_data_knows_nothing_of_models():
    assert [str(file) for file in files("datamodules") if "lightning_modules" in roots(file)] == []


def test_tools_are_imported_by_nobody():
    for folder in PACKAGES:
        for file in files(folder):
            if "datamodules/tools" not in file.as_posix():
                assert not [name for name in imports(file) if name.startswith("datamodules.tools")], file


def module_graph():
    """Return the modules that each module of both packages imports when it runs, by dotted name.

    Imports for type checkers are left out; those inside functions count.
    """
    paths = [file.relative_to(ROOT).with_suffix("") for folder in PACKAGES for file in files(folder)]
    modules = {".".join(path.parts).removesuffix(".__init__"): ROOT / path.with_suffix(".py") for path in paths}
    graph = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {name if name in modules else node.module for name in names}
        graph[module] = (imported & modules.keys()) - {module}
    return graph


def test_modules_import_each_other_in_no_circle():
    graph = module_graph()
    while leaves := {module for module, imported in graph.items() if not imported & graph.keys()}:
        graph = {module: imported for module, imported in graph.items() if module not in leaves}
    assert not graph, "modules in a circle, or above one"


def test_the_model_is_usable_without_lightning_configuration_and_data():
    forbidden = {"lightning", "pytorch_lightning", "omegaconf", "jsonargparse", "datamodules"}
    for file in files("lightning_modules/model"):
        assert roots(file).isdisjoint(forbidden), file
        ours = {name for name in imports(file) if name.startswith("lightning_modules")}
        assert all(name.startswith("lightning_modules.model.") for name in ours), file


def test_weights_build_on_the_model_alone():
    allowed = ("lightning_modules.model.", "lightning_modules.weights.", "datamodules.text.", "datamodules.io.hub.")
    for file in files("lightning_modules/weights"):
        assert roots(file).isdisjoint({"lightning", "pytorch_lightning", "omegaconf", "jsonargparse"}), file
        assert all(name.startswith(allowed) for name in imports(file) if name.startswith(PACKAGES)), file


BUILDS_ON = {
    "lmms_eval": set(),
    "compat": set(),
    "distributed": set(),
    "lock": set(),
    "losses": set(),
    "signals": set(),
    "model": set(),
    "layers": set(),
    "config": {"layers"},
    "config_check": {"layers"},
    "config_keys": {"config_check"},
    "early_check": {"config", "config_check"},
    "strategy": {"compat", "model"},
    "weights": {"model"},
    "validation": {"distributed", "model"},
    "egobench": {"model", "validation"},
    "stages": {"compat", "egobench", "losses", "model", "strategy", "validation", "weights"},
    "plan": {"compat", "model", "stages", "validation"},
    "inference": {"config", "model", "stages", "weights"},
    "callbacks": {"compat", "distributed", "egobench", "inference", "lock", "signals", "stages", "validation"}
    | {"weights"},
    "run": {
        "callbacks",
        "compat",
        "config",
        "config_check",
        "config_keys",
        "egobench",
        "model",
        "plan",
        "stages",
        "strategy",
    },
    "resume": {"config", "run", "stages", "weights"},
    "demonstrations": {"config", "run", "stages", "weights"},
    "evaluation": {"callbacks", "config", "config_check", "egobench", "inference", "model", "run", "validation"}
    | {"weights"},
    "probe": {"config", "evaluation", "losses", "run", "stages", "validation"},
    "training": {"callbacks", "config", "demonstrations", "distributed", "egobench", "evaluation", "inference"}
    | {"layers", "plan", "resume", "run", "weights"},
    "exits": {"callbacks", "compat", "signals", "training"},
    "serving": {"inference"},
    "cli": {"", "compat", "config", "demonstrations", "early_check", "egobench", "evaluation", "exits", "inference"}
    | {"layers", "lock", "plan", "probe", "run", "serving", "signals", "training"},
    "__main__": {"cli"},
    "__init__": {"inference", "stages"},
}
"""What each file or folder of ``lightning_modules`` may import of the others, from the ground up."""


def test_imports_only_go_down():
    below = set()
    for name, allowed in BUILDS_ON.items():
        assert allowed - {""} <= below, name  # the table itself has no arrow that runs back up
        below.add(name)
    for file in files("lightning_modules"):
        name = file.relative_to(ROOT / "lightning_modules").parts[0].removesuffix(".py")
        ours = [module.split(".")[1:] for module in imports(file) if module.startswith("lightning_modules.")]
        used = {parts[0] if parts[0] in BUILDS_ON else "" for parts in ours} - {name}
        assert used <= BUILDS_ON[name], f"{file}: {sorted(used - BUILDS_ON[name])} is not below {name}"


def test_stages_do_not_know_each_other_nor_how_data_is_read():
    assert len(STAGES) == 5
    modules = {f"lightning_modules.stages.{file.stem}" for file in STAGES}
    for file in STAGES:
        names = imports(file)
        # A variant of a stage is a subclass in a file of its own.
        parents = {"answer_guidance": {"lightning_modules.stages.guidance"}}.get(file.stem, set())
        assert {module for module in modules if any(name.startswith(f"{module}.") for name in names)} == parents, file
        assert all(name.startswith("datamodules.batch.") for name in names if name.startswith("datamodules")), file
        assert "omegaconf" not in roots(file), file


def test_imports_are_absolute():
    for folder in (*PACKAGES, "tests"):
        for file in files(folder):
            assert not [name for name in imports(file) if name.startswith(".")], file


def test_both_packages_mean_the_same_by_the_same_token():
    assert datamodules.batch.VIDEO_TOKEN_ID == language_model.VIDEO_TOKEN_ID < 0
    assert datamodules.batch.IGNORE_INDEX == language_model.IGNORE_INDEX == -100  # what torch's cross entropy skips


def test_top_level_folders():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    allowed = {"lightning_modules", "datamodules", "experiments", "tests", "docs"}
    assert {folder for folder in folders if not folder.startswith(".")} <= allowed
