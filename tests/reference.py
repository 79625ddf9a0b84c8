"""The pooling once more, from the paper's formulas, in numpy float64 with loops and DFT sums.

Slow on purpose and independent of the library: imports numpy only. One image at a time.
Letters: N patch tokens, D channels, K patches kept per channel, h, w patch grid.
"""

import math

import numpy as np

SCORES = ("paper", "repo", "abs", "negdist", "value")


def gaussian_weights(width: int, sigma: float, kernel: str) -> np.ndarray:
    """Weight of each DFT bin 0..D-1, peak at frequency 0 (`centred`).

    `repo`: as the released code lays them, positions -D/2+1 .. D/2 over the shifted spectrum, whose
    frequencies are -D/2 .. D/2-1 for even D and -(D-1)/2 .. (D-1)/2 for odd D.
    """
    weights = np.zeros(width)
    lowest = -(width // 2)
    for place in range(width):
        frequency = lowest + place
        position = frequency
        if kernel == "repo":
            position = -(width // 2) + 1 + place if width % 2 == 0 else frequency
        if sigma == 0:
            weight = 1.0 if position == 0 else 0.0
        else:
            weight = math.exp(-(position**2) / (2 * sigma**2))
        weights[frequency % width] = weight
    return weights


def low_pass(x: np.ndarray, sigma: float | None = None, kernel: str = "centred") -> np.ndarray:
    """Eq. 4 of N x D tokens by explicit sums: forward transform, weights, inverse, real part."""
    x = np.asarray(x, dtype=np.float64)
    width = x.shape[-1]
    sigma = math.sqrt(width) if sigma is None else sigma
    if math.isinf(sigma):
        return x
    weights = gaussian_weights(width, sigma, kernel)
    result = np.zeros_like(x)
    channel = np.arange(width)
    for f in range(width):
        turn = 2 * np.pi * ((f * channel) % width) / width
        # The bin's complex value of each token, in two real sums.
        real = (x * np.cos(turn)).sum(axis=-1, keepdims=True)
        imaginary = -(x * np.sin(turn)).sum(axis=-1, keepdims=True)
        result += weights[f] * (real * np.cos(turn) - imaginary * np.sin(turn)) / width
    return result


def stability(
    x: np.ndarray,
    score: str = "paper",
    sigma: float | None = None,
    kernel: str = "centred",
    eps: float = 1e-6,
) -> np.ndarray:
    """Eq. 5 and its four variants, entry by entry; 0 / 0 scores 0."""
    x = np.asarray(x, dtype=np.float64)
    smooth = low_pass(x, sigma, kernel)
    result = np.zeros_like(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            distance = abs(smooth[i, j] - x[i, j])
            if score == "negdist":
                result[i, j] = -distance
                continue
            if score == "value":
                result[i, j] = x[i, j]
                continue
            top = {"paper": smooth[i, j], "repo": x[i, j], "abs": abs(smooth[i, j])}[score]
            bottom = distance + eps
            if bottom > 0:
                result[i, j] = top / bottom
            else:
                result[i, j] = 0.0 if top == 0 else math.copysign(math.inf, top)
    return result


def kept(fraction: float, n: int) -> int:
    """K for a fraction of N: rounded half up, within 1..N."""
    return max(1, min(n, math.floor(fraction * n + 0.5)))


def choose(scores: np.ndarray, k: int) -> np.ndarray:
    """Eq. 6: mark the K largest of each column; among equals the lowest index."""
    n, width = scores.shape
    marked = np.zeros((n, width), dtype=bool)
    for j in range(width):
        order = sorted(range(n), key=lambda i: (-scores[i, j], i))
        for i in order[:k]:
            marked[i, j] = True
    return marked


def pooled(x: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Eq. 7: the mean of the chosen unfiltered entries of each channel."""
    x = np.asarray(x, dtype=np.float64)
    return np.array([math.fsum(x[marked[:, j], j]) / marked[:, j].sum() for j in range(x.shape[1])])


def last_pool(x: np.ndarray, k: int, **options) -> np.ndarray:
    """Eq. 4 to 7 in one."""
    return pooled(x, choose(stability(x, **options), k))


def votes(marked: np.ndarray) -> np.ndarray:
    """Eq. 8: how many channels chose each patch."""
    return np.array([sum(1 for v in row if v) for row in marked])


def gradient(marked: np.ndarray, upstream: np.ndarray) -> np.ndarray:
    """d(upstream . Q)/dx: upstream/K at the chosen entries, 0 elsewhere."""
    result = np.zeros(marked.shape)
    for i, j in zip(*np.nonzero(marked), strict=True):
        result[i, j] = upstream[j] / marked[:, j].sum()
    return result


def _cubic(distance: float, a: float) -> float:
    d = abs(distance)
    if d < 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    if d < 2:
        return a * (((d - 5) * d + 8) * d - 4)
    return 0.0


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Bicubic interpolation with antialias along one axis, new x old.

    Pixel centres at +1/2; when shrinking, the kernel is as much wider as the picture gets smaller;
    weights outside the picture are dropped and the rest scaled to sum 1. a = -1/2.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    matrix = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * scale
        first = max(0, int(centre - 2 * stretch + 0.5))
        last = min(old, int(centre + 2 * stretch + 0.5))
        for column in range(first, last):
            matrix[row, column] = _cubic((column - centre + 0.5) / stretch, -0.5)
        matrix[row] /= matrix[row].sum()
    return matrix


def resize_positions(
    positions: np.ndarray, old: tuple[int, int], new: tuple[int, int], prefix: int = 1
) -> np.ndarray:
    """Interpolate (P + h*w) x D position embeddings from one grid to another, axis by axis."""
    patches = np.asarray(positions[prefix:], dtype=np.float64).reshape(*old, -1)
    rows, columns = resize_matrix(old[0], new[0]), resize_matrix(old[1], new[1])
    out = np.zeros((*new, patches.shape[-1]))
    for y in range(new[0]):
        for x in range(new[1]):
            for v in range(old[0]):
                for u in range(old[1]):
                    out[y, x] += rows[y, v] * columns[x, u] * patches[v, u]
    return np.concatenate([positions[:prefix], out.reshape(new[0] * new[1], -1)])
