"""open_clip's submodules, and the check that the installed ones are those we lean on.

Not here: any use of them.
"""

import importlib
import inspect

import open_clip
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

SUPPORTED = ">=3.0,<4"

# By name, not `import open_clip.model`: the package rebinds some of these names to functions.
_model = importlib.import_module("open_clip.model")
_factory = importlib.import_module("open_clip.factory")
_pretrained = importlib.import_module("open_clip.pretrained")
_towers = importlib.import_module("open_clip.timm_model")
_transform = importlib.import_module("open_clip.transform")

_BUILDER_PARAMETERS = ("embed_dim", "vision_cfg", "quick_gelu", "cast_dtype")
_CREATE_PARAMETERS = (
    "model_name", "pretrained", "load_weights", "precision", "device", "force_quick_gelu",
    "force_image_size",
)  # fmt: skip


def check_open_clip() -> None:
    """Check that the installed open_clip is one we fit.

    Raises:
        ImportError: one line that names the installed version and the supported range.
    """
    version = getattr(open_clip, "__version__", "unknown")
    faults = []
    if version.split(".")[0] != "3":
        faults.append("another major version")
    for owner, name, wanted in (
        (_model, "_build_vision_tower", _BUILDER_PARAMETERS),
        (_factory, "create_model", _CREATE_PARAMETERS),
    ):
        function = inspect.unwrap(getattr(owner, name, lambda: None))
        missing = set(wanted) - set(inspect.signature(function).parameters)
        if missing:
            faults.append(f"{name} lacks {', '.join(sorted(missing))}")
    for name in ("_global_pool", "_pool", "_embeds", "forward_intermediates"):
        if not hasattr(VisionTransformer, name):
            faults.append(f"VisionTransformer lacks {name}")
    if not isinstance(getattr(_pretrained, "_PRETRAINED", None), dict):
        faults.append("the table of pretrained tags is gone")
    for name in ("pool", "_pos_embed"):
        if not (hasattr(Eva, name) and hasattr(TimmVisionTransformer, name)):
            faults.append(f"timm towers lack {name}()")
    if faults:
        raise ImportError(
            f"lazyclip does not fit open_clip_torch {version} ({'; '.join(faults)}); "
            f"install open_clip_torch{SUPPORTED} and timm>=1.0.17"
        )
