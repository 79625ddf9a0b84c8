"""Errors a user can mend, and the wrapper that turns them into one line and exit code 2.

Not here: errors of our own making, which keep their traceback and exit code 1.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence


class UserError(ValueError):
    """A mistake the user can mend: one line with the thing, its value, the limit and the remedy."""


def nearest(name: str, known: Iterable[str], most: int = 5) -> str:
    """Phrase the known names nearest to a wrong one.

    Args:
        name: what was asked for.
        known: all names there are.
        most: how many to list.

    Returns:
        Text such as ``nearest: a, b (of 12)``, nearest first; ``none are known`` when empty.
    """
    names = sorted(set(known))
    if not names:
        return "none are known"
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=most, cutoff=0.0)
    listed = ", ".join(lowered[c] for c in close)
    return f"nearest: {listed} (of {len(names)})" if len(names) > most else f"known: {listed}"


def unknown(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UserError:
    """Make the error for a name that is not known, nearest names first."""
    tail = f"; {remedy}" if remedy else ""
    return UserError(f"unknown {kind} '{name}'; {nearest(name, known)}{tail}")


def _rank_prefix() -> str:
    world = os.environ.get("WORLD_SIZE", "1")
    return f"[rank {os.environ.get('RANK', '0')}] " if world not in ("", "1") else ""


def cli(run: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Wrap an entry point: a `UserError` becomes one line on stderr and exit code 2.

    Args:
        run: takes the arguments (None: those of the process) and raises on failure.

    Returns:
        A function that returns the exit code: 0 done, 2 the user can mend it, 130 interrupted.
        Anything else keeps its traceback (exit code 1). ``LAZYCLIP_TRACEBACK=1`` shows the
        traceback of user errors too.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        try:
            run(argv)
        except UserError as error:
            if os.environ.get("LAZYCLIP_TRACEBACK") == "1":
                raise
            text = " ".join(str(error).split())
            sys.stderr.write(f"{_rank_prefix()}error: {text}\n")
            sys.stderr.flush()
            return 2
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130
        except BrokenPipeError:
            # The reader of our output (head, less) went away: not an error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return 0

    main.__doc__ = run.__doc__
    return main
