"""Read what evaluations have left: segmentation, classification, and clip_benchmark's results.

Each result becomes a `Run` that says what was scored, of which weights, and whether it may be
compared. Not here: which runs stand in one table (`layout`), and published figures (`published`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lazyclip.base.config import read_json
from lazyclip.base.errors import UserError
from lazyclip.base.record import shorten

from .commandline import RESULTS

SEGMENTATION, CLASSIFICATION, RETRIEVAL = "segmentation", "classification", "retrieval"
SEG_SCORES = ("miou", "aacc", "macc")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Which weights were scored, and how they were run.

    Fields: name of the model; tag, also a shortened path, "" for none; sha256 of the file, "" where
    it is not known; pooling in words; activation; size in pixels, `64x64`; seed of random weights,
    None for real ones.
    """

    name: str
    tag: str = ""
    sha256: str = ""
    pooling: str = ""
    activation: str = ""
    size: str = ""
    seed: int | None = None

    @property
    def label(self) -> str:
        """Name the weights for people: name and tag, or the run that left them."""
        if self.seed is not None:
            return f"{_short(self.name)} RANDOM (seed {self.seed})"
        return " ".join(_short(word) for word in (self.name, self.tag) if word)

    @property
    def key(self) -> tuple[object, ...]:
        """Tell weights apart: by content where it is known, by name else."""
        who = (self.sha256,) if self.sha256 else (self.name, self.tag, self.seed)
        return (*who, self.pooling, self.activation, self.size)

    def same_as(self, other: "Weights") -> bool:
        """Tell whether two runs scored one model; results of others lack the content's hash."""
        if self.sha256 and other.sha256:
            return self.key == other.key
        names = (self.name, self.tag, self.seed)
        unknown = "" in (self.pooling, other.pooling)
        return names == (other.name, other.tag, other.seed) and (
            unknown or self.pooling == other.pooling
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """One result.

    Fields: kind; file it was read from; dataset; about, what else was scored, in words; scores,
    fractions; images scored, and expected where the benchmark's number is known; complete; method
    and precision; protocol and its hash ("" where there is none); split; classes in order; ended.
    """

    kind: str
    file: Path
    dataset: str
    scores: Mapping[str, float | None]
    weights: Weights
    about: str = ""
    images: int | None = None
    expected: int | None = None
    complete: bool = True
    method: str = ""
    precision: str = ""
    protocol: str = ""
    protocol_hash: str = ""
    split: str = ""
    classes: tuple[str, ...] = ()
    ended: str = ""

    @property
    def comparable(self) -> bool:
        """Tell whether the score may stand beside others: all images, and no random weights."""
        return self.complete and self.weights.seed is None


@dataclasses.dataclass(frozen=True)
class Found:
    """What was read, and the files that are no score, each with the reason."""

    runs: tuple[Run, ...]
    passed_over: tuple[tuple[Path, str], ...]


def _short(place: str) -> str:
    """Shorten a path to the word that tells it: `logs/NAME/model` becomes `NAME`."""
    parts = [p for p in Path(place).parts if p not in ("/", "...", "model", "checkpoints")]
    if not parts or "/" not in place or parts[-1].isdigit():  # ViT-B/16 is no path
        return place
    return parts[-1].removesuffix(".safetensors")


def pooling_words(pooling: Mapping[str, Any]) -> str:
    """Write a pooling in words: `token`, or `last k 0.5 score paper`; what is unusual follows."""
    words = str(pooling.get("pooling", ""))
    if words != "last":
        return words
    usual = {"sigma": None, "kernel": "centred", "eps": 1e-6}
    more = [f"{key} {pooling[key]}" for key in usual if pooling.get(key, usual[key]) != usual[key]]
    return " ".join([f"last k {pooling.get('k')} score {pooling.get('score')}", *more])


def read_weights(model: Mapping[str, Any], config: Mapping[str, Any]) -> Weights:
    """Read the weights from a result's `model` and the `config` of its record."""
    random = bool(model.get("random_weights", config.get("random_weights", False)))
    size = model.get("image_size")
    return Weights(
        name=str(model["name"]),
        tag=str(model.get("pretrained") or ""),
        sha256=str(model.get("weights_sha256") or ""),
        pooling=pooling_words(model.get("pooling") or {}),
        activation=str(model.get("activation") or ""),
        size="x".join(map(str, size)) if size else "",
        seed=int(config.get("seed") or 0) if random else None,
    )


def _parts(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    record = values.get("record") or {}
    return record, record.get("config") or {}


def _fraction(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, not a number")
    return float(value)


def _segmentation(values: Mapping[str, Any], file: Path) -> Run:
    record, config = _parts(values)
    protocol = values["protocol"]
    return Run(
        kind=SEGMENTATION,
        file=file,
        dataset=str(values["dataset"]),
        scores={name: _fraction(values.get(name), name) for name in SEG_SCORES},
        weights=read_weights(values["model"], config),
        images=values.get("images"),
        expected=values.get("expected_images"),
        complete=bool(values.get("complete", config.get("limit") is None)),
        method=str(values["method"]),
        precision=str(values.get("precision") or ""),
        protocol=str(protocol["name"]),
        protocol_hash=str(protocol["hash"]),
        split=str(protocol.get("split") or ""),
        classes=tuple(values.get("iou") or ()),
        ended=str(record.get("end") or record.get("start") or ""),
    )


def _data_words(pattern: str) -> str:
    """Name shards by the folders they lie in: `../x/tiny/val/{00000..00001}.tar` is `tiny/val`."""
    first = re.split(r"::|,", pattern)[0]
    parts = [p for p in Path(first).parts if p not in ("/", "..", "...", ".")]
    kept = parts[:-1] if parts and re.search(r"[{*?\[]|\.t(ar|gz)", parts[-1]) else parts
    return "/".join(kept[-2:]) or first


def _classification(values: Mapping[str, Any], file: Path) -> Run:
    record, config = _parts(values)
    classes = values.get("classes") or {}
    count = classes.get("n") or (round(1 / values["chance"]) if values["chance"] else "?")
    prompts = shorten(values.get("templates", "?"))
    return Run(
        kind=CLASSIFICATION,
        file=file,
        dataset=_data_words(str(config.get("val_data") or file.parent)),
        scores={name: values.get(name) for name in ("top1", "top5")},
        weights=read_weights(values["model"], config),
        about=f"{count} classes, prompts {prompts}, eval.zeroshot_cls",
        images=values.get("n"),
        complete=config.get("limit") is None and not values.get("skipped"),
        precision=str(config.get("precision") or ""),
        ended=str(record.get("end") or record.get("start") or ""),
    )


def _benchmark(values: Mapping[str, Any], file: Path) -> Run:
    """Read a result of clip_benchmark, ours (with `model_info`) or its own."""
    record, config = _parts(values)
    task = str(values["task"])
    model = values.get("model_info") or {
        "name": values["model"],
        "pretrained": values["pretrained"],
    }
    names = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_class_recall"}
    scores = {names.get(k, k): v for k, v in values["metrics"].items()}
    return Run(
        kind=RETRIEVAL if "retrieval" in task else CLASSIFICATION,
        file=file,
        dataset=str(values["dataset"]),
        # NaN, which clip_benchmark itself writes, is no score.
        scores={k: v for k, v in scores.items() if isinstance(v, float | int) and v == v},
        weights=read_weights(model, config),
        about=f"{task.removeprefix('zeroshot_')}, clip_benchmark",
        precision=str(config.get("precision") or ""),
        ended=str(record.get("end") or record.get("start") or ""),
    )


def _reader(values: Mapping[str, Any]) -> Callable[[Mapping[str, Any], Path], Run] | None:
    keys = set(values)
    if {"miou", "protocol", "method", "model", "dataset"} <= keys:
        return _segmentation
    if {"top1", "chance", "model"} <= keys:
        return _classification
    if {"dataset", "model", "pretrained", "task", "metrics"} <= keys:
        return _benchmark
    return None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give folders that hold {RESULTS}, or such files")
    return sorted(path.rglob("*.json"))


def _read(file: Path) -> Run | str:
    """Read one file; returns why it is no score where it is none."""
    try:
        values = read_json(file)
        read = _reader(values)
        return read(values, file) if read else "holds no score that is tabled"
    except UserError as error:
        return str(error).removeprefix(f"{file}: ")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"is not in the form expected ({type(error).__name__}: {error})"


def collect(paths: Iterable[Path]) -> Found:
    """Read every result below the paths, each file once.

    Args:
        paths: result folders (searched through), or files.

    Raises:
        UserError: a path that is not there, a named file that is no result, or no result at all.
    """
    runs: list[Run] = []
    passed: list[tuple[Path, str]] = []
    seen: set[Path] = set()
    for path in paths:
        for file in _files(path):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            got = _read(file)
            if isinstance(got, Run):
                runs.append(got)
            elif path == file:
                raise UserError(f"{file} {got}; give a {RESULTS} of an evaluation")
            elif file.name == RESULTS or "not in the form" in got:
                passed.append((file, got))
    if not runs:
        more = f"; {len(passed)} files hold none, such as {passed[0][0]}" if passed else ""
        raise UserError(
            f"no scores below {', '.join(map(str, paths))}{more}; "
            "make some with python -m eval.zeroshot_seg --output DIR"
        )
    return Found(tuple(runs), tuple(passed))


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Lay runs out long: one line a score, a fraction; None where the result has none."""
    lines = []
    for run in runs:
        about = {
            "kind": run.kind,
            "dataset": run.dataset,
            "weights": run.weights.label,
            "model": run.weights.name,
            "tag": run.weights.tag,
            "weights_sha256": run.weights.sha256,
            "activation": run.weights.activation,
            "image_size": run.weights.size,
            "pooling": run.weights.pooling,
            "method": run.method,
            "precision": run.precision,
            "protocol": run.protocol,
            "protocol_hash": run.protocol_hash,
            "split": run.split,
            "about": run.about,
            "images": run.images,
            "expected_images": run.expected,
            "complete": run.complete,
            "random_weights": run.weights.seed is not None,
            "ended": run.ended,
            "file": shorten(str(run.file)),
        }
        lines += [{**about, "score": k, "value": v} for k, v in run.scores.items()]
    table = pd.DataFrame(lines)
    for name in ("images", "expected_images"):
        table[name] = table[name].astype("Int64")
    table["value"] = table["value"].astype("float64")
    return table
