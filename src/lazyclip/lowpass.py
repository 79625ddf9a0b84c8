"""The Gaussian low pass along the channels of a token (paper, Eq. 4).

Computed as ``irfft(rfft(x) * weights)``: real input, half the spectrum, no complex copy of the full
width. Not here: what the filtered tokens are used for (`pooling`).
"""

import functools
import math
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["centred", "repo"]
KERNELS: tuple[Kernel, ...] = ("centred", "repo")


def resolve_sigma(sigma: float | None, width: int) -> float:
    """Return the deviation of the Gaussian in frequency bins; None means sqrt(D).

    Source: ChengShiest/LAST-ViT cls_pretrain/conf.py uses sqrt(D); the paper gives no value.
    """
    if sigma is None:
        return math.sqrt(width)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not sigma >= 0:
        raise ValueError(f"sigma is {sigma!r}; use None (sqrt(D)) or a number from 0 to inf")
    return float(sigma)


def half_spectrum_weights(width: int, sigma: float, kernel: Kernel = "centred") -> Tensor:
    """Compute the weights of the D // 2 + 1 frequencies of a real transform.

    Args:
        width: number of channels D.
        sigma: deviation in bins; 0 passes the mean of the channels only.
        kernel: ``centred`` peaks at frequency zero. ``repo`` follows the released code, whose peak
            lies one bin beside zero for even D; the real part that it takes turns that into the
            mean of both neighbours' weights at every bin but the highest.

    Returns:
        Weights, D // 2 + 1, float64, within [0, 1].
    """
    frequency = torch.arange(width // 2 + 1, dtype=torch.float64)
    if sigma == 0:
        return (frequency == 0).to(torch.float64)

    def gauss(f: Tensor) -> Tensor:
        return torch.exp(-(f**2) / (2 * sigma**2))

    if kernel == "centred" or width % 2 == 1:
        return gauss(frequency)
    weights = (gauss(frequency - 1) + gauss(frequency + 1)) / 2
    weights[-1] = gauss(frequency[-1] - 1)
    return weights


@functools.lru_cache(maxsize=64)
def _cached_weights(
    width: int, sigma: float, kernel: Kernel, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # Kept outside the modules' buffers: `model.to(bfloat16)` would round a buffer's digits away.
    with torch.inference_mode(False), torch.no_grad():
        return half_spectrum_weights(width, sigma, kernel).to(dtype=dtype, device=device)


def _weights(x: Tensor, sigma: float, kernel: Kernel) -> Tensor:
    if torch.compiler.is_compiling() or x.device.type == "meta":
        # Inside a compiled graph the constants are folded; a Python cache would break the graph.
        return half_spectrum_weights(x.shape[-1], sigma, kernel).to(dtype=x.dtype, device=x.device)
    return _cached_weights(x.shape[-1], sigma, kernel, x.dtype, x.device)


def low_pass(x: Tensor, sigma: float | None = None, kernel: Kernel = "centred") -> Tensor:
    """Filter each token along its channels (paper, Eq. 4).

    Args:
        x: tokens, ... x D, floating.
        sigma: deviation of the Gaussian in frequency bins. None: sqrt(D); 0: every channel becomes
            the mean of the channels; inf: the identity.
        kernel: ``centred`` or ``repo`` (see `half_spectrum_weights`).

    Returns:
        Filtered tokens of the same shape; float64 for float64 input, float32 otherwise.

    Raises:
        ValueError: unknown kernel, sigma below zero, or x not floating.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; use one of {', '.join(KERNELS)}")
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"tokens must be floating, ... x D; got {x.dtype} {tuple(x.shape)}")
    width = x.shape[-1]
    deviation = resolve_sigma(sigma, width)
    x = x if x.dtype == torch.float64 else x.float()
    if math.isinf(deviation) or x.numel() == 0:  # MKL refuses an empty transform
        return x
    # Autocast is switched off: a transform in bf16 would change which patches are picked.
    with torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False):
        spectrum = torch.fft.rfft(x, dim=-1)
        return torch.fft.irfft(spectrum * _weights(x, deviation, kernel), n=width, dim=-1)
