"""Typed fields of a row of a predictions file, with errors that name row, field and how to fix it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from datamodules.io.jsonl import is_text, require

Row = Mapping[str, Any]
"""A JSON object of a predictions file."""
PlacedRow = tuple[str, Row]
"""A row and its place, such as file and line, for messages."""
Number = TypeVar("Number", np.float32, np.float64)


def read_text(row: Row, name: str, where: str) -> str:
    """Return a field that must be a text.

    Raises:
        ValueError: the field is missing or of another type; the same in all functions of this module.
    """
    value = require(dict(row), name, where)
    if not is_text(value):
        raise ValueError(f"{where}: field {name!r} is {shortened(value)}, expected text")
    return value


def read_texts(row: Row, name: str, where: str) -> list[str]:
    """Return a field that must be a list of texts."""
    value = require(dict(row), name, where)
    if not isinstance(value, list | tuple) or not all(is_text(entry) for entry in value):
        raise ValueError(f"{where}: field {name!r} is {shortened(value)}, expected a list of texts")
    return list(value)


def read_labels(row: Row, where: str) -> Row:
    """Return the field ``labels``, a JSON object."""
    value = require(dict(row), "labels", where)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: field 'labels' is {shortened(value)}, expected an object")
    return value


def read_label(labels: Row, name: str, where: str) -> int:
    """Return a label that must be a class index."""
    value = require(dict(labels), name, f"{where} labels")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where}: field {name!r} of the labels is {shortened(value)}, expected a number from 0")
    return value


def read_label_list(labels: Row, name: str, where: str) -> list[int]:
    """Return a label that must be a list of class indices."""
    value = require(dict(labels), name, f"{where} labels")
    if not isinstance(value, list | tuple) or not all(type(entry) is int and entry >= 0 for entry in value):
        raise ValueError(
            f"{where}: field {name!r} of the labels is {shortened(value)}, expected a list of numbers from 0"
        )
    return list(value)


def read_answer(row: Row, where: str, options: int) -> int:
    """Return the field ``answer``, the index of one of some options."""
    value = require(dict(row), "answer", where)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < options:
        raise ValueError(f"{where}: field 'answer' is {shortened(value)}, expected a number from 0 to {options - 1}")
    return value


def read_array(
    row: Row,
    name: str,
    where: str,
    dtype: type[Number],
    length: int | None = None,
    length_is: str = "",
    dimensions: int = 1,
) -> NDArray[Number]:
    """Return a field that must hold finite numbers.

    Args:
        row: the row.
        name: of the field.
        where: the place of the row.
        dtype: of the array.
        length: required length of the first dimension; None for any.
        length_is: explanation of the length, for the error.
        dimensions: 1 for a list of numbers, 2 for a list of lists.
    """
    value = require(dict(row), name, where)
    try:
        array = np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: field {name!r} is {shortened(value)}, expected a list of numbers") from None
    if array.ndim != dimensions or not array.size:
        entries = "numbers" if dimensions == 1 else "lists of numbers"
        raise ValueError(f"{where}: field {name!r} is {shortened(value)}, expected a list of {entries}")
    if length is not None and len(array) != length:
        raise ValueError(
            f"{where}: field {name!r} has {len(array)} numbers, expected {length}, {length_is}: evaluate the sample "
            "again"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: field {name!r} holds a number that is not finite: evaluate the sample again")
    return array


def shortened(value: Any) -> str:
    """Return the representation of a value, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
