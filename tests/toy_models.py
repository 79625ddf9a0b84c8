"""Towers small enough for tests, of every kind that lazyclip meets; registered with open_clip.

`NATIVE`, `EVA` and `TIMM` are plain models; `LaSt-` before the name gives their LaSt twins, made by
the same hook as the shipped configs. Image 32 px, patch 8, so N = 16 tokens in a 4 x 4 grid.
"""

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.pretrained import _PRETRAINED
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

import lazyclip
from lazyclip import factory
from lazyclip.export import save_model

NATIVE, EVA, TIMM = "Toy-ViT", "Toy-EVA", "Toy-timm"
KINDS = (NATIVE, EVA, TIMM)
SIZE, PATCH, N = 32, 8, 16
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def toy_eva(pretrained: bool = False, **kwargs) -> Eva:
    """timm's EVA02 at toy size: rotary positions, swiglu, norm before the token pool."""
    kwargs.pop("pretrained_cfg", None)
    kwargs.pop("pretrained_cfg_overlay", None)
    kwargs.pop("cache_dir", None)
    kwargs.setdefault("img_size", SIZE)
    return Eva(patch_size=PATCH, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0,
               qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True,
               ref_feat_shape=(4, 4), **kwargs)  # fmt: skip


def toy_timm(pretrained: bool = False, **kwargs) -> TimmViT:
    """timm's ViT at toy size."""
    kwargs.pop("pretrained_cfg", None)
    kwargs.pop("pretrained_cfg_overlay", None)
    kwargs.pop("cache_dir", None)
    kwargs.setdefault("img_size", SIZE)
    return TimmViT(patch_size=PATCH, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, **kwargs)


for entry in (toy_eva, toy_timm):
    if not timm.is_model(entry.__name__):
        timm.models.register_model(entry)


def config_of(kind: str) -> dict:
    """The plain config of a toy model."""
    if kind == NATIVE:
        vision = {
            "image_size": SIZE,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": PATCH,
        }
        return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": dict(TEXT)}
    vision = {
        "image_size": SIZE,
        "timm_model_name": {EVA: "toy_eva", TIMM: "toy_timm"}[kind],
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    }
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": dict(TEXT), "custom_text": True}


def _register() -> None:
    # The folder must live as long as open_clip may rescan it: as long as the process.
    global _FOLDER
    _FOLDER = tempfile.TemporaryDirectory(prefix="toy-models-")
    for kind in KINDS:
        plain = config_of(kind)
        last = copy.deepcopy(plain)
        last["vision_cfg"]["last"] = {"pooling": "last", "k": 0.5}
        for name, config in ((kind, plain), (f"LaSt-{kind}", last)):
            Path(_FOLDER.name, f"{name}.json").write_text(json.dumps(config))
        for name, config in ((f"{kind}-quickgelu", plain), (f"LaSt-{kind}-quickgelu", last)):
            quick = {**config, "quick_gelu": True}
            Path(_FOLDER.name, f"{name}.json").write_text(json.dumps(quick))
    open_clip.add_model_config(_FOLDER.name)


_register()


def make(kind: str, *, seed: int = 0, spread: bool = True, **kwargs) -> nn.Module:
    """A plain toy model with seeded weights, in eval mode.

    `spread` gives every parameter noise, so that no bias or norm is at its trivial initial value.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(kind, **kwargs)
        if spread:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pixels(batch: int = 2, size: int | tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    """Normalised-looking noise, B x 3 x H x W."""
    height, width = (size, size) if isinstance(size, int) else size
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=draw)


def last(model: nn.Module, **how) -> nn.Module:
    """A copy of the model with LaSt pooling."""
    return lazyclip.attach(copy.deepcopy(model), **how)


@contextlib.contextmanager
def tags(name: str, **entries) -> Iterator[None]:
    """Give a model name tags for the time of a test."""
    missing = object()
    before = _PRETRAINED.get(name, missing)
    _PRETRAINED[name] = dict(entries)
    try:
        yield
    finally:
        if before is missing:
            del _PRETRAINED[name]
        else:
            _PRETRAINED[name] = before


def activations(model: nn.Module) -> set[str]:
    """The activation modules of both towers, by class name."""
    names = {type(m).__name__ for m in model.modules()}
    return names & {"QuickGELU", "GELU"}


def weight_file(path: Path, name: str = NATIVE, seed: int = 3) -> Path:
    torch.save(make(name, seed=seed).state_dict(), path)
    return path


def saved(folder: Path, name: str, **how) -> Path:
    """Save a random model; returns its folder."""
    built = factory.build(name, random_weights_seed=4, **how)
    save_model(built.model, built.info, folder)
    return folder
