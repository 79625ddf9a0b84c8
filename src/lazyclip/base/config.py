"""Strict reading of JSON and YAML, settings into frozen dataclasses, and the hash of a config.

Not here: where the files lie (`resources`), what the keys mean (the modules that own them).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from lazyclip.base.errors import UserError, nearest

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice (the plain loader keeps the last in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise UserError(f"{self.name}: key '{key}' stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None


def _mapping(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected a mapping of keys at the top, found {type(value).__name__}"
        )
    return {str(key): item for key, item in value.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raises `UserError` naming file and line when it cannot."""
    try:
        with path.open(encoding="utf-8") as stream:
            loaded = yaml.load(stream, Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({error})") from None
    return _mapping({} if loaded is None else loaded, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `UserError` naming file and place when it cannot."""
    try:
        return _mapping(json.loads(_read_text(path)), path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, whole or not at all (by a rename); NaN is refused."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def strict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a mapping; a key it does not have is an error.

    Args:
        cls: a dataclass.
        values: its fields by name.
        where: file or flag, for the message.
    """
    fields = [f.name for f in dataclasses.fields(cast(Any, cls))]
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(key, fields)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None


def config_hash(config: object) -> str:
    """Return 12 hex digits of the SHA-256 of the config as JSON with sorted keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
