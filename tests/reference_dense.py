"""The last block by each dense method, and positions by the published interpolation, step by step.

From the papers' formulas in numpy float64 with loops; slow on purpose and independent of the
library: imports numpy only. One image at a time.
Letters: T tokens with prefix, D width, d width of a head, h, w patch grid.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

# method -> pairs whose softmaxes are added (none: identity), Gaussian, residual, MLP.
TABLE = {
    "vanilla": (("qk",), False, True, True),
    "maskclip": ((), False, True, True),
    "sclip": (("qq", "kk"), False, True, True),
    "clearclip": (("qq",), False, False, False),
    "naclip": (("kk",), True, False, False),
}
Linear = tuple[np.ndarray, np.ndarray | None]  # weight out x in, bias


@dataclasses.dataclass
class Block:
    """A pre-norm block as plain numbers; what a tower lacks is left at its default."""

    heads: int
    norm1: tuple[np.ndarray, np.ndarray, float]
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    norm2: tuple[np.ndarray, np.ndarray, float]
    mlp: Callable[[np.ndarray], np.ndarray]
    scale1: np.ndarray | float = 1.0
    scale2: np.ndarray | float = 1.0
    rope: np.ndarray | None = None  # N x 2d, or heads x N x 2d: sines, then cosines
    q_norm: tuple[np.ndarray, np.ndarray, float] | None = None
    k_norm: tuple[np.ndarray, np.ndarray, float] | None = None
    inner_norm: tuple[np.ndarray, np.ndarray, float] | None = None
    gate: Linear | None = None


def linear(x: np.ndarray, layer: Linear) -> np.ndarray:
    weight, bias = layer
    y = x @ weight.T
    return y if bias is None else y + bias


def layer_norm(x: np.ndarray, norm: tuple[np.ndarray, np.ndarray, float]) -> np.ndarray:
    weight, bias, eps = norm
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def rotate(x: np.ndarray, rope: np.ndarray, prefix: int) -> np.ndarray:
    """Turn each pair of neighbouring channels of a patch by its angle; prefix tokens stay."""
    turned = x.copy()
    half = rope.shape[-1] // 2
    for token in range(prefix, len(x)):
        sin, cos = rope[token - prefix, :half], rope[token - prefix, half:]
        for c in range(0, x.shape[1], 2):
            a, b = x[token, c], x[token, c + 1]
            turned[token, c] = a * cos[c] - b * sin[c]
            turned[token, c + 1] = b * cos[c + 1] + a * sin[c + 1]
    return turned


def gaussian(grid: tuple[int, int], prefix: int, sigma: float = 5.0) -> np.ndarray:
    """exp(-r^2 / (2 sigma^2)) for two patches at distance r; 0 where a prefix token is one."""
    tokens = prefix + grid[0] * grid[1]
    near = np.zeros((tokens, tokens))
    for i in range(grid[0] * grid[1]):
        for j in range(grid[0] * grid[1]):
            rows, columns = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
            near[prefix + i, prefix + j] = math.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    return near


def attention(
    method: str, q: np.ndarray, k: np.ndarray, grid: tuple[int, int], prefix: int
) -> np.ndarray:
    """Weights T x T of one head."""
    pairs, with_gaussian = TABLE[method][:2]
    if not pairs:
        return np.eye(len(q))
    bias = gaussian(grid, prefix) if with_gaussian else np.zeros((len(q), len(q)))
    weights = np.zeros((len(q), len(q)))
    for left, right in pairs:
        a, b = {"q": q, "k": k}[left], {"q": q, "k": k}[right]
        for t in range(len(q)):
            logits = np.array([a[t] @ b[u] for u in range(len(q))]) / math.sqrt(q.shape[1])
            weights[t] += softmax(logits + bias[t])
    return weights


def last_block(
    x: np.ndarray, block: Block, method: str, grid: tuple[int, int], prefix: int = 1
) -> np.ndarray:
    """T x D into the last block -> T x D out of it, before the final norm."""
    _, _, residual, with_mlp = TABLE[method]
    x = np.asarray(x, dtype=np.float64)
    z = layer_norm(x, block.norm1)
    q, k, v = (linear(z, layer) for layer in (block.q, block.k, block.v))
    d = q.shape[1] // block.heads
    values = np.zeros_like(v)
    for head in range(block.heads):
        own = slice(head * d, (head + 1) * d)
        qh, kh = q[:, own], k[:, own]
        if block.q_norm is not None:
            qh, kh = layer_norm(qh, block.q_norm), layer_norm(kh, block.k_norm)
        if block.rope is not None:
            table = block.rope[head] if block.rope.ndim == 3 else block.rope
            qh, kh = rotate(qh, table, prefix), rotate(kh, table, prefix)
        values[:, own] = attention(method, qh, kh, grid, prefix) @ v[:, own]
    if block.inner_norm is not None:
        values = layer_norm(values, block.inner_norm)
    if block.gate is not None:
        values = values * sigmoid(linear(z, block.gate))
    attended = block.scale1 * linear(values, block.out)
    y = x + attended if residual else attended
    return y + block.scale2 * block.mlp(layer_norm(y, block.norm2)) if with_mlp else y


# --- positions as the published code interpolates them --------------------------------------------


def _keys(distance: float, a: float = -0.75) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


def _offset_axis(old: int, new: int) -> list[list[tuple[int, float]]]:
    """Where each of floor(old * scale) samples reads, scale = (new + 0.1) / old; edges repeat."""
    scale = (new + 0.1) / old
    reads = []
    for place in range(math.floor(old * scale)):
        centre = (place + 0.5) / scale - 0.5
        first = math.floor(centre)
        reads.append(
            [(min(max(first + i, 0), old - 1), _keys(centre - first - i)) for i in (-1, 0, 1, 2)]
        )
    return reads


def offset_positions(
    positions: np.ndarray, old: tuple[int, int], new: tuple[int, int], prefix: int = 1
) -> np.ndarray:
    """Bicubic without antialias of (P + h*w) x D position embeddings, prefix rows untouched."""
    patches = np.asarray(positions[prefix:], dtype=np.float64).reshape(*old, -1)
    rows, columns = _offset_axis(old[0], new[0]), _offset_axis(old[1], new[1])
    out = np.zeros((len(rows), len(columns), patches.shape[-1]))
    for y, above in enumerate(rows):
        for x, beside in enumerate(columns):
            for v, by in above:
                for u, bx in beside:
                    out[y, x] += by * bx * patches[v, u]
    return np.concatenate([positions[:prefix], out.reshape(-1, patches.shape[-1])])
