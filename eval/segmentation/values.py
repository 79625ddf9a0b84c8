"""Checks of single values that come from a YAML file or a flag: number, triple, choice, mapping.

Not here: which keys there are and what they mean (`protocol`).
"""

import math
from typing import Any

from lazyclip.base.errors import UserError, nearest


def number(
    value: object, key: str, where: str, low: float, high: float = math.inf, *, whole: bool = False
) -> float:
    """Return a finite number within limits.

    Args:
        value: what was given.
        key: its name, for the message.
        where: file or flag, for the message.
        low: smallest value allowed.
        high: largest value allowed.
        whole: whether it must be a whole number, which is then returned as an int.

    Raises:
        UserError: no number, or outside the limits.
    """
    given = math.nan
    if isinstance(value, int if whole else int | float) and not isinstance(value, bool):
        given = value
    if not low <= given <= high or math.isinf(given):
        kind = "whole number" if whole else "number"
        limits = f"from {low:g} on" if math.isinf(high) else f"within {low:g}..{high:g}"
        raise UserError(f"{where}: {key} is {value!r}; give a {kind} {limits}")
    return int(given) if whole else float(given)


def triple(value: object, key: str, where: str) -> tuple[float, float, float]:
    """Return three numbers of at least 0, one a colour channel."""
    if not isinstance(value, list) or len(value) != 3:
        raise UserError(f"{where}: {key} is {value!r}; give three numbers, red green blue")
    red, green, blue = (number(v, key, where, 0.0) for v in value)
    return red, green, blue


def choice(value: object, key: str, where: str, known: tuple[str, ...]) -> None:
    """Raise unless a value is one of the known words; the nearest are named first."""
    if value not in known:
        raise UserError(f"{where}: {key} is {value!r}; {nearest(str(value), known)}")


def mapping(value: object, key: str, where: str) -> dict[str, Any]:
    """Return a mapping that holds at least one entry, keys as text."""
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: {key} must be a mapping with at least one entry")
    return {str(k): v for k, v in value.items()}


def texts(value: object, key: str, where: str) -> tuple[str, ...]:
    """Return a list of texts as a tuple; a single text is a list of one."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(v, str) and v for v in listed):
        raise UserError(f"{where}: {key} is {value!r}; give a list of texts")
    return tuple(listed)


def parsed(value: object) -> object:
    """Return a value given as text in its own kind: `8` -> 8, `0.2` -> 0.2, `1,2,3` -> a list.

    Other words stay text, and values that are no text stay as they are.
    """
    if not isinstance(value, str):
        return value
    if "," in value:
        return [parsed(part.strip()) for part in value.split(",")]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
