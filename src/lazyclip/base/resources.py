"""Where `configs/` lies: two levels up in a checkout, beside the package in a wheel."""

from pathlib import Path

from lazyclip.base.errors import UserError, unknown

PACKAGE = Path(__file__).resolve().parents[1]


def config_root() -> Path:
    """Return the folder that holds `models/`, `protocols/` and `classes/`."""
    for folder in (PACKAGE / "configs", PACKAGE.parents[1] / "configs"):
        if (folder / "models").is_dir():
            return folder
    raise UserError(f"no configs/ beside or above {PACKAGE}; install lazyclip again")


def checkout_root() -> Path | None:
    """Return the root of the checkout the package runs from, None in a wheel."""
    root = PACKAGE.parents[1]
    return root if (root / "setup.py").is_file() and (root / "configs").is_dir() else None


def config_names(kind: str, suffix: str) -> list[str]:
    """List the names of one kind of config (`models`, `.json`), sorted."""
    return sorted(p.name.removesuffix(suffix) for p in (config_root() / kind).glob(f"*{suffix}"))


def config_file(kind: str, name: str, suffix: str, what: str = "") -> Path:
    """Return a config by name, or the file itself when `name` is the path of one.

    Args:
        kind: folder below `configs/`, such as `protocols`.
        name: stem of the file, or a path that ends in `suffix`.
        suffix: `.json`, `.yaml` or `.txt`.
        what: word for the error message; default `kind`.
    """
    if name.endswith(suffix):
        path = Path(name)
        if not path.is_file():
            names = ", ".join(config_names(kind, suffix))
            raise UserError(
                f"{what or kind} file {name} does not exist; give the path of one, or a shipped "
                f"name: {names}"
            )
        return path
    path = config_root() / kind / f"{name}{suffix}"
    if not path.is_file() or "/" in name:
        raise unknown(what or kind, name, config_names(kind, suffix))
    return path
