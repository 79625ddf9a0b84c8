"""What open_clip's `create_model` does for names and folders of ours: activation and pooling.

Not here: who calls it (`factory`), the formats of weight files (`weights`).
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
from torch import nn

from lazyclip import tower, weights
from lazyclip.base.config import read_json
from lazyclip.base.errors import UserError
from lazyclip.pooling import PoolSpec

log = logging.getLogger(__name__)
LOCAL = "local-dir:"


def make_create(plain: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return open_clip's `create_model` with the passport checked for models of ours."""
    signature = inspect.signature(plain)

    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        extra = given.pop("model_kwargs", {})
        name = given["model_name"]
        if name.startswith(LOCAL):
            folder = Path(name.removeprefix(LOCAL))
            file = folder / weights.CONFIG_FILE
            ours = file.is_file() and "last" in read_json(file).get("model_cfg", {}).get(
                "vision_cfg", {}
            )
            return _create_saved(plain, folder, given, extra) if ours else plain(*args, **kwargs)
        name = name.replace("/", "-")
        if not weights.is_last_name(name):
            return plain(*args, **kwargs)
        if "vision_cfg" in extra and "last" not in (extra["vision_cfg"] or {}):
            raise UserError(f"vision_cfg given for {name} has no 'last': the pooling would be lost")
        if extra.get("force_naflex_vision"):
            raise UserError(f"force_naflex_vision would bypass the pooling of {name}; leave it out")
        if given.get("jit"):
            raise UserError(f"jit=True is not offered for {name}; use torch.compile")
        return _create_named(plain, name, {**given, "model_name": name}, extra)

    return create_model


def pick_activation(name: str, recorded: str | None, forced: bool, source: str) -> bool:
    """Return whether QuickGELU is to be used; a contradiction is an error.

    Args:
        name: model name; the `-quickgelu` ones ask for QuickGELU.
        recorded: activation of the tag's entry or the saved record, None where none is known.
        forced: the caller's `force_quick_gelu`.
        source: of the record, for the message.
    """
    config = open_clip.get_model_config(name) or {}
    asked = forced or bool(config.get("quick_gelu"))
    if recorded == "gelu" and asked:
        raise UserError(
            f"{source} was trained with GELU, and QuickGELU is asked for; "
            f"use {name.removesuffix('-quickgelu')} without --force-quick-gelu"
        )
    return asked or recorded == "quickgelu"


def _create_named(
    plain: Callable[..., nn.Module], name: str, given: dict[str, Any], extra: dict[str, Any]
) -> nn.Module:
    pretrained = given.pop("pretrained", None)
    forced = bool(given.pop("force_quick_gelu", False))
    wanted = bool(given.pop("load_weights", True))
    required = given.pop("require_pretrained", False)
    if not pretrained:
        if required:
            raise UserError(f"{name} needs weights: pass pretrained=TAG or a file")
        quick = pick_activation(name, None, forced, "")
        return plain(**given, force_quick_gelu=quick, **extra)
    pretrained = str(pretrained)
    tag = weights.clean_tag(pretrained)
    if open_clip.is_pretrained_cfg(name, tag):
        source = f"the tag '{tag}'"
        quick = pick_activation(name, weights.tag_activation(name, tag), forced, source)
        if not wanted:
            # open_clip would download the file all the same: give it what the tag says instead.
            _prefer_preprocess(given, open_clip.get_pretrained_cfg(name, tag))
            return plain(**given, load_weights=False, force_quick_gelu=quick, **extra)
        weights.fetch_tag(name, tag, given.get("cache_dir"))
        return plain(**given, pretrained=tag, force_quick_gelu=quick, **extra)
    if not Path(pretrained).exists():
        raise weights.unknown_weights(name, pretrained)
    found = weights.read_weights(Path(pretrained))
    if found.passport.activation is None:
        log.warning(
            "%s records neither activation nor pooling: running it with %s and the pooling of %s",
            found.path, "QuickGELU" if forced else "the name's activation", name,
        )  # fmt: skip
    quick = pick_activation(name, found.passport.activation, forced, f"{found.path}")
    return create_and_fill(plain, name, found if wanted else None, given, quick, extra)


@contextlib.contextmanager
def expecting_no_weights() -> Iterator[None]:
    """Drop open_clip's warning of a random model where that is asked for, or filled right after."""

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("No pretrained weights loaded")

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _prefer_preprocess(given: dict[str, Any], recorded: Mapping[str, Any]) -> None:
    """Put recorded preprocessing into the arguments, behind what the caller asked for."""
    keep = ("mean", "std", "interpolation", "resize_mode")
    found = {key: recorded[key] for key in keep if recorded.get(key) is not None}
    if found:
        given["force_preprocess_cfg"] = {**found, **(given.get("force_preprocess_cfg") or {})}


def create_and_fill(
    plain: Callable[..., nn.Module],
    name: str,
    found: weights.WeightFile | None,
    given: dict[str, Any],
    quick: bool,
    extra: dict[str, Any],
) -> nn.Module:
    """Build without weights, take the record's pooling and preprocessing, load strictly."""
    passport = found.passport if found else weights.Passport()
    _prefer_preprocess(given, passport.preprocess or {})
    with expecting_no_weights():
        model = plain(**given, force_quick_gelu=quick, **extra)
    if found is None:
        return model
    if passport.last is not None and weights.is_last_name(name) and "vision_cfg" not in extra:
        spec = PoolSpec.from_mapping(passport.last, str(found.path))
        tower.attach_spec(model, spec)
    weights.load_state(model, found, name)
    return model


def _create_saved(
    plain: Callable[..., nn.Module], folder: Path, given: dict[str, Any], extra: dict[str, Any]
) -> nn.Module:
    """Build a model of ours from its saved folder; missing weights are an error, not a warning."""
    found = weights.read_weights(folder)
    forced = bool(given.pop("force_quick_gelu", False))
    if forced and found.passport.activation == "gelu":
        raise UserError(f"{folder} was trained with GELU, and QuickGELU is asked for")
    wanted = bool(given.pop("load_weights", True))
    config = found.passport.model_cfg or {}
    size = config.get("vision_cfg", {}).get("image_size")
    if "timm_model_name" in config.get("vision_cfg", {}) and not given.get("force_image_size"):
        # open_clip does not hand image_size to timm, and would resize only after loading.
        given["force_image_size"] = size
    given.pop("pretrained", None)
    given.pop("require_pretrained", None)
    with expecting_no_weights():
        model = plain(**given, load_weights=False, force_quick_gelu=forced, **extra)
    if wanted:
        weights.load_state(model, found, str(folder))
    return model
