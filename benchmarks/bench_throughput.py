"""Training samples per second and MFU of CLIP models, beside open_clip's step in the same run.

    python benchmarks/bench_throughput.py [--models ViT-B-16,...] [--output FILE]
    python benchmarks/bench_throughput.py --smoke

For each model and pooling (`token`, `last`) on one device: the batch that trains fastest under each
setting (plain, compile, checkpointing), its memory, and MFU; then ours and open_clip_train's own
step alternating at one batch; what a step is made of; and the trainer's command fed by the real
loader on synthetic shards, with its wait for data. `--smoke` does the same with a nano model on the
CPU, in two minutes: it shows that the script runs, and no figure of worth. Not here: several GPUs.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from kept import keep, output_flag
from timing import interleave, machine, pin_threads

ROOT = Path(__file__).resolve().parents[1]
# Samples per second of an A100 that open_clip's docs/PRETRAINED.md comes to for LAION-400M: B/16
# 10,700 GPU hours, L/14 (224 px) 50,800, 32 epochs of 400 M samples. Code of 2021 and 2022.
PUBLISHED = {"ViT-B-16": 332.0, "ViT-L-14": 70.0}
GOAL_MFU, GOAL_RATIO = 0.40, 1.0
HOWS = {
    "plain": {}, "compile": {"compiled": True}, "checkpointing": {"checkpointing": True},
    "compile+checkpointing": {"compiled": True, "checkpointing": True},
}  # fmt: skip
POOLINGS = ("token", "last")
THEIRS = "open_clip"


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; what `--smoke` changes stands in `smoke`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="ViT-B-16,ViT-L-14,ViT-L-14-336", help="plain names")
    parser.add_argument("--poolings", default=",".join(POOLINGS))
    parser.add_argument("--hows", default=",".join(HOWS), help=", ".join(HOWS))
    parser.add_argument("--precision", default="amp_bf16", choices=("amp_bf16", "fp32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="64,128,256,512,1024,2048,4096", help="tried in order")
    parser.add_argument("--steps", type=int, default=5, help="in one timed call")
    parser.add_argument("--rounds", type=int, default=7, help="of the comparison, 7 or more")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the card, where it is not known")
    parser.add_argument("--threads", type=int, default=8, help="CPU threads of this process")
    parser.add_argument(
        "--data", type=Path, help="folder for the shards (default: a temporary one)"
    )
    parser.add_argument("--side", type=int, default=256, help="pixels of the pictures in shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the loader")
    parser.add_argument("--fed-steps", type=int, default=60, help="steps on shards; 0: none")
    parser.add_argument("--fed-skip", type=int, default=20, help="of them, not counted")
    parser.add_argument("--no-peer", action="store_true", help="leave open_clip's step out")
    parser.add_argument("--smoke", action="store_true", help="a nano model on the CPU")
    output_flag(parser)
    return parser


def smoke(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags of a small run on the CPU."""
    small = {
        "models": "ViT-nano", "hows": "plain,checkpointing", "precision": "fp32", "device": "cpu",
        "batches": "8,16", "steps": 1, "threads": 1, "side": 64, "workers": 0, "fed_steps": 15,
        "fed_skip": 5,
    }  # fmt: skip
    return argparse.Namespace(**{**vars(args), **small})


def search(
    model: str, pooling: str, how: str, args: argparse.Namespace
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Try batches until one does not fit.

    Returns:
        The fastest, None where none fits, and all that were tried: `batch`, `samples_per_s`,
        `memory` in bytes (None on the CPU) or `does_not_fit`.
    """
    import time

    import torch
    from throughput_steps import Ours, Setting, free

    tried: list[dict[str, Any]] = []
    for batch in map(int, args.batches.split(",")):
        device, ours = torch.device(args.device), None
        free(device)
        try:
            ours = Ours(Setting(model, pooling, batch, **HOWS[how]), args.precision, args.device)
            ours.steps(2)
            start = time.perf_counter()
            ours.steps(args.steps)
            rate = args.steps * batch / (time.perf_counter() - start)
            memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            tried.append({"batch": batch, "samples_per_s": rate, "memory": memory})
        except torch.OutOfMemoryError:
            tried.append({"batch": batch, "does_not_fit": True})
            break
        finally:
            del ours
            free(device)
    fitting = [one for one in tried if "samples_per_s" in one]
    return max(fitting, key=lambda one: one["samples_per_s"], default=None), tried


def compare(model: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time ours with each pooling and open_clip's step, alternating, at one batch.

    Returns:
        By name: samples per second (median), and quartiles of the ratio to open_clip's step.
    """
    import torch
    from throughput_steps import Ours, Setting, Theirs, free

    free(torch.device(args.device))
    sides: dict[str, Any] = {}
    for pooling in args.poolings.split(","):
        sides[pooling] = Ours(Setting(model, pooling, batch), args.precision, args.device)
    whose = None
    if not args.no_peer:
        sides[THEIRS] = Theirs(Setting(model, "token", batch), args.precision, args.device)
        whose = sides[THEIRS].how
    base = THEIRS if THEIRS in sides else next(iter(sides))
    calls = {name: lambda side=side: side.steps(args.steps) for name, side in sides.items()}
    timings = interleave(calls, base, args.rounds, warmup=2)
    found = {
        name: {
            "samples_per_s": args.steps * batch / timing.median,
            "ratio": timing.ratio, "quartiles": [timing.ratio_lower, timing.ratio_upper],
        }
        for name, timing in timings.items()
    }  # fmt: skip
    sides.clear()
    free(torch.device(args.device))
    return {"batch": batch, "base": base, "peer": whose, "sides": found}


def compare_where_it_fits(model: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Compare at the batch given, or at half of it and so on: all sides lie on one device."""
    import torch

    while True:
        try:
            return compare(model, batch, args)
        except torch.OutOfMemoryError:
            if batch < 2:
                raise
            batch //= 2


def look_inside(model: str, pooling: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Take a step apart."""
    import torch
    from throughput_parts import flop_per_sample, kernels, phases, verdict
    from throughput_steps import Ours, Setting, free

    ours = Ours(Setting(model, pooling, batch), args.precision, args.device)
    ours.steps(2)
    parts = {"phases": phases(ours, 3), **kernels(ours, 2)}
    found = {**parts, "bound_by": verdict(parts), "flop_per_sample": flop_per_sample(ours.built)}
    del ours
    free(torch.device(args.device))
    return found


def measure(model: str, data: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all of one model, printing as it goes."""
    import torch
    from throughput_loader import run_fed
    from throughput_parts import peak_of
    from throughput_steps import Setting

    peak = peak_of(torch.device(args.device), args.precision, args.peak)
    found: dict[str, Any] = {"published_a100": PUBLISHED.get(model), "poolings": {}}
    for pooling in args.poolings.split(","):
        hows: dict[str, Any] = {}
        for how in args.hows.split(","):
            best, tried = search(model, pooling, how, args)
            hows[how] = {"best": best, "tried": tried}
        plain = hows.get("plain", {}).get("best") or next(
            (h["best"] for h in hows.values() if h["best"]), None
        )
        if plain is None:
            raise SystemExit(f"{model} fits with no batch of {args.batches}")
        inside = look_inside(model, pooling, plain["batch"], args)
        fed = None
        if args.fed_steps:
            fed = run_fed(
                Setting(model, pooling, plain["batch"]), args.precision, args.device, data=data,
                side=args.side, workers=args.workers, steps=args.fed_steps, skip=args.fed_skip,
            )  # fmt: skip
        found["poolings"][pooling] = {"hows": hows, "inside": inside, "fed": fed}
        print(
            "\n".join(pooling_lines(model, pooling, found["poolings"][pooling], peak)), flush=True
        )
    batches = [p["hows"]["plain"]["best"]["batch"] for p in found["poolings"].values()
               if p["hows"].get("plain", {}).get("best")]  # fmt: skip
    if batches:
        found["beside"] = compare_where_it_fits(model, min(batches), args)
        print("\n".join(beside_lines(model, found["beside"], found["published_a100"])), flush=True)
    return found


def mfu(rate: float, flop: float, peak: float | None) -> float | None:
    """Return model FLOP utilisation, None where the peak is not known."""
    return None if peak is None else rate * flop / peak


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def pooling_lines(model: str, pooling: str, found: dict[str, Any], peak: float | None) -> list[str]:
    """Phrase what was measured of one pooling."""
    inside, lines = found["inside"], []
    for how, tried in found["hows"].items():
        best = tried["best"]
        if best is None:
            lines.append(f"{model} {pooling} {how}: no batch fits")
            continue
        memory = "" if best["memory"] is None else f", {best['memory'] / 2**30:.1f} GiB"
        used = mfu(best["samples_per_s"], inside["flop_per_sample"], peak)
        goal = ""
        if used is not None and pooling == "last":
            goal = f", goal {100 * GOAL_MFU:.0f} %: " + (
                "reached" if used >= GOAL_MFU else "not reached"
            )
        largest = max(one["batch"] for one in tried["tried"] if "samples_per_s" in one)
        lines.append(
            f"{model} {pooling} {how}: {best['samples_per_s']:.5g} samples/s at batch "
            f"{best['batch']} (largest tried that fits {largest}){memory}, MFU {_share(used)}{goal}"
        )
    shares = ", ".join(f"{name} {_share(value)}" for name, value in inside["phases"].items())
    kinds = ", ".join(f"{name} {_share(value)}" for name, value in inside["kinds"].items())
    lines += [f"  phases: {shares}", f"  computing: {kinds}", f"  bound by {inside['bound_by']}"]
    if found["fed"]:
        lines.append(
            f"  fed by the loader: {found['fed']['samples_per_s']:.5g} samples/s, data wait "
            f"{_share(found['fed']['data_wait'])}"
        )
    return lines


def beside_lines(model: str, beside: dict[str, Any], published: float | None) -> list[str]:
    """Phrase the comparison in one run."""
    lines = [f"{model}, batch {beside['batch']}, alternating; peer: {beside['peer'] or 'none'}"]
    for name, side in beside["sides"].items():
        low, high = side["quartiles"]
        line = f"  {name}: {side['samples_per_s']:.5g} samples/s"
        if name != beside["base"]:
            line += f", {side['ratio']:.3f} x {beside['base']} ({low:.3f}-{high:.3f})"
        if name == "last" and beside["base"] == THEIRS:
            reached = "reached" if side["ratio"] >= GOAL_RATIO else "not reached"
            line += f", goal {GOAL_RATIO:g}: {reached}"
        lines.append(line)
    if published is not None:
        lines.append(f"  open_clip, published, per A100 of 2021: {published:g} samples/s")
    return lines


def main() -> None:
    """Run the benchmark."""
    args = make_parser().parse_args()
    began = os.getloadavg()[0]
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    import torch

    if args.smoke:
        args = smoke(args)
    elif args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; --smoke runs a small model on the CPU")
    # `timing` takes one thread's processor time where there is but one; a card needs the clock.
    pin_threads(args.threads if args.device == "cpu" else max(args.threads, 2))
    from throughput_parts import matmul_rate

    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    best = matmul_rate(device, args.precision)
    print(f"{card}, {args.precision}; one large matrix product: {best / 1e12:.3g} TFLOP/s")
    found: dict[str, Any] = {"card": card, "matmul_flops": best, "smoke": args.smoke, "models": {}}
    with tempfile.TemporaryDirectory() as temporary:
        data = args.data or Path(temporary)
        for model in args.models.split(","):
            found["models"][model] = measure(model, data, args)
    if args.smoke:
        print("a smoke run: these figures say nothing about a GPU")
    keep(args, began, found)
    print(json.dumps({"benchmark": "throughput", "machine": machine(), **found}))


if __name__ == "__main__":
    main()
