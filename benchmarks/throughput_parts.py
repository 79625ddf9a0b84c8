"""What a training step is made of: phases by the clock, and kernels by their kind.

Not here: samples per second.
"""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from throughput_steps import CLIP, Ours, sync
from torch.profiler import ProfilerActivity, profile

from lazyclip.factory import Built
from training.costs import PEAKS, pooling_flop, towers_of
from training.data.pixels import to_float
from training.objectives import contrastive_loss
from training.step import gradient_norm

# First that fits; names of CUDA kernels and of torch's operators on the CPU.
KINDS = (
    ("attention", r"flash|fmha|attention|attn|softmax"),
    ("optimiser", r"multi_tensor|adam|foreach"),
    ("FFT", r"fft"),
    ("choice of patches", r"topk|sort|radix|kthvalue|gather|aten::max$|aten::ge$"),
    ("matrix products", r"gemm|cutlass|cublas|xmma|nvjet|aten::(add)?mm$|aten::bmm|linear|convol"),
    ("norms", r"layer_?norm|norm_kernel|vector_norm"),
    ("element-wise, copies", r"elementwise|memcpy|memset|copy|cat|reduce|aten::|triton"),
)
# Data sheets name a card by these; H200 computes as H100 does.
CARDS = {"A100": "a100", "H100": "h100", "H200": "h100", "GH200": "h100"}
BUSY = 0.9  # share of the time below which the card waits for the host


def flop_per_sample(built: Built) -> float:
    """FLOP of forward and backward per sample, nothing computed twice counted."""
    towers = towers_of(built.model, built.info)
    return sum(tower.training() for tower in towers.values()) + pooling_flop(built.info)


def peak_of(device: torch.device, precision: str, given: float | None) -> float | None:
    """FLOP/s of the data sheet (dense), None where the card is not known."""
    if given is not None:
        return given * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [card for word, card in CARDS.items() if word in name]
    return PEAKS[found[-1]][precision] if found else None


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of one large matrix product, the most of several: what the machine gives at best."""
    cuda = device.type == "cuda"
    n, repeats = (8192, 20) if cuda else (1024, 5)
    kind = torch.bfloat16 if precision == "amp_bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        sync(device)
        start = time.perf_counter()
        torch.mm(a, b)
        sync(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds)


def phases(ours: Ours, rounds: int) -> dict[str, float]:
    """Return the share of a step that each phase takes, the device waited for between them.

    The waiting adds a little: the shares matter, not their sum.
    """
    spent: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, seconds in _one_step(ours).items():
            spent[name] = spent.get(name, 0.0) + (seconds if turn else 0.0)
    total = sum(spent.values())
    return {name: seconds / total for name, seconds in spent.items()}


def _one_step(ours: Ours) -> dict[str, float]:
    towers, optimizer = ours.loop.towers, ours.loop.run_.optimizer
    model: Any = ours.built.model
    device, found = ours.device, dict[str, float]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        sync(device)
        start = time.perf_counter()
        made = work()
        sync(device)
        found[name] = time.perf_counter() - start
        return made

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        pixels = ours.fed.images.to(device, non_blocking=True)
        floats = to_float(pixels, towers.mean, towers.std)
        return floats, ours.fed.texts.to(device, non_blocking=True)

    optimizer.zero_grad(set_to_none=True)
    images, texts = timed("to the device", load)
    with towers.autocast():
        x = timed("image tower forward", lambda: model.encode_image(images, normalize=True))
        y = timed("text tower forward", lambda: model.encode_text(texts, normalize=True))
    loss = timed("loss", lambda: contrastive_loss(x, y, model.logit_scale.exp()))
    timed("backward", loss.backward)

    def update() -> None:
        gradient_norm(model, CLIP)
        optimizer.step()

    timed("clipping and optimiser", update)
    return found


def kind_of(name: str) -> str:
    """Return the kind of a kernel or operator by its name."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


def kernels(ours: Ours, steps: int) -> dict[str, Any]:
    """Profile whole steps.

    Returns:
        `kinds`: share of the computing time by kind; `busy`: computing time over the clock's, on
        CUDA (how far the card is kept at work), else None.
    """
    cuda = ours.device.type == "cuda"
    what = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    sync(ours.device)
    with profile(activities=what) as made:
        start = time.perf_counter()
        ours.steps(steps)
        wall = time.perf_counter() - start
    spent: dict[str, float] = {}
    for event in made.key_averages():
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if not cuda and not event.key.startswith("aten::"):
            continue
        spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0.0) + own
    total = sum(spent.values()) or 1.0
    kinds = {kind: value / total for kind, value in sorted(spent.items(), key=lambda i: -i[1])}
    return {"kinds": kinds, "busy": total / 1e6 / wall if cuda else None}


def verdict(parts: Mapping[str, Any]) -> str:
    """Say in words what bounds a step."""
    busy = parts["busy"]
    if busy is not None and busy < BUSY:
        return f"the host: the card computes {100 * busy:.0f} % of the time (larger batch, compile)"
    first = next(iter(parts["kinds"]), "nothing")
    return f"{first} ({100 * parts['kinds'].get(first, 0):.0f} % of the computing time)"
