"""clip_benchmark's own command line with lazyclip's models: `eval`, `build`, and `--from-shards`.

    python -m eval.clip_bench --from-shards "val/{00000..00001}.tar" --classes classes.json \
        --output data/val
    python -m eval.clip_bench eval --dataset wds/val --dataset_root data/val \
        --model logs/NAME/model --output logs/bench/val.json

Models are built as everywhere here, so names, tags, files and folders of ours work, and the
activation is that of the weights. Not here: the scores (clip_benchmark's), and the writing of data
sets (`wds_form`).
"""

import argparse
import contextlib
import io
import json
import logging
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from lazyclip.base.config import read_json, write_json
from lazyclip.base.errors import UserError, cli
from lazyclip.base.logs import setup
from lazyclip.base.record import make_record, shorten, utc_now
from lazyclip.factory import Built, build, known_name
from lazyclip.weights import CONFIG_FILE

from .commandline import Parser
from .wds_form import add_shard_flags, write_wds

log = logging.getLogger(__name__)
MODULE = "eval.clip_bench"
EXAMPLE = (
    f"python -m {MODULE} eval --dataset wds/val --dataset_root data/val --model LaSt-ViT-B-16 "
    "--pretrained openai --output logs/bench/val.json"
)
USAGE = f"""\
usage: python -m {MODULE} eval FLAGS     clip_benchmark's own flags: eval --help
       python -m {MODULE} build FILES    one csv from its results: build --help
       python -m {MODULE} --from-shards SHARDS --output ROOT    write a data set it reads

of ours, with eval: --random-weights (seed: --seed), --force-quick-gelu
example: {EXAMPLE}"""
OWN = ("model_info", "record")  # keys that clip_benchmark's csv has no use for


def load_benchmark() -> ModuleType:
    """Import clip_benchmark's command line.

    Raises:
        UserError: it is not installed, or lacks what it imports without declaring it.
    """
    try:
        from clip_benchmark import cli as benchmark
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "clip_benchmark":
            raise UserError("clip_benchmark is not installed; pip install clip-benchmark") from None
        raise UserError(
            f"clip_benchmark cannot be imported: it needs '{error.name}', which it does not "
            f"install; pip install {error.name}"
        ) from None
    found: ModuleType = benchmark
    return found


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Compute top-k accuracies, as clip_benchmark's function of this name means to.

    Args:
        output: logits, B x C.
        target: class indices, B.
        topk: the counts k.
    """
    best = output.topk(max(topk), dim=1).indices == target[:, None]
    return [best[:, :k].any(dim=1).double().mean().item() for k in topk]


def needs_accuracy(theirs: Callable[..., list[float]]) -> bool:
    """Tell whether clip_benchmark's `accuracy` fails here.

    Release 1.6.2 calls float() on an array of one element, which numpy refuses from 2.4 on.
    """
    try:
        got = theirs(torch.eye(2), torch.tensor([0, 1]), topk=(1,))
    except TypeError:
        return True
    return got != [1.0]


def clean(value: object) -> object:
    """Make a value fit for JSON: what is not finite becomes None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


class Bench:
    """clip_benchmark with our models: what stands in its module for the time of one command."""

    def __init__(self, own: argparse.Namespace, argv: Sequence[str] | None) -> None:
        """Take our own flags and the command, which goes into each result."""
        self.own, self.argv = own, argv
        self.built: Built | None = None
        self.args = argparse.Namespace()
        self.start = utc_now()

    def load(
        self, model_type: str, model_name: str, pretrained: str, cache_dir: str | None, device: str
    ) -> tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor]]:
        """Build a model, in place of clip_benchmark's `load_clip`."""
        saved = known_name(model_name) != model_name.replace("/", "-")
        if self.own.random_weights and (pretrained or saved):
            raise UserError("--random-weights and given weights exclude each other; leave one out")
        if not (pretrained or saved or self.own.random_weights):
            raise UserError(
                f"--model {model_name} has no weights: pass --pretrained TAG, a weight file or a "
                "saved folder, or --random-weights"
            )
        built = build(
            model_name,
            pretrained or None,
            device=device,
            random_weights_seed=self.args.seed,
            force_quick_gelu=self.own.force_quick_gelu,
        )
        log.info(
            "model %s, weights %s, pooling %s, activation %s",
            built.info.name, pretrained or ("random" if self.own.random_weights else "its own"),
            built.info.pooling, built.info.activation,
        )  # fmt: skip
        self.built = built
        return built.model, built.preprocess_val, built.tokenizer

    def dump(self, result: Mapping[str, Any], stream: IO[str]) -> None:
        """Write a result, in place of `json.dump`: no NaN, and what made it beside the scores."""
        config = {**vars(self.args), "random_weights": self.own.random_weights}
        config["precision"] = self.precision
        whole = {
            **{key: shorten(clean(value)) for key, value in result.items()},
            "model_info": self.built.info.to_dict() if self.built else None,
            "record": {
                **make_record(MODULE, self.argv, config, device=self.args.device),
                "start": self.start,
                "end": utc_now(),
            },
        }
        json.dump(whole, stream, indent=1, ensure_ascii=False, allow_nan=False, default=str)

    @property
    def precision(self) -> str:
        """Name what the towers run in."""
        if not self.args.amp:
            return "fp32"
        return "amp_fp16" if str(self.args.device).startswith("cuda") else "amp_bf16"

    def run(self, theirs: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
        """Run one model on one data set, in place of clip_benchmark's `run`."""
        self.args, self.start = args, utc_now()
        if not torch.cuda.is_available() and args.amp:
            log.info("on the CPU towers run in fp32 (clip_benchmark alone would use bf16)")
            args.amp = False
        _check_wds(args)
        # A folder's name would make folders of the result's name.
        args.output = args.output.replace("{model}", _slug(args.model))
        args.output = args.output.replace("{pretrained}", _slug(args.pretrained))
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        theirs(args)


def _slug(place: str) -> str:
    """Name a model or its weights in a file's name; `logs/NAME/model` becomes `NAME`."""
    if not (Path(place).exists() and place):
        return re.sub(r"[^\w.-]+", "_", place)
    parts = [p for p in Path(place).parts if p not in ("/", "model", "checkpoints")]
    return re.sub(r"[^\w.-]+", "_", parts[-1] if parts else "model")


def _check_wds(args: argparse.Namespace) -> None:
    """Check a local `wds/` data set before a model is built for it; no more workers than shards."""
    if not args.dataset.startswith("wds/"):
        return
    name = args.dataset.removeprefix("wds/")
    root = args.dataset_root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
    if "://" in root or args.skip_load:
        return
    file = Path(root) / args.split / "nshards.txt"
    try:
        shards = int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--dataset_root {root} is no data set in wds form: {file} is missing or holds no "
            f"number; write one with python -m {MODULE} --from-shards SHARDS --output {root}"
        ) from None
    kind = Path(root) / "dataset_type.txt"
    retrieval = kind.is_file() and kind.read_text(encoding="utf-8").strip() == "retrieval"
    if retrieval and args.task == "auto":
        args.task = "zeroshot_retrieval"
    # webdataset refuses a worker that gets no shard.
    args.num_workers = min(args.num_workers, shards)


@contextlib.contextmanager
def in_place_of(module: object, **ours: object) -> Iterator[None]:
    """Put objects into a module's names for a time."""
    before = {name: getattr(module, name) for name in ours}
    try:
        for name, value in ours.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def parse_theirs(benchmark: ModuleType, words: Sequence[str]) -> argparse.Namespace:
    """Parse with clip_benchmark's own parser; a mistake becomes one line.

    Raises:
        UserError: what its parser refuses.
    """
    said = io.StringIO()
    with in_place_of(sys, argv=[MODULE, *words]), contextlib.redirect_stderr(said):
        try:
            _, args = benchmark.get_parser_args()
        except SystemExit as stop:
            if not stop.code:
                raise
            reason = said.getvalue().strip().splitlines()[-1].split("error: ")[-1]
            raise UserError(f"{reason}; an example: {EXAMPLE}") from None
    parsed: argparse.Namespace = args
    return parsed


def _evaluate(benchmark: ModuleType, words: list[str], argv: Sequence[str] | None) -> None:
    flags = {name: f"--{name.replace('_', '-')}" for name in ("random_weights", "force_quick_gelu")}
    own = argparse.Namespace(**{name: flag in words for name, flag in flags.items()})
    rest = [word for word in words if word not in flags.values()]
    args = parse_theirs(benchmark, rest)
    given = {word.split("=")[0] for word in rest}
    if "--pretrained" not in given:
        args.pretrained = [""]  # theirs is a download; ours: a saved folder brings its weights
    models = [args.model] if isinstance(args.model, str) else args.model
    # A run's folder means the model it left.
    args.model = [
        str(Path(name) / "model") if (Path(name) / "model" / CONFIG_FILE).is_file() else name
        for name in models
    ]
    for name in () if args.pretrained_model else args.model:
        known_name(name)
    bench = Bench(own, argv)
    theirs = benchmark.run
    metric = benchmark.zeroshot_classification
    fixed = {"accuracy": accuracy} if needs_accuracy(metric.accuracy) else {}
    with (
        warnings.catch_warnings(),
        in_place_of(
            benchmark,
            load_clip=bench.load,
            json=SimpleNamespace(load=json.load, dump=bench.dump),
            run=lambda one: bench.run(theirs, one),
        ),
        in_place_of(metric, **fixed),
    ):
        # What clip_benchmark leaves to webdataset's default, which warns of it.
        warnings.filterwarnings("ignore", message=r"WebDataset\(shardshuffle")
        try:
            benchmark.main_eval(args)
        except URLError as error:
            raise UserError(
                f"{', '.join(args.dataset)} is not in {args.dataset_root} and cannot be fetched "
                f"({error.reason}); put it there, or score shards: --from-shards writes their form"
            ) from None


def _build_csv(benchmark: ModuleType, words: list[str]) -> None:
    """Build the csv from copies of the results that hold only what clip_benchmark writes."""
    args = parse_theirs(benchmark, words)
    files: list[Path] = []
    for given in map(Path, args.files):
        files += sorted(given.glob("*.json")) if given.is_dir() else [given]
    if not files:
        raise UserError(f"{', '.join(args.files)} hold no .json results; make some with eval")
    with tempfile.TemporaryDirectory() as folder:
        copies = []
        for index, file in enumerate(files):
            values = read_json(file)
            if "metrics" not in values:
                raise UserError(f"{file} is no result of clip_benchmark; it has no 'metrics'")
            kept = {key: value for key, value in values.items() if key not in OWN}
            copies.append(Path(folder) / f"{index:06d}.json")
            write_json(copies[-1], clean(kept))  # type: ignore[arg-type]
        args.files = [str(copy) for copy in copies]
        benchmark.main_build(args)
    print(f"{len(files)} results in {args.output}")


def run(argv: Sequence[str] | None = None) -> None:
    """Run clip_benchmark's command line with lazyclip's models."""
    words = list(sys.argv[1:] if argv is None else argv)
    setup()
    if "--from-shards" in {word.split("=")[0] for word in words}:
        parser = Parser(
            f'python -m {MODULE} --from-shards "val/{{00000..00001}}.tar" --classes classes.json '
            "--output data/val",
            "Write a data set in clip_benchmark's wds form from shards.",
        )
        add_shard_flags(parser)
        args = parser.read(words, "--from-shards", "--output")
        print(write_wds(args, make_record(MODULE, argv, vars(args))))
        return
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    commands = {
        "eval": lambda theirs: _evaluate(theirs, words, argv),
        "build": lambda theirs: _build_csv(theirs, words),
    }
    if words[0] not in commands:
        raise UserError(f"'{words[0]}' is no command; use eval, build or --from-shards: {EXAMPLE}")
    commands[words[0]](load_benchmark())


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
