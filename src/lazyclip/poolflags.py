"""The pooling's command-line flags, as a table that every entry point reads.

Not here: argparse (an entry adds each row to its own parser), what the options mean (`pooling`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lazyclip.base.errors import UserError
from lazyclip.lowpass import KERNELS
from lazyclip.pooling import POOLINGS, SCORES, PoolSpec


class PoolFlag(NamedTuple):
    """One flag: `--last-<field>`, how its text becomes the value, and its help."""

    field: str
    convert: Callable[[str], object]
    help: str

    @property
    def flag(self) -> str:
        """The flag as typed."""
        return f"--last-{self.field}"


def read_k(text: str) -> int | float:
    """Read a count (`32`) or a fraction (`0.5`, `1.0`) of the patches.

    Raises:
        UserError: no number; its range is checked with the other options (`pool_overrides`).
    """
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise UserError(f"--last-k {text} is no number; use a count, or a fraction such as 0.5")


def read_sigma(text: str) -> float | None:
    """Read a width in frequency bins, `inf`, or `sqrt` (the square root of the channel count)."""
    if text == "sqrt":
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--last-sigma {text} is no number; use bins, inf or sqrt") from None


def read_eps(text: str) -> float:
    """Read eps, a number from 0 on."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--last-eps {text} is no number; use one such as 1e-6") from None


POOL_FLAGS = (
    PoolFlag("pooling", str, f"pooling: {', '.join(POOLINGS)} (default: the model's own)"),
    PoolFlag("k", read_k, "patches kept per channel: a count, or a fraction such as 0.5"),
    PoolFlag("score", str, f"stability score: {', '.join(SCORES)}"),
    PoolFlag("sigma", read_sigma, "width of the low pass in frequency bins; inf; sqrt"),
    PoolFlag("kernel", str, f"low-pass kernel: {', '.join(KERNELS)}"),
    PoolFlag("eps", read_eps, "added to the distance in the score"),
)


def pool_overrides(given: Mapping[str, str | None]) -> dict[str, object]:
    """Turn the flags a user gave into keys of `vision_cfg.last`.

    Args:
        given: field (`k`, `score`, ...) -> text, None where the flag was not given.

    Raises:
        UserError: a value that does not read, or an unknown name, with the flag to mend.
    """
    found: dict[str, object] = {}
    for row in POOL_FLAGS:
        text = given.get(row.field)
        if text is None:
            continue
        found[row.field] = row.convert(text)
        try:
            PoolSpec.from_mapping({row.field: found[row.field]}, row.flag)
        except UserError as error:
            raise UserError(
                f"{row.flag} {text}: {str(error).removeprefix(row.flag + ': ')}"
            ) from None
    return found
