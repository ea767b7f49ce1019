"""Validate records with pydantic models; errors name the file, the line, the field and the expected value."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

Value = TypeVar("Value")
_EXPECTED = {
    "int_type": "expected a whole number",
    "model_type": "expected an object",
    "string_too_short": "expected a text that is not empty",
    "string_type": "expected a text",
    "too_short": "expected at least one entry",
}
"""Expected values by pydantic's error types whose own messages name Python classes or are no noun."""


class Record(BaseModel):
    """Base class of records: values are not converted, whole numbers may stand for floats, other fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


def validate(adapter: TypeAdapter[Value], value: object, where: str) -> Value:
    """Validate a parsed JSON value.

    Args:
        adapter: ``TypeAdapter`` of the expected type, made once per type.
        value: the parsed JSON.
        where: file and line, for the message.

    Raises:
        ValueError: ``<where>: field 'a.b[0]' is <value>, expected <type>: correct it``, for the first wrong field.
    """
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    field = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in problem["loc"]).removeprefix(".")
    if problem["type"] == "missing":
        return f"field {field!r} is missing: add it"
    if problem["type"] == "extra_forbidden":
        return f"field {field!r} is unknown: remove it, or correct its name"
    message = _EXPECTED.get(problem["type"], problem["msg"]).removeprefix("Value error, ")
    if message.startswith("Input should be "):
        message = f"expected {message.removeprefix('Input should be ')}"
    return f"field {field!r} is {_shown(problem['input'])}, {message}: correct it"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
