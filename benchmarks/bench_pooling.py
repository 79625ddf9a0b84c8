"""Time `last_pool` against a step-by-step rendition of the released procedure.

    python benchmarks/bench_pooling.py [--threads N] [--repeats R]

Prints a table of ratios, then one line of JSON. The results of both are compared on the same input
first, against the choice made in float64; where they differ in more than a few channels the script
ends with exit code 1, so a fast and wrong variant cannot win. Not here: GPU timings.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable

import torch
from timing import MIN_REPEATS, Timing, interleave, machine, pin_threads
from torch import Tensor

from lazyclip.pooling import last_pool

GOAL = 2.2  # forward and backward, B/16 shape, K = N / 2, one thread
# Float32 rounding may turn two scores round that are equal to about seven digits.
MAX_CHANGED = 1e-3
TOLERANCE = 1e-4  # pooled values further apart come from another choice of patches
BASELINE = "released"
SAME = "last_pool, released options"
DEFAULT = "last_pool, defaults"


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: B images, N patch tokens, D channels, K patches kept per channel."""

    name: str
    B: int
    N: int
    D: int
    K: int


CASES = (
    Case("B/16", 32, 196, 768, 1),
    Case("B/16", 32, 196, 768, 98),
    Case("L/14-336", 8, 576, 1024, 1),
    Case("L/14-336", 8, 576, 1024, 288),
)


def released(x: Tensor, k: int) -> Tensor:
    """Pool as ChengShiest/LAST-ViT does, step by step (our rendition, no line of theirs).

    Full complex transform along the channels, spectrum shifted so that zero frequency is in the
    middle, product with a Gaussian of deviation sqrt(D) over the positions -D/2+1 .. D/2, shifted
    and transformed back, real part; score x / |filtered - x|; the K largest over the patch axis;
    gather; mean. The choice carries no gradient, the gathered tokens do.

    Args:
        x: patch tokens, B x N x D float32 or float64.
        k: patches kept per channel.

    Returns:
        Pooled features, B x D.
    """
    D = x.shape[-1]
    with torch.no_grad():
        position = torch.arange(D, dtype=x.dtype) - D // 2 + 1
        gauss = torch.exp(-(position**2) / (2 * math.sqrt(D) ** 2))
        spectrum = torch.fft.fftshift(torch.fft.fft(x, dim=-1), dim=-1)  # B x N x D complex
        spectrum = spectrum * (gauss / gauss.max())
        filtered = torch.fft.ifft(torch.fft.ifftshift(spectrum, dim=-1), dim=-1).real
        score = x / (filtered - x).abs()
        chosen = score.topk(k, dim=1).indices  # B x K x D
    return x.gather(1, chosen).mean(dim=1)


def released_options(x: Tensor, k: int) -> Tensor:
    """Pool by `last_pool` with the released code's score, kernel and missing eps."""
    return last_pool(x, k, score="repo", kernel="repo", eps=0.0)


def default_options(x: Tensor, k: int) -> Tensor:
    """Pool by `last_pool` with its defaults."""
    return last_pool(x, k)


def tokens(case: Case) -> Tensor:
    """Draw unit-variance tokens, B x N x D float32, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(case.B, case.N, case.D, generator=generator)


def off(pooled: Tensor, exact: Tensor) -> float:
    """Return the share of pooled values not within TOLERANCE of the exact ones; NaN is not."""
    return (~((pooled - exact).abs() <= TOLERANCE)).double().mean().item()


def compare(case: Case) -> dict[str, float]:
    """Compare the results of both with each other and with float64.

    Returns:
        Shares of the B x D pooled values that differ by more than TOLERANCE, and the largest
        difference of output and gradient where the choice is the same.
    """
    x = tokens(case).requires_grad_()
    exact = released_options(tokens(case).double(), case.K)
    results, gradients = [], []
    for function in (released, released_options):
        pooled = function(x, case.K)
        (gradient,) = torch.autograd.grad(pooled.sum(), x)
        results.append(pooled.detach())
        gradients.append(gradient)
    # Not `> TOLERANCE`: NaN must count as changed.
    changed = ~((results[0] - results[1]).abs() <= TOLERANCE)  # B x D
    gap = (gradients[0] - gradients[1]).abs().amax(dim=1)  # B x D
    return {
        "changed": changed.double().mean().item(),
        "released_against_float64": off(results[0], exact),
        "ours_against_float64": off(results[1], exact),
        "max_difference": (results[0] - results[1]).masked_fill(changed, 0).abs().max().item(),
        "max_gradient_difference": gap.masked_fill(changed, 0).max().item(),
    }


def both_ways(function: Callable[[Tensor, int], Tensor], x: Tensor, k: int) -> None:
    """Run forward and backward with a fresh gradient."""
    x.grad = None
    function(x, k).sum().backward()


def measure(case: Case, backward: bool, repeats: int) -> dict[str, Timing]:
    """Time the variants of one case; `backward` adds the gradient to the tokens."""
    x = tokens(case).requires_grad_(backward)
    variants = {BASELINE: released, SAME: released_options, DEFAULT: default_options}
    calls: dict[str, Callable[[], object]] = {}
    for name, function in variants.items():
        if backward:
            calls[name] = lambda function=function: both_ways(function, x, case.K)
        else:
            calls[name] = lambda function=function: function(x, case.K)
    return interleave(calls, BASELINE, repeats)


def show(case: Case, way: str, timings: dict[str, Timing]) -> None:
    """Print one case's rows of the table."""
    for name, t in timings.items():
        where = f"{case.name:<9} {case.B:>3} x {case.N} x {case.D:<5}{case.K:>4}  {way:<8}"
        ratio = f"{t.ratio:5.2f} ({t.ratio_lower:.2f}-{t.ratio_upper:.2f})"
        print(f"{where}  {name:<28}{ratio:<20}{1e3 * t.median:8.1f} ms", flush=True)


def main() -> int:
    """Compare, time, print; returns 1 when the results differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads (default 1)")
    parser.add_argument("--repeats", type=int, default=MIN_REPEATS, help="rounds kept (>= 7)")
    args = parser.parse_args()
    if args.repeats < MIN_REPEATS or args.threads < 1:
        parser.error(f"--repeats is at least {MIN_REPEATS}, --threads at least 1")
    pin_threads(args.threads)
    start, about = time.perf_counter(), machine()
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(
        f"baseline: {BASELINE}; ratio = its time / the row's, quartiles over {args.repeats} rounds"
    )
    print(f"\n{'shape':<9} {'B x N x D':<17}  K  {'way':<8}  {'variant':<28}{'ratio':<20}  median")
    rows, equal = [], True
    for case in CASES:
        agreement = compare(case)
        equal &= agreement["changed"] <= MAX_CHANGED and agreement["max_gradient_difference"] < 1e-6
        row: dict[str, object] = {"case": dataclasses.asdict(case), "agreement": agreement}
        for way, backward in (("forward", False), ("fwd+bwd", True)):
            timings = measure(case, backward, args.repeats)
            show(case, way, timings)
            row[way] = {name: dataclasses.asdict(t) for name, t in timings.items()}
        print(f"{'':<9} {agreement['changed']:.4%} of pooled values by another choice of patches")
        rows.append(row)
    reached = rows[1]["fwd+bwd"][SAME]["ratio"]  # type: ignore[index]
    print(f"\nfwd+bwd at B/16, K = 98: {reached:.2f} x the released procedure (goal {GOAL})")
    print(f"results equal: {'yes' if equal else 'NO'}; {time.perf_counter() - start:.0f} s in all")
    out = {"benchmark": "pooling", "machine": about, "goal": GOAL, "ratio": reached}
    print(json.dumps({**out, "equal": equal, "rows": rows}))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
