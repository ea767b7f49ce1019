"""jsonargparse's reports on a wrong configuration as one line: the key as written, the value, what is allowed."""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_type_hints

import lightning as L

from datamodules.egobench.config import EgoBenchConfig
from lightning_modules.callbacks.sample_panel import SamplePanel
from lightning_modules.callbacks.throughput import TrainingMonitor
from lightning_modules.egobench.judge import JudgeConfig
from lightning_modules.plan import PlanConfig

_UNION = re.compile(
    r'^(?:Parser key "(?P<key>[\w.]+)": )?Does not validate against any of the Union subtypes .*? Errors: - '
)
_DUMP = re.compile(r"(?: - Expected a <class 'NoneType'>)? Given value type: .*$")
_CLASS = re.compile(r"^Problem with given class_path '(?P<path>[\w.]+)': ")
_UNKNOWN = re.compile(r"^(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<key>[\w.]+)'")
_VALUE = re.compile(r'^Parser key "(?P<key>[\w.]+)": Expected an? (?P<type>.*?)\. Got value: (?P<value>.*)$')
_OPTIONAL = re.compile(
    r"Errors: - Expected an? (?P<type>.*?) - Expected a <class 'NoneType'> .* Given value: (?P<value>.*)$"
)
_SHOWN = 12


def explain(message: str, config: dict[str, Any]) -> str:
    """Shorten a report.

    Args:
        message: of jsonargparse's error, or of an error that a constructor raised through it.
        config: the configuration it is about.

    Returns:
        One line; a message of another form comes back as it is, on one line.
    """
    text = " ".join(message.split())
    prefix = ""
    if (union := _UNION.match(text)) and union["key"] in (None, "model", "data"):
        text = _DUMP.sub("", text[union.end() :])
        prefix = f"{union['key']}.init_args." if union["key"] else ""
        if problem := _CLASS.match(text):
            text = text[problem.end() :]
            if text.startswith("module ") or "Unable to import" in text or text.startswith("No module"):
                return f"{union['key']}.class_path: got {problem['path']}, which does not exist ({text})"
    elif union and (optional := _OPTIONAL.search(text)):
        return f"{union['key']}: got {optional['value']}, allowed: {_type(optional['type'])} or null"
    if unknown := _UNKNOWN.match(text):
        key = f"{unknown['group']}.{unknown['key']}" if unknown["group"] else unknown["key"]
        return _unknown(_as_written(prefix, key, config), prefix + key, config)
    if value := _VALUE.match(text):
        return f"{_as_written(prefix, value['key'], config)}: got {value['value']}, allowed: {_type(value['type'])}"
    if text.startswith("the following arguments are required: "):
        keys = text.split(": ", 1)[1].split(", ")
        return f"missing: {', '.join(_as_written(prefix, key, config) for key in keys)}"
    return prefix.replace(".init_args.", ": ") + text


def _as_written(prefix: str, key: str, config: dict[str, Any]) -> str:
    """Without ``model.init_args.`` where that only refers to a shared key, such as ``network``."""
    return key if key.partition(".")[0] in config else prefix + key


def _type(text: str) -> str:
    text = text.partition(" - Not a valid subclass")[0]
    if literal := re.match(r"typing\.Literal\[(.*)\]$", text):
        return literal[1].replace("'", "")
    return re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", text)


def _unknown(written: str, key: str, config: dict[str, Any]) -> str:
    known = _known(key.split("."), config)
    above, _, last = written.rpartition(".")
    if not known:  # the first key is wrong already
        written, _, _ = written.partition(".")
        known, above, last = sorted(config.keys() - {written}), "", written
    close = get_close_matches(last, known, 3)
    shown = close if close and len(known) > _SHOWN else known
    where = f" in {above}" if above else ""
    return f"{written}: no such key{where}, {'did you mean' if shown is close else 'allowed'}: {', '.join(shown)}"


def _known(keys: list[str], config: dict[str, Any]) -> list[str]:
    """Names that may stand in the place of the last of ``keys``; none if the way there is unknown."""
    owners: dict[str, Any] = {"trainer": L.Trainer, "monitor": TrainingMonitor, "panel": SamplePanel}
    owners |= {"egobench": EgoBenchConfig, "judge": JudgeConfig, "plan": PlanConfig}
    owner, rest = owners.get(keys[0]), keys[1:]
    if keys[0] in ("model", "data") and keys[1:2] == ["init_args"]:
        module, _, name = str(config[keys[0]].get("class_path")).rpartition(".")
        owner, rest = getattr(import_module(module), name), keys[2:]
    for key in rest[:-1]:
        owner = _parameters(owner).get(key)
    return list(_parameters(owner))


def _parameters(owner: Any) -> dict[str, Any]:
    """Types of everything a class is made from, by name; with those that it passes on to its bases."""
    if is_dataclass(owner):
        return get_type_hints(owner)
    found: dict[str, Any] = {}
    for base in inspect.getmro(owner) if inspect.isclass(owner) else ():
        function: Any = vars(base).get("__init__")
        if not inspect.isfunction(function) or base.__module__.startswith("torch."):
            continue
        kinds = inspect.signature(function).parameters
        hints = get_type_hints(inspect.unwrap(function))
        named = [n for n, p in kinds.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and n != "self"]
        found = {name: hints.get(name) for name in named} | found
        if not any(p.kind is p.VAR_KEYWORD for p in kinds.values()):
            break
    return found
