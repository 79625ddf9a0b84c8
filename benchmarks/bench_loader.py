"""Loader samples per CPU second and per second, ours beside open_clip_train's, on the same shards.

    python benchmarks/bench_loader.py [--rounds R] [--samples N] [--workers 0 1 2] [--sides 256 512]
    python benchmarks/bench_loader.py --raw

Makes shards of 256 and 512 pixel JPEGs, then lets both loaders, each in a process of its own, take
turns, with 0 (in place), 1 and 2 loader processes, one thread each, and takes processor time
(children's too) and wall time for N samples a turn, after the batches that stood ready. Raw
reading, without decoding, beside webdataset's own iterator, many rounds in one process. Not here:
training steps.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from kept import Ratio, keep, output_flag, ratio_of
from laion_shards import write_shards
from peer import DEFAULT, ensure_peer
from processes import ROOT, Child

SHARDS, EACH = 8, 250
GOALS = {256: 2.5, 512: 2.0}
RAW_GOAL = 5.0
# Reads of all shards in one timing: a single one is too short to be timed on a busy machine.
RAW_READS = 3


def _said(ratio: Ratio, goal: float) -> str:
    return f"{ratio}, goal {goal:g}: {'reached' if ratio.median >= goal else 'not reached'}"


def take_turns(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run both loaders in alternating rounds, at every size and number of processes."""
    cases = {
        (side, workers): {
            "side": side, "workers": workers, "goal": GOALS[side], "theirs": [], "ours": []
        }
        for side in args.sides for workers in args.workers
    }  # fmt: skip
    pythons = {"theirs": ensure_peer(args.peer), "ours": Path(sys.executable)}
    sides = {
        name: Child(python, "loader_child.py", ["serve"], ours=name == "ours")
        for name, python in pythons.items()
    }
    try:
        until = time.monotonic() + 60 * args.minutes
        for turn in range(args.rounds):
            if turn and time.monotonic() > until:
                print(f"{turn} of {args.rounds} rounds in {args.minutes:g} minutes", flush=True)
                break
            for (side, workers), case in cases.items():
                pattern = write_shards(args.data / str(side), shards=SHARDS, each=EACH, side=side)
                words = ["rate", "--pattern", pattern, "--samples", args.samples,
                         "--workers", workers, "--folder", args.data]  # fmt: skip
                for name in ("theirs", "ours") if turn % 2 == 0 else ("ours", "theirs"):
                    one = sides[name].ask([*words, "--side", name])
                    case[name].append({**one, "load": round(os.getloadavg()[0], 2)})
    finally:
        for child in sides.values():
            child.close()
    return list(cases.values())


def show(case: dict[str, Any]) -> dict[str, Any]:
    """Print a case's figures; returns them with their ratios."""
    found = dict(case)
    for key, unit in (("per_cpu_second", "CPU second"), ("per_second", "second")):
        ours, theirs = ([run[key] for run in case[name]] for name in ("ours", "theirs"))
        ratio = ratio_of(ours, theirs)
        found[key] = {
            "theirs": statistics.median(theirs), "ours": statistics.median(ours), "ratio": ratio
        }  # fmt: skip
        loads = [run["load"] for name in ("ours", "theirs") for run in case[name]]
        print(
            f"{case['side']} px, {case['workers']} workers, samples per {unit}: open_clip_train "
            f"{found[key]['theirs']:.0f}, ours {found[key]['ours']:.0f}; "
            f"{_said(ratio, case['goal'])} (load {min(loads):.0f} to {max(loads):.0f})",
            flush=True,
        )
    return found


def raw(args: argparse.Namespace) -> dict[str, Any]:
    """Read all samples without decoding, by webdataset and by chunks; the cache is warm."""
    import webdataset
    from braceexpand import braceexpand

    from training.data.chunks import Reader, Shared
    from training.data.prepare import Wanted, prepare

    pattern = write_shards(args.data / "256", shards=SHARDS, each=EACH, side=256)
    prepared = prepare(Wanted(pattern=pattern, fallback=args.data))
    reader = Reader(prepared.manifest, prepared.shards)

    def chunks() -> int:
        shared, count = Shared(reader), 0
        for number in range(len(reader.manifest.starts)):
            chunk = shared.get(number)
            count += sum(1 for index in range(len(chunk.records)) if chunk.sample(index))
        return count

    def stream() -> int:
        source = webdataset.WebDataset(list(braceexpand(pattern)), shardshuffle=False)
        return sum(1 for _ in source)

    rates: dict[str, list[float]] = {"webdataset": [], "chunks": []}
    for turn in range(args.raw_rounds + 1):
        for name, read in (("webdataset", stream), ("chunks", chunks)):
            start = time.process_time()
            count = sum(read() for _ in range(RAW_READS))
            if count != SHARDS * EACH * RAW_READS:
                raise SystemExit(f"{name} read {count} of {SHARDS * EACH * RAW_READS} samples")
            if turn:
                rates[name].append(count / (time.process_time() - start))
    ratio = ratio_of(rates["chunks"], rates["webdataset"])
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"raw reading, 256 px, webdataset {webdataset.__version__}: {middle['webdataset']:.0f}, "
        f"chunks {middle['chunks']:.0f} samples per CPU second; {_said(ratio, RAW_GOAL)} "
        f"(load {os.getloadavg()[0]:.1f})",
        flush=True,
    )
    return {"rates": rates, "ratio": ratio, "goal": RAW_GOAL, "webdataset": webdataset.__version__}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, default=DEFAULT, help="environment of the other side")
    parser.add_argument("--data", type=Path, default=ROOT / "out" / "bench", help="for shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=768, help="of a turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=sorted(GOALS), choices=GOALS)
    parser.add_argument("--minutes", type=float, default=60.0, help="no further round after them")
    parser.add_argument("--raw", action="store_true", help="raw reading only")
    parser.add_argument("--raw-rounds", type=int, default=15)
    output_flag(parser)
    args = parser.parse_args()
    began = os.getloadavg()[0]
    sys.path.insert(0, str(ROOT))
    found: dict[str, Any] = {"benchmark": "loader"}
    if args.raw:
        found["raw"] = raw(args)
    else:
        found["loaders"] = [show(case) for case in take_turns(args)]
    keep(args, began, found)


if __name__ == "__main__":
    main()
