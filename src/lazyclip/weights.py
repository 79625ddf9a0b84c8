"""Known weights, weight files, and the passport that says how weights want to be run.

A passport records what a state dict does not: the activation and the pooling the weights were
trained with. It lies in a saved folder's `open_clip_config.json` and in the metadata of a
`.safetensors` file of ours. Not here: building models (`factory`).
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants
from safetensors import safe_open
from torch import Tensor, nn

from lazyclip import bridge
from lazyclip.base.config import read_json
from lazyclip.base.errors import UserError, unknown
from lazyclip.pooling import PoolSpec

PREFIX = "LaSt-"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILE = "open_clip_model.safetensors"
METADATA_KEY = "lazyclip"
# The names under which a saved folder holds its weights, in the order in which they are tried.
FOLDER_FILES = (
    WEIGHT_FILE, "open_clip_pytorch_model.safetensors", "model.safetensors",
    "open_clip_pytorch_model.bin", "model.pt",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# What people type for the two MetaCLIP releases; facebookresearch/MetaCLIP#79 asks for the names.
ALIASES = {
    "metaclip": "metaclip_fullcc",
    "metaclip_2.5b": "metaclip_fullcc",
    "metaclip_2pt5b": "metaclip_fullcc",
    "metaclip_2_5b": "metaclip_fullcc",
    "metaclip_fullcc2.5b": "metaclip_fullcc",
    "metaclip_400": "metaclip_400m",
    "laion400m": "laion400m_e32",
}


@dataclasses.dataclass(frozen=True)
class Passport:
    """What is known of how weights were trained; None where nothing says it.

    Fields: activation `gelu` or `quickgelu`; last, the dictionary of a model config; model_cfg, the
    whole config of a saved folder; preprocess, mean, std and the like.
    """

    activation: str | None = None
    last: Mapping[str, object] | None = None
    model_cfg: Mapping[str, Any] | None = None
    preprocess: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weight file read: cleaned state dict, passport, and where and what it is."""

    state: dict[str, Tensor]
    passport: Passport
    path: Path
    sha256: str


def base_name(name: str) -> str:
    """Return the name of the plain model below a LaSt name."""
    return name.removeprefix(PREFIX)


def is_last_name(name: str) -> bool:
    """Tell whether a model name is one of ours."""
    return name.startswith(PREFIX)


def last_tags(name: str) -> dict[str, dict[str, Any]]:
    """Return the tags of a LaSt name: all of its base's, on both activations' names.

    A `-quickgelu` name has those of QuickGELU weights only, as in open_clip.
    """
    base = base_name(name)
    tags = {
        **bridge.tags_of(base),
        **bridge.tags_of(f"{base.removesuffix('-quickgelu')}-quickgelu"),
    }
    if base.endswith("-quickgelu"):
        tags = {tag: entry for tag, entry in tags.items() if entry.get("quick_gelu")}
    return tags


def clean_tag(tag: str) -> str:
    """Return a tag as open_clip spells it, aliases resolved."""
    lowered = tag.lower().replace("-", "_")
    return ALIASES.get(lowered, lowered)


def tag_activation(name: str, tag: str) -> str:
    """Return the activation a tag's entry asks for: the passport of downloaded weights."""
    entry = open_clip.get_pretrained_cfg(name, tag)
    return "quickgelu" if entry.get("quick_gelu") else "gelu"


def unknown_weights(name: str, pretrained: str) -> UserError:
    """Make the error for something that is neither a tag, nor a file, nor a folder."""
    if "/" in pretrained or Path(pretrained).suffix in _SUFFIXES:
        return UserError(
            f"--pretrained {pretrained} does not exist, neither as a file nor as a folder; give a "
            f"weight file, a saved model's or a run's folder, or a tag of {name}"
        )
    known = open_clip.list_pretrained_tags_by_model(name)
    return unknown(
        f"--pretrained of {name}", pretrained, known,
        "there is no file or folder of that name either",
    )  # fmt: skip


@contextlib.contextmanager
def hub_in_one_try() -> Iterator[None]:
    """Keep the hub client quiet, and to its cache where its host has no address.

    Without this a machine without network waits through dozens of retries, each with a warning.
    """
    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    host = urllib.parse.urlparse(constants.ENDPOINT).hostname or ""
    try:
        if not any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
            socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def fetch_tag(name: str, tag: str, cache_dir: str | None = None) -> Path:
    """Download a tag's file, or find it in the cache.

    Raises:
        UserError: one line when it cannot be had; never random weights instead.
    """
    entry = open_clip.get_pretrained_cfg(name, tag)
    source = entry.get("file") or entry.get("hf_hub") or entry.get("url")
    try:
        with hub_in_one_try():
            path = open_clip.download_pretrained(entry, cache_dir=cache_dir)
    except Exception as error:  # every hub client has its own; all mean the same to the user
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
        raise UserError(
            f"the weights '{tag}' of {name} ({source}) could not be downloaded "
            f"({type(error).__name__}: {reason}); fetch that file where there is a network and "
            "pass its path as --pretrained"
        ) from error
    if not path:
        raise UserError(f"the tag '{tag}' of {name} names no file that open_clip can fetch")
    return Path(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def find_weight_file(path: Path) -> Path:
    """Return the weight file that a path means: the file itself, or the one in a saved folder.

    A run's folder (`LOGS/NAME`) and one of its checkpoints are understood too.
    """
    if path.is_file():
        return path
    for folder in (path, path / "model"):
        for name in FOLDER_FILES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"{path} holds no {WEIGHT_FILE}; pass a saved model's folder or a weight file")


def read_passport(path: Path) -> Passport:
    """Read what stands beside or inside a weight file about how it was trained.

    A folder's config speaks for the folder's own weight file; a file that was put beside it under
    another name speaks for itself where it can.
    """
    config = path.parent / CONFIG_FILE
    if config.is_file() and path.name in FOLDER_FILES:
        return _passport_of_config(read_json(config))
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as stream:
            text = (stream.metadata() or {}).get(METADATA_KEY)
        if text:
            return _passport_of_config(json.loads(text))
    return _passport_of_config(read_json(config)) if config.is_file() else Passport()


def trained_pooling(name: str, pretrained: str | None) -> PoolSpec | None:
    """Return the pooling that weights were trained with, however they are pooled here.

    A tag, and a file without a record, are a plain CLIP model's: its CLS token.

    Args:
        name: a model name, or a saved model's or a run's folder.
        pretrained: a tag, a weight file or a saved model's folder; None: the name's own weights.

    Returns:
        The pooling; None for a name without weights.
    """
    place = Path(pretrained or name.removeprefix("local-dir:"))
    if not pretrained and not any((f / CONFIG_FILE).is_file() for f in (place, place / "model")):
        return None
    if not place.exists():
        return PoolSpec(pooling="token")
    recorded = read_passport(find_weight_file(place)).last
    return PoolSpec.from_mapping(recorded or {"pooling": "token"}, str(place))


def trained_size(name: str, pretrained: str | None) -> tuple[int, int] | None:
    """Return the image size (height, width) that weights hold positions for.

    Args:
        name: a model name, or a saved model's folder.
        pretrained: a tag, a weight file or a folder; None where the name is a folder, or nothing
            is loaded.

    Returns:
        Pixels; None for random weights, and where nothing says it.
    """
    for folder in (Path(name), Path(name) / "model"):
        if (folder / CONFIG_FILE).is_file():
            return _recorded_size(_passport_of_config(read_json(folder / CONFIG_FILE)))
    if pretrained is None:
        return None
    name = name.replace("/", "-")
    config: Mapping[str, Any] | None = open_clip.get_model_config(name)
    tagged = open_clip.is_pretrained_cfg(name, clean_tag(pretrained))
    if not tagged and Path(pretrained).exists():
        config = read_passport(find_weight_file(Path(pretrained))).model_cfg or config
    return _recorded_size(Passport(model_cfg=config))


def _passport_of_config(config: Mapping[str, Any]) -> Passport:
    model_cfg = config.get("model_cfg", config)
    vision = model_cfg.get("vision_cfg", {})
    return Passport(
        activation="quickgelu" if model_cfg.get("quick_gelu") else "gelu",
        last=vision.get("last", {"pooling": "token"}),
        model_cfg=model_cfg,
        preprocess=config.get("preprocess_cfg"),
    )


def _read_tensors(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as stream:
                return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        with warnings.catch_warnings():
            # What torch warns of, a TorchScript archive for one, it then fails on: said once below.
            warnings.simplefilter("ignore")
            # Plain types only: nothing in a foreign file is run.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        reason = (str(error).strip().splitlines() or ["it ends early"])[0][:160]
        if "TorchScript" in str(error):
            reason = "a TorchScript archive, as OpenAI's original file, is not read: pass the tag"
        raise UserError(f"{path} is no weight file that can be read ({reason})") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def clean_state_dict(loaded: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Unwrap `state_dict` and strip the prefixes that wrappers leave on every key."""
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(
            f"{path} holds no tensors; expected a state dict, bare or under 'state_dict'"
        )
    stripped = True
    while stripped:
        stripped = False
        for prefix in ("module.", "model.", "_orig_mod."):
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                stripped = True
    return state


def read_weights(path: Path) -> WeightFile:
    """Read a weight file or saved folder.

    Args:
        path: `.safetensors`, or `.pt`, `.pth`, `.bin` of plain types; or a folder that holds one.

    Raises:
        UserError: not there, not readable, or without tensors.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    file = find_weight_file(path)
    state = clean_state_dict(_read_tensors(file), file)
    return WeightFile(state, read_passport(file), file, file_sha256(file))


def _some(keys: list[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(sorted(keys)[:most]) + more


def _recorded_size(passport: Passport) -> tuple[int, int] | None:
    size = ((passport.model_cfg or {}).get("vision_cfg") or {}).get("image_size")
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else None


def _sizes(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def load_state(model: nn.Module, weights: WeightFile, name: str) -> None:
    """Load a state dict strictly; a renamed, missing or misshapen tensor is an error listing it."""
    state = bridge.adapt_state_dict(model, weights.state, _recorded_size(weights.passport))
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} ({_sizes(state[key])} instead of {_sizes(own[key])})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = [
        f"{len(keys)} {word}: {_some(keys)}"
        for keys, word in (
            (missing, "missing"),
            (extra, "unexpected"),
            (shapes, "of another shape"),
        )
        if keys
    ]
    if faults:
        raise UserError(
            f"{weights.path} does not fit {name}; keys {'; '.join(faults)}; "
            "pass the --model that the file was trained as"
        )
    model.load_state_dict(state, strict=True)
