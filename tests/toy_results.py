"""Result files as the evaluations write them, made by hand: only what a table reads."""

import json
from collections.abc import Mapping
from pathlib import Path

from eval.segmentation.protocol import read_task

OPENAI = {
    "name": "ViT-B-16-quickgelu",
    "pretrained": "openai",
    "pooling": {"pooling": "token"},
    "activation": "quickgelu",
    "image_size": [224, 224],
    "weights_sha256": "a" * 64,
    "random_weights": False,
}
SAVED = {
    **OPENAI,
    "name": ".../mine/model",
    "pretrained": None,
    "pooling": {"pooling": "last", "k": 0.5, "score": "paper", "sigma": None},
    "weights_sha256": "b" * 64,
}
RANDOM = {**OPENAI, "pretrained": None, "weights_sha256": None, "random_weights": True}


def put(file: Path, values: Mapping[str, object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))
    return file.parent


def seg(
    folder: Path,
    dataset: str = "voc20",
    miou: float | None = 0.494,
    model: Mapping[str, object] = OPENAI,
    method: str = "vanilla",
    protocol: str = "sclip",
    protocol_hash: str | None = None,
    images: int = 1449,
    complete: bool = True,
    end: str = "2026-01-01T00:00:00Z",
) -> Path:
    """Write a segmentation result; the hash is that of the shipped protocol where none is given."""
    hashed = protocol_hash or read_task(dataset, protocol).protocol.hash
    return put(folder / "results.json", {
        "dataset": dataset, "miou": miou, "aacc": 0.5, "macc": 0.5,
        "iou": {"aeroplane": 0.5, "bicycle": None},
        "protocol": {"name": protocol, "hash": hashed, "split": "val"},
        "images": images, "expected_images": 1449, "complete": complete,
        "method": method, "precision": "fp32", "model": dict(model),
        "record": {"config": {"seed": 3}, "start": end, "end": end},
    })  # fmt: skip


def cls(
    folder: Path,
    top1: float = 0.6834,
    model: Mapping[str, object] = OPENAI,
    limit: int | None = None,
    end: str = "2026-01-01T00:00:00Z",
) -> Path:
    """Write a result of zero-shot classification."""
    config = {"val_data": "in1k/val/{00000..00009}.tar", "limit": limit, "precision": "fp32",
              "random_weights": model["weights_sha256"] is None, "seed": 3}  # fmt: skip
    return put(folder / "results.json", {
        "top1": top1, "top5": 0.9, "n": 50000, "chance": 0.001, "skipped": {},
        "classes": {"n": 1000}, "templates": "openai",
        "model": {k: v for k, v in model.items() if k != "random_weights"},
        "record": {"config": config, "end": end},
    })  # fmt: skip


def bench(file: Path, recall: float = 0.5, model: Mapping[str, object] | None = OPENAI) -> Path:
    """Write a retrieval result of clip_benchmark, with `model` None as its own command does."""
    values = {
        "dataset": "wds/pairs", "model": "ViT-B-16-quickgelu", "pretrained": "openai",
        "task": "zeroshot_retrieval", "language": "en",
        "metrics": {"image_retrieval_recall@5": recall, "text_retrieval_recall@5": float("nan")},
    }  # fmt: skip
    if model:
        values["model_info"] = {k: v for k, v in model.items() if k != "random_weights"}
    return put(file, values)
