"""Checks of the numbers in settings: from flags, YAML, Python or a run folder."""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, get_args

# Integers beyond it fit in no table.
MAX_INT = 2**63 - 1


def check_numbers(
    settings: Any,  # noqa: ANN401 - any dataclass
    least: Mapping[str, float] = MappingProxyType({}),
    positive: Collection[str] = (),
) -> None:
    """Refuse settings whose numbers are no numbers, are infinite or are too small.

    Every field whose type is a number, or a list of numbers, is checked. None is always allowed.

    Args:
        settings: Instance of a dataclass.
        least: Lowest values by name of the field; 0 for fields that are not named.
        positive: Names of fields that must be greater than 0.

    Raises:
        ValueError: a value is text, not finite, beyond 64 bits or below its lowest value. The
            message names the field, the value and what is expected.
    """
    assert {*positive, *least} <= {field.name for field in fields(settings)}
    for field in fields(settings):
        if _holds_numbers(field.type):
            value = getattr(settings, field.name)
            for number in value if isinstance(value, list | tuple) else [value]:
                expected = _expected(number, field.name in positive, least.get(field.name, 0))
                if expected:
                    message = f"{field.name} is {_short(value)}; it must be {expected}"
                    raise ValueError(message)


def _holds_numbers(kind: Any) -> bool:  # noqa: ANN401 - a type
    return kind in (int, float) or any(_holds_numbers(part) for part in get_args(kind))


def _expected(number: Any, is_positive: bool, least: float) -> str:  # noqa: ANN401, FBT001 - a value of a field
    """Return what is expected instead of a number; an empty text if the number is fine."""
    if number is None or isinstance(number, bool):
        return ""
    if isinstance(number, int) and abs(number) > MAX_INT:
        return "a number of at most 64 bits"
    if not isinstance(number, int | float) or not math.isfinite(number):
        return "a finite number"
    if is_positive and number <= 0:
        return "greater than 0"
    return "" if number >= least else f"at least {least:g}"


def _short(value: Any) -> str:  # noqa: ANN401 - a value of a field
    # Python writes no integers of more than 4,300 digits.
    if isinstance(value, int) and abs(value) > MAX_INT:
        return f"an integer of {value.bit_length():,} bits"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
