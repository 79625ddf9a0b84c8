"""An environment for `open_clip_train` 3.3.0: open_clip_torch 3.3.0 and webdataset 0.2.86.

    python benchmarks/peer.py [--folder FOLDER]

Makes a virtual environment once, by pip, with those two packages of its own; all else (torch,
torchvision, Pillow) is this environment's, so that both sides compute with the same builds.
lazyclip is not importable there. Not here: what is run in it.
"""

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"open_clip_torch": "3.3.0", "webdataset": "0.2.86"}
DEFAULT = ROOT / "out" / "peer"
_ASK = "import importlib.metadata as m; print(*(m.version(n) for n in {names!r}))"


def _site(folder: Path) -> Path:
    places = {"base": str(folder), "platbase": str(folder)}
    return Path(sysconfig.get_path("purelib", "venv", vars=places))


def _found(python: Path) -> list[str]:
    if not python.exists():
        return []
    ask = _ASK.format(names=tuple(PACKAGES))
    done = subprocess.run([str(python), "-c", ask], capture_output=True, text=True)
    return done.stdout.split()


def ensure_peer(folder: Path = DEFAULT) -> Path:
    """Make the environment where it is missing.

    Returns:
        Its Python.

    Raises:
        SystemExit: it could not be made.
    """
    python = folder / "bin" / "python"
    if _found(python) == list(PACKAGES.values()):
        return python
    venv.create(folder, clear=True, symlinks=True)
    wanted = [f"{name}=={version}" for name, version in PACKAGES.items()]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
         "--disable-pip-version-check", "--target", str(_site(folder)), *wanted],
        check=True,
    )  # fmt: skip
    # Behind the environment's own packages on the path; a .pth file in there is not read again.
    (_site(folder) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if _found(python) != list(PACKAGES.values()):
        raise SystemExit(f"{folder} holds {_found(python)} in place of {wanted}; remove it")
    return python


def main() -> None:
    """Make the environment and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT)
    ensure_peer(parser.parse_args().folder)
    print(", ".join(f"{name} {version}" for name, version in PACKAGES.items()))


if __name__ == "__main__":
    main()
