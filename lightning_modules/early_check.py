"""Find common mistakes in a configuration before torch, Lightning and transformers are imported, which takes seconds.

Names of keys and values of plain types are compared with the signatures in the source code of the classes, which is
parsed and not imported. Whatever cannot be decided this way is left to the complete check in ``config_check``, which
always follows: this one never accepts a configuration, it only refuses some of them sooner, with the same messages.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, reduce
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from typing import Any, Literal

from datamodules.clips.folders import require_data
from lightning_modules.config import ConfigError
from lightning_modules.config_check import check_value, refuse, unknown_key

_PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (int, float, bool, str)} | {"None": None}
_OURS = ("lightning_modules.", "datamodules.")
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"


@dataclass(frozen=True)
class _Source:
    """The source code of a class.

    Attributes:
        node: its definition.
        module: dotted name of its module, for the names that it uses.
    """

    node: ast.ClassDef
    module: str

    @property
    def is_typed_dict(self) -> bool:
        return any(ast.unparse(base).endswith("TypedDict") for base in self.node.bases)

    @property
    def decorators(self) -> list[str]:
        return [ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in self.node.decorator_list]


@dataclass
class _Signature:
    """The arguments that a class is made from.

    Attributes:
        known: annotation of each, with the module whose names it uses.
        is_open: True if there may be arguments of other names.
    """

    known: dict[str, tuple[ast.expr | None, str]] = field(default_factory=dict)
    is_open: bool = False


def check_early(config: dict[str, Any], verb: str) -> None:
    """Refuse unknown keys, plain values of a wrong type, and folders that are missing.

    Args:
        config: the resolved configuration.
        verb: ``fit`` needs the data and the weights of the stages before, ``evaluate`` and ``probe`` those
            of the stage itself.

    Raises:
        ValueError: one line with all problems.
    """
    problems: list[str] = []
    shared = _shared_keys()
    known = [*shared, "data", "model", "seed_everything", "trainer"]
    for key, value in config.items():
        if key not in known:
            problems.append(unknown_key(key, "", sorted(known)))
        elif key == "trainer" and isinstance(value, dict):
            _check_arguments(value, _TRAINER, key, problems)
        elif key in ("data", "model") and isinstance(value, dict):
            _check_class_path(value, key, problems)
        elif key == "seed_everything" and value is not None:
            check_value(value, bool | int, key, problems)
        elif value is not None and key in shared:
            _check(value, *shared[key], key, problems)
    refuse(problems, config)
    if verb in ("fit", "evaluate", "probe"):
        _check_files(config, verb)


def _check_files(config: dict[str, Any], verb: str) -> None:
    """Refuse a folder of data that is missing, and weights of stages that have not been trained.

    Raises:
        ValueError: it names the folder and the command that makes it.
    """
    root, held_out = (_lookup(config, f"data.init_args.{name}") for name in ("root", "held_out"))
    if isinstance(root, str) and isinstance(held_out, str | None):
        require_data(root, held_out)
    run = Path(str(config.get("run_dir")))
    if verb != "fit":
        needed = [str(run / "handoff")]
    elif (run / "handoff").exists() or (run / "checkpoints").exists():
        needed = []  # the stage is finished or resumes
    else:
        sources = _lookup(config, "model.init_args.init")
        needed = [str(source).partition(":")[0] for source in sources.values()] if isinstance(sources, dict) else []
    for folder in map(Path, needed):
        stage = folder.parent.name
        if folder.name == "handoff" and stage.startswith("stage") and not (folder / "manifest.json").is_file():
            raise ConfigError(f"No {stage} weights in {folder}. Run `make {stage}` first.")


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _check_class_path(value: dict[str, Any], key: str, problems: list[str]) -> None:
    """Check the arguments of the class that a configuration names."""
    path = str(value.get("class_path"))
    if path.startswith(_OURS) and _find(path) is None and _module_file(path.rpartition(".")[0]):
        module, _, name = path.rpartition(".")
        problems.append(
            f"{key}.class_path: got {path}, which does not exist (module {module!r} has no attribute {name!r})"
        )
    elif isinstance(value.get("init_args"), dict):
        _check_arguments(value["init_args"], path, f"{key}.init_args", problems)


def _check_arguments(value: dict[str, Any], path: str, key: str, problems: list[str]) -> None:
    """Check names and values of a class's arguments, if its source is found."""
    source = _find(path)
    if source is None:
        return
    signature = _signature(source)
    for name, item in value.items():
        if name in signature.known:
            _check(item, *signature.known[name], f"{key}.{name}", problems)
        elif not signature.is_open:
            problems.append(unknown_key(f"{key}.{name}", key, list(signature.known)))


def _check(value: Any, annotation: ast.expr | None, module: str, key: str, problems: list[str]) -> None:
    """Check a value against an annotation, as far as that is clear from the source."""
    if annotation is None or value is None:
        return
    alternatives = list(_alternatives(annotation))
    plain = [_plain(alternative) for alternative in alternatives]
    if all(hint is not _UNKNOWN for hint in plain):
        check_value(value, reduce(or_, plain) if len(plain) > 1 else plain[0], key, problems)
    elif isinstance(value, dict) and "class_path" in value:
        _check_class_path(value, key, problems)
    elif isinstance(value, dict):
        structured = [alternative for alternative, hint in zip(alternatives, plain, strict=True) if hint is _UNKNOWN]
        if len(structured) == 1 and (path := _takes_keys(structured[0], module)):
            _check_arguments(value, path, key, problems)
    elif isinstance(value, list) and len(alternatives) == 1 and isinstance(annotation, ast.Subscript):
        if ast.unparse(annotation.value) == "list":
            for number, item in enumerate(value):
                _check(item, annotation.slice, module, f"{key}[{number}]", problems)


_UNKNOWN = object()


def _plain(annotation: ast.expr) -> Any:
    """Return the type of an annotation that needs no name of its module, or ``_UNKNOWN``."""
    text = ast.unparse(annotation)
    if text in _PLAIN:
        return _PLAIN[text]
    if isinstance(annotation, ast.Subscript) and text.startswith("Literal["):
        try:
            values = ast.literal_eval(annotation.slice)
        except ValueError:
            return _UNKNOWN
        return Literal[values]
    return _UNKNOWN


def _alternatives(annotation: ast.expr) -> Iterator[ast.expr]:
    """Yield the members of a union."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _alternatives(ast.parse(annotation.value, mode="eval").body)
    elif isinstance(annotation, ast.BinOp):
        yield from _alternatives(annotation.left)
        yield from _alternatives(annotation.right)
    else:
        yield annotation


def _takes_keys(annotation: ast.expr, module: str) -> str | None:
    """Return the path of the dataclass, ``TypedDict`` or callback that an annotation names."""
    if not isinstance(annotation, ast.Name | ast.Attribute):
        return None
    path = _resolve(ast.unparse(annotation), module)
    source = _find(path) if path else None
    if (
        path is None
        or source is None
        or not (source.is_typed_dict or "dataclass" in source.decorators or path.startswith(_OURS))
    ):
        return None
    return path


def _signature(source: _Source) -> _Signature:
    """Read the arguments of a class; those of its base classes count where it passes them on."""
    if source.node.keywords and not source.is_typed_dict:  # a metaclass may change everything
        return _Signature(is_open=True)
    if source.decorators and source.decorators != ["dataclass"]:
        return _Signature(is_open=True)
    if source.is_typed_dict or source.decorators:
        found = _Signature({name: (hint, source.module) for name, hint in _fields(source.node)})
        inherits = True
    else:
        makers = [node for node in source.node.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        found, inherits = _Signature(), True
        if makers:
            arguments = makers[0].args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs][1:]
            found.known = {argument.arg: (argument.annotation, source.module) for argument in named}
            inherits = arguments.kwarg is not None
    for base in source.node.bases if inherits else ():
        name = ast.unparse(base).partition("[")[0]
        if name in ("object", "ABC", "Protocol", "Generic", "TypedDict", "NamedTuple"):
            continue
        path = _resolve(name, source.module)
        parent = _find(path) if path and path.startswith(_OURS) else None
        above = _signature(parent) if parent else _Signature(is_open=True)
        found = _Signature(above.known | found.known, found.is_open or above.is_open)
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield the fields of a dataclass or ``TypedDict`` that its maker takes."""
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        is_made = isinstance(line.value, ast.Call) and any(
            word.arg == "init" and ast.unparse(word.value) == "False" for word in line.value.keywords
        )
        if not is_made and "ClassVar" not in ast.unparse(line.annotation):
            yield line.target.id, line.annotation


@cache
def _shared_keys() -> dict[str, tuple[ast.expr, str]]:
    """Read ``SHARED_KEYS`` of ``lightning_modules.run`` from its source."""
    module = "lightning_modules.run"
    for line in _tree(module).body:
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "SHARED_KEYS":
            assert isinstance(line.value, ast.Dict)
            keys = [ast.literal_eval(key) for key in line.value.keys if key is not None]
            return dict(zip(keys, ((value, module) for value in line.value.values), strict=True))
    raise AssertionError("lightning_modules.run has no SHARED_KEYS")


@cache
def _find(path: str) -> _Source | None:
    """Find the definition of a class by its dotted path, also through a module that imports it."""
    module, _, name = path.rpartition(".")
    if not module or _module_file(module) is None:
        return None
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Source(node, module)
    elsewhere = _resolve(name, module)
    return _find(elsewhere) if elsewhere and elsewhere != path else None


def _resolve(name: str, module: str) -> str | None:
    """Return the dotted path that a name has in a module: of a class of its own, or of one that it imports."""
    first, _, rest = name.partition(".")
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return f"{module}.{name}"
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == first:
                    return ".".join(filter(None, (node.module, alias.name, rest)))
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name) == first:
                    return ".".join(filter(None, (alias.name, rest)))
    return None


@cache
def _module_file(module: str) -> Path | None:
    """Return the source file of a module, without importing it or the packages above it."""
    top, *below = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    if below:
        place = file.parent.joinpath(*below)
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file if file.suffix == ".py" and file.is_file() else None


@cache
def _tree(module: str) -> ast.Module:
    """Parse a module; one that cannot be parsed is empty, since the import will report it."""
    file = _module_file(module)
    try:
        return ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module([], [])
