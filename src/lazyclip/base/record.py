"""The record beside every checkpoint, score and figure: what made it.

Command, config and its hash, git state, versions, device, seed, times. What cannot be known (git in
a wheel) is None. Paths are shortened: no host, user name or absolute path is written.
"""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazyclip.base.config import config_hash
from lazyclip.base.resources import checkout_root

PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "webdataset",
    "clip-benchmark",
    "numpy",
)


def utc_now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str | None]:
    """Return the versions of Python, lazyclip and the packages that numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("lazyclip", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["lazyclip_from"] = "checkout" if checkout_root() else "wheel"
    return found


def git_state() -> dict[str, str | bool | None]:
    """Return commit and dirty flag of the checkout; None outside one."""
    root = checkout_root()
    state: dict[str, str | bool | None] = {"commit": None, "dirty": None}
    if root is None or not (root / ".git").exists():
        return state
    try:
        state["commit"] = _git(root, "rev-parse", "--short=12", "HEAD")
        state["dirty"] = bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        pass  # no git on this machine: the commit stays unknown
    return state


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def shorten(value: object) -> object:
    """Replace absolute paths in a value by their last two parts."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and "::" in value:
        return "::".join(str(shorten(part)) for part in value.split("::"))
    if isinstance(value, str) and "=" in value and "/" not in value.split("=", 1)[0]:
        flag, given = value.split("=", 1)
        return f"{flag}={shorten(given)}"
    if isinstance(value, str) and value.startswith("/"):
        return ".../" + "/".join(Path(value).parts[-2:])
    if isinstance(value, Mapping):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(item) for item in value]
    return value


def command_line(module: str, argv: Sequence[str] | None) -> str:
    """Return the command as a person would type it, paths shortened."""
    words = sys.argv[1:] if argv is None else argv
    quoted = [str(shorten(w)) for w in words]
    return " ".join([f"python -m {module}", *(f"'{w}'" if " " in w else w for w in quoted)])


def make_record(
    module: str, argv: Sequence[str] | None, config: Mapping[str, Any], **more: object
) -> dict[str, Any]:
    """Make the record of one run.

    Args:
        module: `training.main`, `eval.zeroshot_seg`, ...
        argv: the arguments, None for those of the process.
        config: the resolved settings; their hash stands in the record.
        more: device, dtype, seed, world, protocol hash, ... as known.
    """
    return {
        "command": command_line(module, argv),
        "config": shorten(dict(config)),
        "config_hash": config_hash(shorten(dict(config))),
        "git": git_state(),
        "versions": versions(),
        "start": utc_now(),
        **{key: shorten(value) for key, value in more.items()},
    }
