"""Write a model as a folder that open_clip reads: config and weights, no pickle.

`open_clip.create_model("local-dir:FOLDER")` builds it once lazyclip is imported; without lazyclip
the weights load into the plain tower by file, and the config is refused (its key `last`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lazyclip import bridge
from lazyclip.base.checkpoint import with_usual_mode
from lazyclip.base.config import write_json
from lazyclip.factory import ModelInfo, model_config
from lazyclip.weights import CONFIG_FILE, METADATA_KEY, WEIGHT_FILE


def config_of(model: nn.Module, info: ModelInfo) -> dict[str, Any]:
    """Return the content of `open_clip_config.json` for a model."""
    return {"model_cfg": model_config(info), "preprocess_cfg": bridge.preprocess_of(model)}


def save_model(
    model: nn.Module, info: ModelInfo, folder: Path, record: Mapping[str, Any] | None = None
) -> None:
    """Save weights (float32) and config into a folder, each file whole or not at all.

    Args:
        model: the bare model, not wrapped by DDP or compile.
        info: of the model, from `factory.build`.
        folder: made when missing.
        record: how the weights came about; written as `record.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(model, info)
    state = {
        key: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in model.state_dict().items()
    }
    # Tensors that share memory are refused by the format: each gets its own.
    state = {key: value.clone() if _shared(value, state) else value for key, value in state.items()}
    part = folder / (WEIGHT_FILE + ".part")
    with with_usual_mode(part):
        save_file(state, str(part), metadata={"format": "pt", METADATA_KEY: json.dumps(config)})
    part.replace(folder / WEIGHT_FILE)
    write_json(folder / CONFIG_FILE, config)
    if record is not None:
        write_json(folder / "record.json", record)


def _shared(value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> bool:
    return sum(value.data_ptr() == other.data_ptr() for other in state.values()) > 1
