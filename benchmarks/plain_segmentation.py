"""The plain procedure that `bench_segmentation` compares with, and what both are given.

Ours, from the description of wangf3014/SCLIP `clip_segmentor.py`: one window at a time, its maps
resized to the window and added into a canvas of all queries, divided, resized to the picture,
scaled, softmax, argmax. Not here: timing.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.segmentation.protocol import Protocol, read_task
from eval.segmentation.windows import Plan, make_plan

PATCH = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A picture of H x W pixels, resized to a short side, with C classes; the speed to reach."""

    name: str
    C: int
    H: int
    W: int
    short: int
    goal: float | None = None

    def protocol(self, threshold: float = 0.0) -> Protocol:
        """Return windows of 224 pixels every 112, this many classes."""
        base = read_task("voc20", "sclip").protocol
        return dataclasses.replace(base, classes=self.C, short=self.short, threshold=threshold)

    def plan(self) -> Plan:
        """Lay out the windows."""
        return make_plan(self.H, self.W, self.protocol(), PATCH)


def unit(*shape: int, seed: int) -> Tensor:
    """Draw unit vectors along the last axis, the same for every run."""
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draw), dim=-1)


def cosines(case: Case) -> Tensor:
    """Make cosine maps n x C x 14 x 14 of random unit features of 512 numbers."""
    plan = case.plan()
    grid = plan.inner[0] // PATCH, plan.inner[1] // PATCH
    tokens = unit(len(plan.boxes), *grid, 512, seed=0)
    return torch.einsum("nhwe,qe->nqhw", tokens, unit(case.C, 512, seed=1))


def on_canvas(window_maps: Callable[[int], Tensor], plan: Plan) -> Tensor:
    """Average the windows' maps, one window after another, on a canvas Q x h x w."""
    canvas: Tensor | None = None
    counts = torch.zeros(1, *plan.size)
    for i, box in enumerate(plan.boxes):
        maps = F.interpolate(window_maps(i)[None], plan.window, mode="bilinear")[0]
        around = (box.x0, plan.size[1] - box.x1, box.y0, plan.size[0] - box.y1)
        padded = F.pad(maps, around)
        canvas = padded if canvas is None else canvas.add_(padded)
        counts[:, box.y0 : box.y1, box.x0 : box.x1] += 1
    if canvas is None:
        raise ValueError("a plan without windows")
    return canvas / counts


def plain(window_maps: Callable[[int], Tensor], plan: Plan, protocol: Protocol) -> Tensor:
    """Label a picture by the published steps; one query a class, so no synonyms to merge.

    Args:
        window_maps: number of a window -> its cosine maps Q x h x w.
        plan: sizes and windows, without padding.
        protocol: scale and threshold.

    Returns:
        H x W int64.
    """
    canvas = on_canvas(window_maps, plan)
    full = F.interpolate(canvas[None], plan.original, mode="bilinear")[0]
    probabilities = (full * protocol.logit_scale).softmax(dim=0)
    best, labels = probabilities.max(dim=0)
    labels[best < protocol.threshold] = 0
    return labels


def gap_in_float64(maps: Tensor, plan: Plan, protocol: Protocol, where: Tensor) -> float:
    """Return the largest margin of a decision among some pixels."""
    canvas = on_canvas(lambda i: maps[i].double(), plan)
    rows = where.any(dim=1).nonzero().flatten().tolist()
    gaps = []
    for row in rows:  # only the rows needed: all of them in float64 would be gigabytes
        place = min(max((row + 0.5) * plan.size[0] / plan.original[0] - 0.5, 0), plan.size[0] - 1)
        low = min(int(place), plan.size[0] - 1)
        high = min(low + 1, plan.size[0] - 1)
        line = canvas[:, low] * (1 - place + low) + canvas[:, high] * (place - low)
        line = F.interpolate(line[None], plan.original[1], mode="linear")[0][:, where[row]]
        best = (line * protocol.logit_scale).softmax(dim=0).topk(2, dim=0).values
        margin = best[0] - best[1]
        if protocol.threshold > 0:
            margin = margin.minimum((best[0] - protocol.threshold).abs())
        gaps.append(margin.max().item())
    return max(gaps)
