"""Stability score, channel-wise choice of K patches, votes, and the four poolings.

`last_pool` is the one door to LaSt pooling: every tower and every post-hoc use goes through it, and
a faster back-end would be chosen there. Not here: where in a tower it sits (`tower`).

Letters: B images, N patch tokens, D channels, K patches kept per channel.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lazyclip.base.config import strict
from lazyclip.base.errors import UserError, unknown
from lazyclip.base.registry import Registry
from lazyclip.lowpass import KERNELS, Kernel, low_pass, resolve_sigma

Score = Literal["paper", "repo", "abs", "negdist", "value"]
SCORES: tuple[Score, ...] = get_args(Score)
# Values of one chunk of scores for each CPU thread: 1 MiB in float32, about one core's cache.
_CACHE_VALUES = 1 << 18


def resolve_k(k: int | float, n: int) -> int:
    """Return the number of patches to keep out of N.

    Args:
        k: a count 1..N (int) or a fraction in (0, 1] of N (float), rounded half up, at least 1.
        n: number of patch tokens N.

    Raises:
        ValueError: k out of range, with k and N.
    """
    if isinstance(k, bool) or not isinstance(k, int | float):
        raise ValueError(f"k is {k!r}; use a count (int) or a fraction in (0, 1] (float)")
    if isinstance(k, int):
        if not 1 <= k <= n:
            raise ValueError(f"k = {k} is outside 1..{n}, the number of patches; or use a fraction")
        return k
    if not 0 < k <= 1:
        raise ValueError(f"k = {k} is no fraction in (0, 1]; a count must be an int, 1..{n}")
    return max(1, min(n, math.floor(k * n + 0.5)))


def _is_some_k(k: object) -> bool:
    """Tell whether some number of patches allows k."""
    if isinstance(k, bool) or not isinstance(k, int | float):
        return False
    return k >= 1 if isinstance(k, int) else 0 < k <= 1


def _check_tokens(x: Tensor) -> None:
    if x.ndim != 3 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(f"patch tokens must be B x N x D floating; got {tuple(x.shape)} {x.dtype}")


def stability_score(
    x: Tensor,
    *,
    score: Score = "paper",
    sigma: float | None = None,
    kernel: Kernel = "centred",
    eps: float = 1e-6,
) -> Tensor:
    """Score how stable each entry is under the low pass (paper, Eq. 5).

    Args:
        x: patch tokens, B x N x D, prefix tokens already removed.
        score: with y the filtered tokens and r = |y - x|: ``paper`` y / (r + eps), as printed;
            ``repo`` x / (r + eps), as in the released code; ``abs`` |y| / (r + eps);
            ``negdist`` -r; ``value`` x, the control without a filter.
        sigma: see `lowpass.low_pass`.
        kernel: see `lowpass.low_pass`.
        eps: added to the distance; the paper gives no value. With 0, an entry 0 / 0 scores 0.

    Returns:
        Scores, B x N x D; float64 for float64 input, float32 otherwise.

    Raises:
        ValueError: an unknown option or tokens of another form.
    """
    _check_tokens(x)
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; use one of {', '.join(SCORES)}")
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps!r}; use a number from 0 on")
    wide = x if x.dtype == torch.float64 else x.float()
    if score == "value":
        return wide
    smooth = low_pass(wide, sigma, kernel)
    # In place on a fresh tensor: each temporary of the size of x costs as much as the arithmetic.
    distance = (smooth - wide).abs_()
    if score == "negdist":
        return -distance
    numerator = {"paper": smooth, "repo": wide, "abs": smooth.abs()}[score]
    ratio = numerator / distance.add_(eps)
    return ratio if eps > 0 else torch.where(numerator == 0, numerator, ratio)


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _refuse_nan(x: Tensor) -> None:
    # With a gradient, on CUDA or compiled, NaN flows on instead: the training loop's rule for
    # non-finite steps must see it on every rank alike.
    if not _eager_cpu(x) or (x.requires_grad and torch.is_grad_enabled()):
        return
    # The sum is NaN whenever an entry is, and costs a sixth of asking every entry.
    if bool(x.sum().isnan()) and bool(x.isnan().any()):
        count = int(x.isnan().any(dim=-1).sum())
        raise ValueError(f"{count} of {x.shape[0] * x.shape[1]} patch tokens hold NaN")


def _chosen(score: Tensor, k: int) -> Tensor:
    """Mark the K largest scores of each channel over the patches, ties to the lowest patch index.

    `torch.topk` promises no order among ties, so only its K-th value is used.
    Takes and returns B x N x D (bool); the patches are put last in memory to find that value.
    """
    if k == 1:
        threshold = score.amax(dim=1, keepdim=True)  # B x 1 x D
    else:
        by_channel = score.transpose(1, 2).contiguous()  # B x D x N
        threshold = by_channel.topk(k, dim=-1, sorted=False).values.amin(dim=-1).unsqueeze(1)
    reached = score >= threshold
    if _eager_cpu(score) and bool((reached.sum(dim=1, dtype=torch.int32) == k).all()):
        return reached
    above = score > threshold
    tied = reached & ~above
    room = k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))


@torch.no_grad()
def _choose(
    x: Tensor, k: int, score: Score, sigma: float | None, kernel: Kernel, eps: float
) -> Tensor:
    """Mark the K patches that each channel keeps, B x N x D bool.

    On the CPU a few images at a time, so that the half dozen passes over the scores stay in cache:
    the choice of one image does not depend on another's.
    """
    B, N, D = x.shape
    step = B
    if _eager_cpu(x):
        step = max(1, _CACHE_VALUES * torch.get_num_threads() // (N * D))
    if step >= B:
        scores = stability_score(x, score=score, sigma=sigma, kernel=kernel, eps=eps)
        return _chosen(scores, k)
    mask = torch.empty(B, N, D, dtype=torch.bool)
    for start in range(0, B, step):
        part = x[start : start + step]
        scores = stability_score(part, score=score, sigma=sigma, kernel=kernel, eps=eps)
        mask[start : start + step] = _chosen(scores, k)
    return mask


def _mean(x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.mean(dim=1).to(x.dtype)


def last_pool(
    x: Tensor,
    k: int | float,
    *,
    score: Score = "paper",
    sigma: float | None = None,
    kernel: Kernel = "centred",
    eps: float = 1e-6,
) -> Tensor:
    """Average, channel by channel, the K most stable patches (paper, Eq. 6 and 7).

    The unfiltered tokens are averaged. The choice is made without gradient: the gradient is 1/K at
    the chosen entries and 0 elsewhere. K = N is the mean.

    Args:
        x: patch tokens, B x N x D, prefix tokens already removed.
        k: patches kept per channel, a count 1..N or a fraction in (0, 1] (see `resolve_k`).
        score: see `stability_score`.
        sigma: see `lowpass.low_pass`.
        kernel: see `lowpass.low_pass`.
        eps: see `stability_score`.

    Returns:
        Pooled features, B x D, of the dtype of x; sums run in float32 or float64.

    Raises:
        ValueError: K > N, an unknown option, or NaN tokens (on the CPU, in eager mode, when no
            gradient is asked for; otherwise NaN flows into the result).
    """
    _check_tokens(x)
    count = resolve_k(k, x.shape[1])
    _refuse_nan(x)
    mask = _choose(x, count, score, sigma, kernel, eps)
    if count == x.shape[1]:
        return _mean(x)
    wide = x if x.dtype == torch.float64 else x.float()
    # A product, not torch.where: NaN and inf must not vanish because they were not chosen.
    return ((wide * mask).sum(dim=1) / count).to(x.dtype)


@torch.no_grad()
def vote_count(
    x: Tensor,
    k: int | float,
    *,
    score: Score = "paper",
    sigma: float | None = None,
    kernel: Kernel = "centred",
    eps: float = 1e-6,
) -> Tensor:
    """Count the channels that choose each patch (paper, Eq. 8).

    Args and errors as for `last_pool`.

    Returns:
        Votes, B x N int64; each row sums to K * D.
    """
    _check_tokens(x)
    count = resolve_k(k, x.shape[1])
    _refuse_nan(x.detach())
    mask = _choose(x.detach(), count, score, sigma, kernel, eps)
    return mask.sum(dim=-1, dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """How a tower pools its patch tokens: the dictionary `vision_cfg.last` of a model config.

    Fields: see `last_pool`; `pooling` is `token` (the tower's CLS output), `mean`, `max` or `last`.
    """

    pooling: str = "last"
    score: Score = "paper"
    k: int | float = 0.5
    sigma: float | None = None
    kernel: Kernel = "centred"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check every field; raises `UserError` with the names or limits there are."""
        POOLINGS[self.pooling]
        for field, value, known in (
            ("score", self.score, SCORES),
            ("kernel", self.kernel, KERNELS),
        ):
            if value not in known:
                raise unknown(field, str(value), known)
        if not _is_some_k(self.k):
            raise UserError(f"k is {self.k!r}; use a count (int) or a fraction in (0, 1] (float)")
        try:
            resolve_sigma(self.sigma, 1)
        except ValueError as error:
            raise UserError(str(error)) from None
        number = isinstance(self.eps, int | float) and not isinstance(self.eps, bool)
        if not (number and 0 <= self.eps < math.inf):
            raise UserError(f"eps is {self.eps!r}; use a number from 0 on")

    @classmethod
    def from_mapping(cls, values: Mapping[str, object], where: str) -> "PoolSpec":
        """Read a spec; unknown keys and values raise `UserError` naming `where`."""
        readable = dict(values)
        if readable.get("sigma") in ("inf", "sqrt"):
            # JSON has no infinity: the word stands for it. "sqrt" is the default by its name.
            readable["sigma"] = math.inf if readable["sigma"] == "inf" else None
        try:
            return strict(cls, readable, where)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix(where + ': ')}") from None

    def to_dict(self) -> dict[str, object]:
        """Return the fields for JSON; an infinite sigma becomes the word `inf`."""
        fields = dataclasses.asdict(self)
        if self.sigma is not None and math.isinf(self.sigma):
            fields["sigma"] = "inf"
        return fields

    def alike(self, other: "PoolSpec") -> bool:
        """Tell whether two specs pool alike: the options count for `last` alone."""
        return self == other or (self.pooling == other.pooling and self.pooling != "last")


# A pooling: (patches B x N x D, prefix tokens B x P x D, spec) -> B x D.
Pooling = Callable[[Tensor, Tensor | None, PoolSpec], Tensor]
POOLINGS: Registry[Pooling] = Registry("pooling")


@POOLINGS.add("token")
def _pool_token(patches: Tensor, prefix: Tensor | None, spec: PoolSpec) -> Tensor:
    if prefix is None or prefix.shape[1] == 0:
        raise ValueError("pooling 'token' needs the CLS token, and only patch tokens were given")
    return prefix[:, 0]


@POOLINGS.add("mean")
def _pool_mean(patches: Tensor, prefix: Tensor | None, spec: PoolSpec) -> Tensor:
    return _mean(patches)


@POOLINGS.add("max")
def _pool_max(patches: Tensor, prefix: Tensor | None, spec: PoolSpec) -> Tensor:
    return patches.max(dim=1).values


@POOLINGS.add("last")
def _pool_last(patches: Tensor, prefix: Tensor | None, spec: PoolSpec) -> Tensor:
    return last_pool(
        patches, spec.k, score=spec.score, sigma=spec.sigma, kernel=spec.kernel, eps=spec.eps
    )


def pool_tokens(patches: Tensor, prefix: Tensor | None, spec: PoolSpec) -> Tensor:
    """Pool by a spec.

    Args:
        patches: patch tokens, B x N x D.
        prefix: prefix tokens, B x P x D, CLS first; only `token` needs them.
        spec: which pooling, and its options.

    Returns:
        Pooled features, B x D.
    """
    return POOLINGS[spec.pooling](patches, prefix, spec)


def pool(
    tokens: Tensor | np.ndarray,
    pooling: str = "last",
    k: int | float = 0.5,
    *,
    score: Score = "paper",
    sigma: float | None = None,
    kernel: Kernel = "centred",
    eps: float = 1e-6,
) -> Tensor | np.ndarray:
    """Pool patch tokens of any model after the fact.

    A frozen tower's patch tokens were not trained for this: compare with `mean` before reading
    anything into the result.

    Args:
        tokens: patch tokens, B x N x D, prefix tokens already removed; torch or numpy.
        pooling: `mean`, `max` or `last`.
        k: see `last_pool`; so the other options.

    Returns:
        Pooled features, B x D, of the kind and dtype that came in.
    """
    spec = PoolSpec(pooling, score, k, sigma, kernel, eps)
    if isinstance(tokens, np.ndarray):
        # A copy only where torch cannot share the memory: read-only arrays, reversed views.
        shared = np.require(tokens, requirements=["C", "W"])
        return pool_tokens(torch.from_numpy(shared), None, spec).numpy()
    return pool_tokens(tokens, None, spec)
