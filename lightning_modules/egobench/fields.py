"""Types of the rows of prediction files, and checks that depend on other rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

Row = Mapping[str, Any]
"""A JSON object of a predictions file."""
PlacedRow = tuple[str, Row]
"""A row and its place, such as file and line, for messages."""
Index = Annotated[int, Field(ge=0)]
Numbers = Annotated[list[float], Field(min_length=1)]
Dtype = TypeVar("Dtype", np.float32, np.float64)


def to_array(
    values: Sequence[float], name: str, where: str, dtype: type[Dtype], length: int, length_is: str
) -> NDArray[Dtype]:
    """Return a field of numbers as an array.

    Args:
        values: content of the field.
        name: of the field.
        where: the place of the row.
        dtype: of the array.
        length: required number of values.
        length_is: explanation of the length, for the error.

    Raises:
        ValueError: the length is another.
    """
    if len(values) != length:
        raise ValueError(
            f"{where}: field {name!r} has {len(values)} numbers, expected {length}, {length_is}: evaluate the sample "
            "again"
        )
    return np.asarray(values, dtype=dtype)


def check_answer(answer: int, options: int, where: str) -> None:
    """Check that a right answer is the index of one of some options.

    Raises:
        ValueError: it is too large.
    """
    if answer >= options:
        raise ValueError(f"{where}: field 'answer' is {answer}, expected a number from 0 to {options - 1}")
