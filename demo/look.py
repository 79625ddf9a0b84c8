"""What the demo measures beyond the evaluation's commands, for one model.

The "painted" reference (each picture filled with the model's own image-level class), how well the
patch score tells object from ground, where the votes fall, and the maps of example pictures.
Not here: the scores of the table that have a command of their own.

    python -m demo.look --model out/demo/logs/last/model --world out/demo/world --output FOLDER
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from eval.models import add_model_flags, load_from_flags
from eval.segmentation import confusion
from eval.segmentation.readers.labels import IGNORE, to_ids
from eval.segmentation.readers.voc import open_voc
from lazyclip import encode_tokens, project, vote_count
from lazyclip.base import logs
from lazyclip.base.config import write_json
from lazyclip.base.errors import cli
from lazyclip.base.pictures import FILE_FORMATS, open_picture
from lazyclip.base.record import make_record
from lazyclip.factory import Built
from lazyclip.scores import patch_score
from lazyclip.tower import pooling_of
from lazyclip.zeroshot import class_logits, read_classes, templates, text_features

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
FOLDERS = {"one": "ToyOne", "two": "Toy"}  # objects in a picture -> folder of the world


@dataclasses.dataclass(frozen=True)
class Views:
    """What a model makes of n pictures of one size.

    Attributes:
        own: cosine of each patch and the model's global feature, n x h x w.
        text: cosine of each patch and each class's text, n x C x h x w.
        votes: vote counts, n x h x w; None for a pooling without them.
        classes: image-level class of each picture, n.
    """

    own: Array
    text: Array
    votes: Array | None
    classes: Labels


@torch.no_grad()
def view(built: Built, files: Sequence[Path], text: torch.Tensor, batch: int = 100) -> Views:
    """Encode pictures; `text` holds the class features, C x E."""
    spec = pooling_of(built.model)
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(files), batch):
        pictures = []
        for file in files[start : start + batch]:
            with open_picture(file, FILE_FORMATS) as opened:
                pictures.append(built.preprocess_val(opened.convert("RGB")))
        tokens = encode_tokens(built.model, torch.stack(pictures))
        patches, (h, w) = tokens.patches, tokens.grid
        B = len(patches)
        own = patch_score(patches, tokens.pooled)
        dense = F.normalize(project(built.model, patches), dim=-1)  # B x N x E
        cosines = (dense @ text.T).transpose(1, 2)  # B x C x N
        logits = class_logits(
            project(built.model, tokens.pooled), text, range(len(text)), len(text)
        )
        votes = torch.zeros(B, 0)
        if spec.pooling == "last":
            votes = vote_count(
                patches,
                spec.k,
                score=spec.score,
                sigma=spec.sigma,
                kernel=spec.kernel,
                eps=spec.eps,
            ).reshape(B, h, w)
        parts.append(
            (own.reshape(B, h, w), cosines.reshape(B, -1, h, w), votes, logits.argmax(dim=1))
        )
    own, cosines, votes, classes = (torch.cat(column) for column in zip(*parts, strict=True))
    return Views(
        own=own.double().numpy(),
        text=cosines.double().numpy(),
        votes=votes.double().numpy() if spec.pooling == "last" else None,
        classes=classes.numpy(),
    )


def auroc(scores: Array, positive: npt.NDArray[np.bool_]) -> float | None:
    """Return the chance that a positive outranks a negative (ties half); None without both."""
    above, below = scores[positive], scores[~positive]
    if not (above.size and below.size):
        return None
    greater = (above[:, None] > below[None]).mean() + 0.5 * (above[:, None] == below[None]).mean()
    return float(greater)


def object_share(labels: Labels, grid: tuple[int, int]) -> Array:
    """Return the share of each patch that carries a label, n x h x w, from label maps n x H x W."""
    n, H, W = labels.shape
    h, w = grid
    blocks = (labels != IGNORE).reshape(n, h, H // h, w, W // w)
    return blocks.mean(axis=(2, 4))


def painted_miou(labels: Labels, classes: Labels, count: int) -> float | None:
    """Score pictures filled with one class each: labels n x H x W, classes n."""
    counts = sum(
        (
            confusion.count(label, np.full_like(label, guess), count)
            for label, guess in zip(labels, classes, strict=True)
        ),
        start=np.zeros((count, count), np.int64),
    )
    return confusion.score(counts).miou


def guess_miou(labels: Labels, count: int) -> float:
    """Return the mIoU expected of labels drawn evenly at random for each pixel."""
    pixels = np.bincount(labels[labels != IGNORE], minlength=count).astype(np.float64)
    hits = pixels / count
    union = pixels.sum() / count + pixels - hits
    return float((hits / union)[pixels > 0].mean())


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _measure(views: Views, labels: Labels, classes: int) -> dict[str, float | None]:
    grid = (views.own.shape[1], views.own.shape[2])
    on_object = object_share(labels, grid) > 0.5
    measured = {
        "painted": painted_miou(labels, views.classes, classes),
        "guess": guess_miou(labels, classes),
        "auroc": _mean([auroc(s, o) for s, o in zip(views.own, on_object, strict=True)]),
        "object_patches": float(on_object.mean()),
        "votes": None,
    }
    if views.votes is not None:
        measured["votes"] = float((views.votes * on_object).sum() / views.votes.sum())
    return measured


def _object_classes(label: Labels) -> list[int]:
    """List the classes in a label map, from left to right."""
    present = [int(c) for c in np.unique(label) if c != IGNORE]
    return sorted(present, key=lambda c: float(np.argwhere(label == c)[:, 1].mean()))


def _save_maps(file: Path, views: Views, ids: Sequence[str], labels: Labels) -> None:
    classes = np.array([_object_classes(label) for label in labels])  # n x objects
    rows = np.arange(len(ids))[:, None]
    arrays = {
        "ids": np.array(ids),
        "own": views.own[: len(ids)],
        "text": views.text[rows, classes],  # n x objects x h x w
        "classes": classes,
    }
    if views.votes is not None:
        arrays["votes"] = views.votes[: len(ids)]
    np.savez(file, **arrays)


def run(argv: Sequence[str] | None = None) -> None:
    """Measure one model on both segmentation sets of the world."""
    parser = argparse.ArgumentParser(prog="python -m demo.look", description=run.__doc__)
    parser.add_argument("--world", type=Path, required=True, help="folder of demo.world")
    parser.add_argument("--maps", type=int, default=6, help="pictures of each set to keep maps of")
    parser.add_argument("--output", type=Path, required=True, help="folder for results and maps")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    logs.setup()
    built = load_from_flags(args)
    names = read_classes(args.world / "classes.txt")
    text = text_features(
        built.model, built.tokenizer, names.queries, templates(str(args.world / "templates.txt"))
    )
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, object] = {}
    for objects, folder in FOLDERS.items():
        reader = open_voc(args.world / "seg", f"VOCdevkit/{folder}", "val")
        labels = np.stack(
            [
                to_ids(reader.read(i)[1], "zero_ignored", len(names), reader.label_file(i))
                for i in reader.ids
            ]
        )
        views = view(built, [reader.image_file(i) for i in reader.ids], text)
        results[objects] = _measure(views, labels, len(names))
        kept = reader.ids[: args.maps]
        _save_maps(args.output / f"{objects}.npz", views, kept, labels[: len(kept)])
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    results["record"] = make_record("demo.look", argv, settings, device=args.device)
    write_json(args.output / "results.json", results)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
