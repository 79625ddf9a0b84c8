"""Time segmentation from cosine maps to label maps, and whole images, against the plain procedure.

    python benchmarks/bench_segmentation.py [--quick] [--parts post,memory,image] [--repeats R]

The plain procedure is that of wangf3014/SCLIP, step by step: one window at a time through the
tower, its maps added into a canvas of all queries (`plain_segmentation.py`). Prints tables with the
goals beside the figures, then one line of JSON. Label maps are compared in the same run; where they
differ in more than rounding explains, the script ends with exit code 1. One thread. Not here: GPU
timings, decoding of pictures.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_segmentation import Case, cosines, gap_in_float64, plain, unit
from timing import MIN_REPEATS, Timing, interleave, machine, pin_threads
from torch import Tensor, nn

from eval.segmentation.confusion import count_on, score
from eval.segmentation.decide import by_canvas
from eval.segmentation.separable import postprocess
from lazyclip.dense import encode_dense
from lazyclip.factory import build

THRESHOLD = 0.1
EQUAL = 0.9999
MIOU = 1e-4  # 0.01 points
GAP = 1e-4  # probabilities nearer than that may be turned around by float32
MEMORY_GOAL = 10
PLAIN, OURS, OURS_CUT, CANVAS = "plain", "separable", "separable, threshold", "canvas, no softmax"
BATCHED, BF16 = "batched, separable", "batched in bfloat16, separable"


CASES = (
    Case("VOC20", 20, 375, 500, 336, 6.0),
    Case("ADE20K", 150, 512, 683, 336),
    Case("COCO-Stuff", 171, 480, 640, 448, 8.0),
    Case("Cityscapes", 19, 1024, 2048, 560),
)
QUICK = (CASES[0], Case("COCO-Stuff", 171, 480, 640, 336, 8.0))
LARGE = (
    Case("ADE20K, largest", 150, 1536, 2048, 336),
    Case("COCO-Stuff", 171, 480, 640, 448),
)
IMAGES = (Case("6 windows", 171, 480, 640, 336, 1.4), Case("15 windows", 171, 480, 640, 448, 1.4))
BF16_GOAL = 2.5


def compare(case: Case, threshold: float) -> dict[str, float]:
    """Compare the label maps: share of equal pixels, and what a different one was in float64.

    Returns:
        Share; the largest gap, over the pixels that differ, between the two best probabilities or
        the best and the threshold, taken in float64; difference of the mIoU against a truth that
        is the plain label map moved by 5 pixels.
    """
    plan, protocol, maps = case.plan(), case.protocol(threshold), cosines(case)
    found = postprocess(maps, plan, protocol, range(case.C)).long()
    expected = plain(lambda i: maps[i], plan, protocol)
    apart = found != expected
    truth = expected.roll((5, 5), dims=(0, 1))
    mious = [score(count_on(truth, p, case.C).numpy()).miou or 0.0 for p in (found, expected)]
    return {
        "equal": 1 - apart.double().mean().item(),
        "gap": gap_in_float64(maps, plan, protocol, apart) if bool(apart.any()) else 0.0,
        "miou": abs(mious[0] - mious[1]),
    }


def time_post(case: Case, repeats: int) -> dict[str, Timing]:
    """Time the ways from cosine maps to labels."""
    plan, maps, queries = case.plan(), cosines(case), range(case.C)
    free, cut = case.protocol(), case.protocol(THRESHOLD)
    return interleave(
        {
            PLAIN: lambda: plain(lambda i: maps[i], plan, cut),
            OURS: lambda: postprocess(maps, plan, free, queries),
            OURS_CUT: lambda: postprocess(maps, plan, cut, queries),
            CANVAS: lambda: by_canvas(maps, plan, free, queries),
        },
        PLAIN,
        repeats,
    )


def row(name: str, timing: Timing, note: str = "") -> None:
    """Print one line of a table."""
    ratio = f"{timing.ratio:6.2f} ({timing.ratio_lower:.2f}-{timing.ratio_upper:.2f})"
    print(f"  {name:<32}{ratio:<24}{1e3 * timing.median:9.1f} ms  {note}", flush=True)


def verdict(reached: float, goal: float | None) -> str:
    """Write a goal and whether it was reached."""
    return "" if goal is None else f"goal {goal:g}: {'reached' if reached >= goal else 'MISSED'}"


def post_part(cases: tuple[Case, ...], repeats: int) -> list[dict[str, object]]:
    """Time and compare the cases; ratio = the plain procedure's time / the row's."""
    rows: list[dict[str, object]] = []
    for case in cases:
        print(f"\n{case.name}: C = {case.C}, {len(case.plan().boxes)} windows, {case.H} x {case.W}")
        agreement = {str(t): compare(case, t) for t in (0.0, THRESHOLD)}
        timings = time_post(case, repeats)
        for name, timing in timings.items():
            goal = case.goal if name in (OURS, OURS_CUT) else None
            row(name, timing, verdict(timing.ratio, goal))
        for threshold, found in agreement.items():
            print(
                f"  threshold {threshold}: {found['equal']:.4%} of pixels equal, mIoU differs by "
                f"{100 * found['miou']:.4f} points, largest float64 margin of a pixel that differs "
                f"{found['gap']:.1e}"
            )
        rows.append(
            {
                "case": dataclasses.asdict(case),
                "agreement": agreement,
                "timings": {name: dataclasses.asdict(t) for name, t in timings.items()},
            }
        )
    return rows


def peak_of_this_process(case: Case, way: str) -> float:
    """Return the bytes that post-processing adds to this process at most (Linux)."""
    plan, maps = case.plan(), cosines(case)
    free = case.protocol()
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    small = dataclasses.replace(case, H=90, W=120, short=96)  # loads code once
    few = cosines(small)
    if way == PLAIN:
        plain(lambda i: few[i], small.plan(), small.protocol())
    else:
        postprocess(few, small.plan(), small.protocol(), range(case.C))
    clear.write_text("5")  # the high-water mark starts again from here
    before = kilobytes("VmRSS")
    if way == PLAIN:
        plain(lambda i: maps[i], plan, free)
    else:
        postprocess(maps, plan, free, range(case.C))
    return (kilobytes("VmHWM") - before) * 1024.0


def memory_part(cases: tuple[Case, ...]) -> list[dict[str, object]]:
    """Take the peak memory of each way in a process of its own."""
    print(f"\npeak memory of post-processing, added to the process; goal 1/{MEMORY_GOAL}")
    rows: list[dict[str, object]] = []
    for case in cases:
        peaks = {}
        for way in (PLAIN, OURS):
            command = [
                sys.executable,
                __file__,
                "--peak",
                json.dumps([dataclasses.asdict(case), way]),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[way] = float(done.stdout)
        ratio = peaks[PLAIN] / max(peaks[OURS], 1)
        megabytes = {way: f"{peak / 1e6:.1f} MB" for way, peak in peaks.items()}
        print(
            f"  {case.name:<18}C = {case.C}, {case.W} x {case.H}: plain {megabytes[PLAIN]}, "
            f"separable {megabytes[OURS]}, 1/{ratio:.0f}  {verdict(ratio, MEMORY_GOAL)}",
            flush=True,
        )
        rows.append({"case": dataclasses.asdict(case), "bytes": peaks, "ratio": ratio})
    return rows


def maps_of(model: nn.Module, windows: Tensor, text: Tensor, bf16: bool = False) -> Tensor:
    """Run windows n x 3 x h x w through the tower: cosine maps n x Q x h x w."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = encode_dense(model, windows)
    return torch.einsum("nehw,qe->nqhw", F.normalize(features.float(), dim=1), text)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A picture's normalised windows on their way through a tower to labels."""

    case: Case
    model: nn.Module
    windows: Tensor
    text: Tensor

    @torch.no_grad()
    def plain(self) -> Tensor:
        """One window at a time, full canvas."""
        windows = self.windows.split(1)
        return plain(
            lambda i: maps_of(self.model, windows[i], self.text)[0],
            self.case.plan(),
            self.case.protocol(),
        )

    @torch.no_grad()
    def batched(self, bf16: bool = False) -> Tensor:
        """All windows in one pass, no canvas."""
        maps = maps_of(self.model, self.windows, self.text, bf16)
        return postprocess(maps, self.case.plan(), self.case.protocol(), range(self.case.C)).long()


def time_image(case: Case, model: nn.Module, repeats: int, bf16: bool) -> dict[str, object]:
    """Time and compare one case, from normalised windows to labels."""
    plan = case.plan()
    draw = torch.Generator().manual_seed(2)
    windows = torch.randn(len(plan.boxes), 3, *plan.inner, generator=draw)
    whole = Whole(case, model, windows, unit(case.C, 512, seed=1))
    calls: dict[str, Callable[[], Tensor]] = {PLAIN: whole.plain, BATCHED: whole.batched}
    if bf16:
        calls[BF16] = lambda: whole.batched(bf16=True)
    labels = {name: call() for name, call in calls.items()}
    truth = labels[PLAIN].roll((5, 5), dims=(0, 1))
    miou = {n: score(count_on(truth, p, case.C).numpy()).miou for n, p in labels.items()}
    equal = {n: (p == labels[PLAIN]).double().mean().item() for n, p in labels.items()}
    timings = interleave(calls, PLAIN, repeats)
    for name, timing in timings.items():
        goal = {BATCHED: case.goal, BF16: BF16_GOAL}.get(name)
        change = 100 * ((miou[name] or 0.0) - (miou[PLAIN] or 0.0))
        note = f"{equal[name]:.4%} equal, mIoU {change:+.4f} points  {verdict(timing.ratio, goal)}"
        row(name, timing, note)
    return {
        "case": dataclasses.asdict(case),
        "equal": equal,
        "miou": miou,
        "timings": {name: dataclasses.asdict(t) for name, t in timings.items()},
    }


def image_part(cases: tuple[Case, ...], repeats: int, bf16: bool) -> list[dict[str, object]]:
    """Time whole images with a random ViT-B/16."""
    model = build("ViT-B-16", random_weights_seed=0).model.eval()
    rows = []
    for case in cases:
        print(f"\nwhole image, random ViT-B/16, {case.name}, C = {case.C}, {case.H} x {case.W}")
        rows.append(time_image(case, model, repeats, bf16))
    return rows


def equal_enough(parts: dict[str, list[dict[str, Any]]]) -> bool:
    """Say whether all label maps of the run agree but for near ties."""
    post = [a for r in parts.get("post", []) for a in r["agreement"].values()]
    shares = [a["equal"] for a in post] + [r["equal"][BATCHED] for r in parts.get("image", [])]
    near = all(a["gap"] <= GAP and a["miou"] <= MIOU for a in post)
    return near and min(shares, default=1.0) >= EQUAL


def main() -> int:
    """Compare, time, print; returns 1 when the results differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help="rounds kept (>= 7)")
    parser.add_argument(
        "--parts", default="post,memory,image", help="of post, memory, image (default all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases, no whole images: under a minute"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    pin_threads(1)
    if args.peak:
        case, way = json.loads(args.peak)
        print(peak_of_this_process(Case(**case), way))
        return 0
    wanted = args.parts.split(",")
    if args.repeats < MIN_REPEATS or not set(wanted) <= {"post", "memory", "image"}:
        parser.error(f"--repeats is at least {MIN_REPEATS}; --parts are post, memory, image")
    start, about = time.perf_counter(), machine()
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(f"ratio = time of '{PLAIN}' / the row's, quartiles over {args.repeats} rounds")
    parts: dict[str, list[dict[str, Any]]] = {}
    if "post" in wanted:
        parts["post"] = post_part(QUICK if args.quick else CASES, args.repeats)
    if "memory" in wanted:
        parts["memory"] = memory_part(LARGE[1:] if args.quick else LARGE)
    if "image" in wanted and not args.quick:
        bf16 = "avx512_bf16" in about["vectors"]  # type: ignore[operator]
        if not bf16:
            print(
                f"\nno AVX512-BF16 here: the tower stays in float32, goal {BF16_GOAL} not measured"
            )
        parts["image"] = image_part(IMAGES, args.repeats, bf16)
    equal = equal_enough(parts)
    print(
        f"\nresults equal: {'yes' if equal else 'NO'}; {time.perf_counter() - start:.0f} s in all"
    )
    print(json.dumps({"benchmark": "segmentation", "machine": about, "equal": equal, **parts}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
