"""LaSt names in open_clip's factory, and `load` and `build` for our own commands.

`register` runs when lazyclip is imported: configs, tags, and two hooks (see `bridge.install`).
Not here: what `create_model` does for our names (`creation`), weight files (`weights`).
"""

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from lazyclip import bridge, tower, weights
from lazyclip.base.config import read_json
from lazyclip.base.errors import UserError, unknown
from lazyclip.base.record import shorten
from lazyclip.base.resources import config_names, config_root
from lazyclip.creation import (
    LOCAL,
    create_and_fill,
    expecting_no_weights,
    make_create,
    pick_activation,
)
from lazyclip.pooling import PoolSpec

log = logging.getLogger(__name__)
HUB = "hf-hub:"


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a result says of the model that made it.

    Fields: activation `gelu` or `quickgelu`; image_size and grid (h, w); width D; embed_dim E;
    weights_sha256 None for random weights.
    """

    name: str
    pretrained: str | None
    pooling: Mapping[str, object]
    activation: str
    image_size: tuple[int, int]
    patch_size: int
    grid: tuple[int, int]
    width: int
    embed_dim: int
    context_length: int
    parameters: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights_sha256: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; a path as name is shortened, results carry none whole."""
        fields = {key: shorten(value) for key, value in dataclasses.asdict(self).items()}
        return fields


@dataclasses.dataclass(frozen=True)
class Built:
    """A model with its transforms (PIL image -> 3 x H x W) and tokenizer (texts -> B x context)."""

    model: nn.Module
    preprocess_train: Callable[..., torch.Tensor]
    preprocess_val: Callable[..., torch.Tensor]
    tokenizer: Callable[..., torch.Tensor]
    info: ModelInfo


def register() -> list[str]:
    """Make open_clip know the LaSt names; a second call changes nothing.

    Returns:
        The registered model names.

    Raises:
        ImportError: an open_clip that does not fit, or a name that open_clip already uses.
    """
    bridge.install(tower.attach_mapping, make_create)
    names = config_names("models", ".json")
    ours = {name: read_json(config_root() / "models" / f"{name}.json") for name in names}
    for name, config in ours.items():
        if open_clip.get_model_config(name) not in (None, config):
            raise ImportError(f"open_clip already has another model named {name}")
    open_clip.add_model_config(config_root() / "models")
    # add_model_config passes over what it does not like in silence.
    lost = sorted(set(names) - set(open_clip.list_models()))
    if lost:
        raise ImportError(f"open_clip did not take the configs {', '.join(lost)}")
    for name in names:
        if weights.is_last_name(name):
            bridge.add_tags(name, weights.last_tags(name))
    return names


def known_name(name: str) -> str:
    """Return the name open_clip is to be asked for; unknown ones raise, nearest first."""
    if name.startswith((LOCAL, HUB)):
        return name
    for folder in (Path(name), Path(name) / "model"):  # a saved model, or the run that left one
        if (folder / weights.CONFIG_FILE).is_file():
            return f"{LOCAL}{folder}"
    cleaned = name.replace("/", "-")
    if cleaned not in open_clip.list_models():
        raise unknown("model", name, open_clip.list_models(), "pass --model NAME or a saved folder")
    return cleaned


def build(
    name: str,
    pretrained: str | None = None,
    *,
    device: str = "cpu",
    image_size: int | None = None,
    last: Mapping[str, object] | None = None,
    random_weights_seed: int | None = None,
    force_quick_gelu: bool = False,
) -> Built:
    """Build a model by name with its transforms and tokenizer.

    Args:
        name: a name of open_clip or of ours, or a saved model's folder.
        pretrained: a tag, a weight file, or a saved model's folder; None: random weights.
        device: where the model goes. `meta`: shapes only, no memory; weights are neither read nor
            fetched, and only their tag or record says which activation.
        image_size: another input size in pixels; positions are interpolated.
        last: single keys of the pooling that override the name's or the record's.
        random_weights_seed: seed of the random weights (default 0); no global state is touched.
        force_quick_gelu: ask for QuickGELU where neither tag nor record says it.

    Raises:
        UserError: unknown name or tag, a file that does not fit, K > N, contradicting activations.
    """
    asked = known_name(name)
    if asked.startswith((LOCAL, HUB)) and pretrained:
        raise UserError(f"{name} is a saved model with weights; leave --pretrained out")
    shapes = torch.device("meta") if device == "meta" else contextlib.nullcontext()
    with shapes, torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_weights_seed or 0)
        # Random weights are drawn before an own file is loaded: the file decides in the end.
        if device == "meta":
            model, loaded = _create_shapes(asked, pretrained, image_size, force_quick_gelu), None
        else:
            model, loaded = _create(asked, pretrained, image_size, force_quick_gelu)
    if last:
        current = tower.pooling_of(model).to_dict()
        tower.attach_spec(model, PoolSpec.from_mapping({**current, **last}, "--last-*"))
    model = model.to(device).eval()
    train, val = bridge.transforms_of(model)
    # Before the tokenizer, which some models fetch: a tower that does not fit is refused at once.
    info = _describe(model, name, pretrained, loaded)
    before = weights.trained_size(name, pretrained)
    if before not in (None, info.image_size) and device != "meta":
        log.info("positions are interpolated, the weights have those of %d x %d px", *before)
    return Built(
        model=model,
        preprocess_train=train,
        preprocess_val=val,
        tokenizer=_tokenizer(asked),
        info=info,
    )


def _tokenizer(asked: str) -> Callable[..., torch.Tensor]:
    try:
        with weights.hub_in_one_try():
            return open_clip.get_tokenizer(asked)
    except OSError as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0][:200]
        raise UserError(
            f"the tokenizer of {asked} could not be downloaded ({reason}); run once where there is "
            "a network, or copy the hub's cache"
        ) from error


def _create(
    asked: str, pretrained: str | None, image_size: int | None, force_quick_gelu: bool
) -> tuple[nn.Module, Path | None]:
    """Create a model through open_clip; returns it with the weight file it holds, if any."""
    kwargs: dict[str, Any] = {
        "force_image_size": image_size,
        "force_quick_gelu": force_quick_gelu,
        "output_dict": True,
    }
    if asked.startswith(LOCAL):
        model = open_clip.create_model(asked, **kwargs)
        return model, weights.find_weight_file(Path(asked.removeprefix(LOCAL)))
    if asked.startswith(HUB):
        return _create_from_hub(asked, kwargs), None
    if not pretrained:
        with expecting_no_weights():
            return open_clip.create_model(asked, **kwargs), None
    tag = weights.clean_tag(pretrained)
    if open_clip.is_pretrained_cfg(asked, tag):
        quick = weights.tag_activation(asked, tag) == "quickgelu"
        if not weights.is_last_name(asked):
            # The passport holds for the plain names too in our own commands.
            kwargs["force_quick_gelu"] = pick_activation(
                asked, "quickgelu" if quick else "gelu", force_quick_gelu, f"the tag '{tag}'"
            )
        file = weights.fetch_tag(asked, tag)
        return open_clip.create_model(asked, pretrained=tag, **kwargs), file
    if weights.is_last_name(asked):
        model = open_clip.create_model(asked, pretrained=pretrained, **kwargs)
        return model, weights.find_weight_file(Path(pretrained))
    if not Path(pretrained).exists():
        raise weights.unknown_weights(asked, pretrained)
    found = weights.read_weights(Path(pretrained))
    quick = pick_activation(asked, found.passport.activation, force_quick_gelu, str(found.path))
    kwargs.pop("force_quick_gelu")
    model = create_and_fill(
        open_clip.create_model, asked, found, {"model_name": asked, **kwargs}, quick, {}
    )
    if found.passport.last is None:
        log.warning("%s records neither activation nor pooling", found.path)
    elif found.passport.last.get("pooling") != "token":
        log.warning(
            "%s was trained with pooling '%s'; the plain %s pools by its CLS token",
            found.path, found.passport.last.get("pooling"), asked,
        )  # fmt: skip
    return model, found.path


def _create_shapes(
    asked: str, pretrained: str | None, image_size: int | None, force_quick_gelu: bool
) -> nn.Module:
    """Create a model without weights, with the activation that its weights would have."""
    if asked.startswith(HUB):
        raise UserError(f"{asked} is not planned for without fetching it; download it first")
    quick = force_quick_gelu
    if pretrained:
        tag = weights.clean_tag(pretrained)
        if open_clip.is_pretrained_cfg(asked, tag):
            recorded: str | None = weights.tag_activation(asked, tag)
        elif Path(pretrained).exists():
            file = weights.find_weight_file(Path(pretrained))
            recorded = weights.read_passport(file).activation
        else:
            raise weights.unknown_weights(asked, pretrained)
        quick = pick_activation(asked, recorded, force_quick_gelu, f"'{pretrained}'")
    with expecting_no_weights():
        return open_clip.create_model(
            asked, force_image_size=image_size, force_quick_gelu=quick, output_dict=True,
            device="meta", load_weights=False,
        )  # fmt: skip


def _create_from_hub(asked: str, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        with weights.hub_in_one_try():
            return open_clip.create_model(asked, require_pretrained=True, **kwargs)
    except (RuntimeError, OSError) as error:  # no network, no such repository, no weights in it
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0][:200]
        raise UserError(
            f"{asked} could not be loaded ({reason}); download that folder where there is a "
            "network and pass its path as --model"
        ) from error


def _describe(
    model: nn.Module, name: str, pretrained: str | None, loaded: Path | None
) -> ModelInfo:
    trunk = bridge.trunk_of(model)
    size, patch, grid = bridge.geometry(trunk)
    preprocess = bridge.preprocess_of(model)
    with torch.no_grad():
        probe = torch.zeros(1, bridge.width_of(trunk), device=next(model.parameters()).device)
        embed_dim = tower.project(model, probe).shape[-1]
    return ModelInfo(
        name=name,
        pretrained=pretrained,
        pooling=tower.pooling_of(model).to_dict(),
        activation=bridge.activation_of(model),
        image_size=size,
        patch_size=patch[0],
        grid=grid,
        width=bridge.width_of(trunk),
        embed_dim=embed_dim,
        context_length=bridge.context_length_of(model),
        parameters=sum(p.numel() for p in model.parameters()),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        weights_sha256=weights.file_sha256(loaded) if loaded else None,
    )


def load(
    name: str, pretrained: str | None = None
) -> tuple[nn.Module, Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Load a model for use: in eval mode, with its preprocessing and tokenizer.

    Args:
        name: a model name, or a saved model's folder.
        pretrained: a tag, a weight file or a saved model's folder; None: random weights.

    Returns:
        model, preprocess (PIL image -> 3 x H x W), tokenizer (texts -> B x context).
    """
    built = build(name, pretrained)
    return built.model, built.preprocess_val, built.tokenizer


def model_config(info: ModelInfo) -> dict[str, Any]:
    """Return the config that rebuilds a model: open_clip's form plus `vision_cfg.last`."""
    asked = known_name(info.name)
    config = copy.deepcopy(open_clip.get_model_config(asked))
    if config is None:
        raise UserError(f"no config is known for {info.name}")
    vision = config["vision_cfg"]
    plain_name = "last" not in vision and info.pooling["pooling"] == "token"
    if not plain_name:
        vision["last"] = dict(info.pooling)
    if tuple(info.image_size) != _square(vision.get("image_size", 224)):
        h, w = info.image_size
        vision["image_size"] = h if h == w else [h, w]
    config["quick_gelu"] = info.activation == "quickgelu"
    if not config["quick_gelu"]:
        config.pop("quick_gelu")
    return config


def _square(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
