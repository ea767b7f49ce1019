"""Check a resolved configuration against signatures and type hints, before jsonargparse parses it.

Every key is looked up in the class, dataclass or TypedDict that will receive it: unknown keys, missing keys and values
of a wrong type are collected with the name of the key as the user writes it. jsonargparse stays the final parser; kinds
of values that are not known here are left to it.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightning_modules.layers import ConfigError

_ALL_SHOWN = 12
"""Number of allowed keys up to which all are listed; of more, only similar ones are."""


def check_config(config: Mapping[str, Any], types_of_keys: Mapping[str, Any]) -> None:
    """Check all keys and values of a configuration.

    Args:
        config: the resolved configuration.
        types_of_keys: type of each top-level key. A class that is no dataclass takes its arguments as keys, or
            ``class_path`` and ``init_args`` of a subclass.

    Raises:
        ConfigError: one line with all problems; it names keys, values and what is allowed.
    """
    problems: list[str] = []
    for key, value in config.items():
        if key not in types_of_keys:
            problems.append(unknown_key(key, "", sorted(types_of_keys)))
        elif inspect.isclass(types_of_keys[key]) and isinstance(value, dict) and "class_path" not in value:
            _check_class_arguments(value, types_of_keys[key], key, problems)
        elif value is not None:
            check_value(value, types_of_keys[key], key, problems)
    refuse(problems, config)


def refuse(problems: list[str], config: Mapping[str, Any]) -> None:
    """Raise an error with all problems of a configuration, each once, if there are any.

    Raises:
        ConfigError: there are problems.
    """
    shown = dict.fromkeys(_as_typed(problem, config) for problem in problems)
    if shown:
        raise ConfigError("; ".join(shown))


def _as_typed(problem: str, config: Mapping[str, Any]) -> str:
    """Drop ``model.init_args.`` where that only repeats a shared key such as ``network``."""
    for prefix in ("model.init_args.", "data.init_args."):
        rest = problem.removeprefix(prefix)
        first = rest.partition(":")[0].partition(".")[0]
        if rest != problem and isinstance(config.get(first), dict):
            return rest.replace(f" in {prefix}", " in ")
    return problem


def check_value(value: Any, hint: Any, key: str, problems: list[str]) -> Any:
    """Append the problems of a value; return it, as an instance where the hint is a dataclass without problems."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        return _check_union(value, hint, key, problems)
    if isinstance(value, dict) and "class_path" in value and inspect.isclass(hint):
        _check_class_path(value, hint, key, problems)
    elif is_dataclass(hint) and isinstance(value, dict):
        return _check_dataclass(value, typing.cast(type, hint), key, problems)
    elif typing.is_typeddict(hint) and isinstance(value, dict):
        known, required = get_type_hints(hint), hint.__required_keys__
        _check_arguments(value, known, required, key, problems)
    elif origin is Literal:
        if value not in args:
            problems.append(f"{key}: got {_shown(value)}, allowed: {describe_type(hint)}")
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        hints = args if origin is tuple and Ellipsis not in args else (args[0],) * len(value)
        if len(hints) != len(value):
            problems.append(f"{key}: got {len(value)} values, allowed: {len(hints)}")
            return value
        return origin(
            check_value(v, h, f"{key}[{n}]", problems) for n, (v, h) in enumerate(zip(value, hints, strict=True))
        )
    elif origin is dict and isinstance(value, dict):
        return {name: check_value(item, args[1], f"{key}.{name}", problems) for name, item in value.items()}
    elif hint is float and type(value) is int:
        return float(value)
    elif not _accepts(hint, value):
        problems.append(f"{key}: got {_shown(value)}, allowed: {describe_type(hint)}")
    return value


def _check_union(value: Any, hint: Any, key: str, problems: list[str]) -> Any:
    """Accept a value that fits one of several types; report the problems of the type with the same structure."""
    alternatives = list(get_args(hint))
    if isinstance(value, dict) and "class_path" in value:
        alternatives = [each for each in alternatives if inspect.isclass(each)] or alternatives
        alternatives = [each for each in alternatives if each not in (bool, type(None))] or alternatives
    closest: list[str] | None = None
    for alternative in alternatives:
        found: list[str] = []
        checked = check_value(value, alternative, key, found)
        if not found:
            return checked
        if isinstance(value, dict | list) and any(not problem.startswith(f"{key}: got") for problem in found):
            closest = found
    problems += closest or [f"{key}: got {_shown(value)}, allowed: {describe_type(hint)}"]
    return value


def _check_dataclass(value: dict[str, Any], kind: type, key: str, problems: list[str]) -> Any:
    """Check the fields of a dataclass, then its own rules by making it."""
    known = {name: hint for name, hint in get_type_hints(kind).items() if name in {f.name for f in fields(kind)}}
    required = {f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING}
    found: list[str] = []
    checked = _check_arguments(value, known, required, key, found)
    if not found:
        try:
            with suppress(TypeError):  # jsonargparse reports a wrong type further inside
                return kind(**checked)
        except ValueError as error:
            found.append(" ".join(str(error).split()))
    problems += found
    return value


def _check_class_path(value: dict[str, Any], base: type, key: str, problems: list[str]) -> None:
    """Import the class that a configuration names and check its arguments."""
    path = str(value["class_path"])
    module, _, name = path.rpartition(".")
    if not module:
        problems.append(f"{key}.class_path: got {path}, allowed: an import path such as lightning_modules.{path}")
        return
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        problems.append(f"{key}.class_path: got {path}, which does not exist ({' '.join(str(error).split())})")
        return
    if inspect.isclass(kind) and not issubclass(kind, base):
        problems.append(f"{key}.class_path: got {path}, allowed: subclasses of {base.__module__}.{base.__qualname__}")
        return
    for name in value.keys() - {"class_path", "init_args", "dict_kwargs"}:
        problems.append(unknown_key(f"{key}.{name}", key, ["class_path", "init_args"]))
    if inspect.isclass(kind):
        _check_class_arguments(value.get("init_args") or {}, kind, f"{key}.init_args", problems)


def _check_class_arguments(value: dict[str, Any], kind: type, key: str, problems: list[str]) -> None:
    if is_dataclass(kind):
        _check_dataclass(value, kind, key, problems)
        return
    parameters, is_open = constructor_parameters(kind)
    known = {name: hint for name, (hint, _) in parameters.items()}
    if is_open:
        known |= dict.fromkeys(value.keys() - known.keys(), Any)
    required = {name for name, (_, default) in parameters.items() if default is inspect.Parameter.empty}
    _check_arguments(value, known, required, key, problems)


def _check_arguments(
    value: dict[str, Any], known: Mapping[str, Any], required: typing.Collection[str], key: str, problems: list[str]
) -> dict[str, Any]:
    """Check names and values of arguments; return the values, with dataclasses as instances."""
    checked = {}
    for name, item in value.items():
        if name in known:
            checked[name] = check_value(item, known[name], f"{key}.{name}", problems)
        else:
            problems.append(unknown_key(f"{key}.{name}", key, list(known)))
    problems += [
        f"{key}.{name}: missing, allowed: {describe_type(known[name])}" for name in required if name not in value
    ]
    return checked


def constructor_parameters(kind: type) -> tuple[dict[str, tuple[Any, Any]], bool]:
    """Return type hint and default of everything that a class is made from, by name.

    Parameters of base classes count where a class passes ``**kwargs`` on to them. The second value is True if arguments
    of any other name may be accepted, too.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for base in inspect.getmro(kind):
        function: Any = vars(base).get("__init__")
        if not inspect.isfunction(function):
            continue
        parameters = list(inspect.signature(function).parameters.values())[1:]
        try:
            hints = get_type_hints(inspect.unwrap(function))
        except NameError:  # a name that is imported for type checkers only
            hints = {}
        own = {}
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                hint = hints.get(parameter.name, Any)
                own[parameter.name] = (hint | None if parameter.default is None else hint, parameter.default)
        found = own | found
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return found, False
        if base.__module__.partition(".")[0] in ("lightning", "torch"):
            break  # their classes pass **kwargs to other things than base classes
    return found, True


def _accepts(hint: Any, value: Any) -> bool:
    """Return True if a plain value may be given for a type; True for types that are not known here."""
    if hint is None or hint is type(None):
        return value is None
    if hint is Any:
        return True
    if typing.is_typeddict(hint):
        return False  # dictionaries are checked key by key
    if hint not in (int, float, bool, str, Path, list, dict) and not is_dataclass(hint):
        if inspect.isclass(hint) and get_origin(hint) is None:
            return isinstance(value, str | dict | hint)  # a name, or arguments: left to jsonargparse
        return get_origin(hint) not in (list, tuple, dict)
    if hint in (int, float) and isinstance(value, str):
        try:
            hint(value)
        except ValueError:
            return False
        return True
    accepted: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), Path: (str,)}
    return isinstance(value, accepted.get(hint, (hint,)))


def unknown_key(key: str, above: str, known: list[str]) -> str:
    """Describe a key that does not exist, with similar ones or all that do.

    Args:
        key: dotted key.
        above: key of its section, empty at the top.
        known: names in that section.
    """
    name = key.rpartition(".")[2]
    close = get_close_matches(name, known, 3)
    similar = bool(close) and len(known) > _ALL_SHOWN
    where = f" in {above}" if above else ""
    hint = f"did you mean: {', '.join(close)}" if similar else f"allowed: {', '.join(known)}"
    return f"{key}: no such key{where}, {hint}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_type(hint: Any) -> str:
    """Describe the values of a type for people."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is None or hint is type(None):
        return "null"
    if origin is typing.Union or origin is types.UnionType:
        return " or ".join(dict.fromkeys(map(describe_type, sorted(args, key=lambda arg: arg is type(None)))))
    if origin is Literal:
        return ", ".join(map(_shown, args))
    if origin in (list, tuple):
        return f"a list of {describe_type(args[0])}"
    if origin is dict:
        return f"keys with {describe_type(args[1])}"
    if is_dataclass(hint):
        return f"the keys {', '.join(f.name for f in fields(hint))}"
    return str(getattr(hint, "__name__", hint))
