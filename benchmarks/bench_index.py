"""How long the index of LAION-400M's shards takes to build, and how large it is, from a few shards.

    python benchmarks/bench_index.py [--shards N] [--rounds R]

Makes shards of 9,500 samples of about 33 kB, as LAION-400M's are, and builds their index with
`training.index`'s own function in one and two processes, from a cold and from a warm cache, then
extrapolates to 41,456 shards. Every walk is also timed against merely reading the same bytes. Not
here: a network file system.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kept import keep, output_flag
from laion_shards import forget, total_bytes, write_shards
from processes import ROOT, cpu_seconds

EACH, LAION = 9500, 41_456


def build_once(pattern: str, processes: int) -> dict[str, float]:
    """Build an index into a folder of its own; returns seconds, CPU seconds and bytes."""
    from training.data.prepare import Wanted, prepare
    from training.data.survey import How

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.npz"
        how = How(processes=processes)
        wall, cpu = time.perf_counter(), cpu_seconds()
        prepared = prepare(Wanted(pattern=pattern, fallback=Path(folder), file=file, how=how))
        found = {"seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
        chunks = len(prepared.manifest.starts)
        return {**found, "bytes": file.stat().st_size, "chunks": chunks}


def read_once(folder: Path) -> float:
    """Read the same files from end to end; returns seconds."""
    start = time.perf_counter()
    for file in sorted(folder.glob("*.tar")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(8 << 20):
                pass
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build the index in every way, in alternating rounds."""
    import training.data.survey as survey

    # Few shards are walked in place otherwise; here the processes are what is asked about.
    survey.PARALLEL_FROM = 2
    folder = args.data / "laion"
    pattern = write_shards(folder, shards=args.shards, each=EACH, side=256)
    rows: dict[str, list[dict[str, float]]] = {}
    reads: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        for cache in ("cold", "warm"):
            for processes in (1, 2):
                if cache == "cold":
                    forget(folder)
                one = build_once(pattern, processes)
                rows.setdefault(f"{cache}, {processes} processes", []).append(one)
            if cache == "cold":
                forget(folder)
            reads[cache].append(read_once(folder))
    return {"rows": rows, "reads": reads, "shards": args.shards, "bytes": total_bytes(folder)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "out" / "bench", help="for shards")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    output_flag(parser)
    args = parser.parse_args()
    began = os.getloadavg()[0]
    sys.path.insert(0, str(ROOT))
    found = measure(args)
    per_shard = found["bytes"] / args.shards
    print(f"{args.shards} shards of {EACH} samples, {per_shard / 1e6:.0f} MB each")
    for name, runs in found["rows"].items():
        seconds = statistics.median(run["seconds"] for run in runs) / args.shards
        cpu = statistics.median(run["cpu_seconds"] for run in runs) / args.shards
        print(
            f"{name}: {seconds:.2f} s a shard ({per_shard / 1e6 / seconds:.0f} MB/s), "
            f"{cpu:.2f} CPU s; {LAION:,} shards: {LAION * seconds / 3600:.1f} h, "
            f"{LAION * cpu / 3600:.1f} CPU h"
        )
    for cache, seconds_ in found["reads"].items():
        rate = found["bytes"] / statistics.median(seconds_) / 1e6
        print(f"reading alone, {cache}: {rate:.0f} MB/s")
    size = found["rows"]["warm, 1 processes"][0]["bytes"] / args.shards
    print(f"index: {size:.0f} bytes a shard; {LAION:,} shards: {LAION * size / 1e6:.1f} MB")
    keep(args, began, {"benchmark": "index", **found, "index_bytes_per_shard": size})


if __name__ == "__main__":
    main()
