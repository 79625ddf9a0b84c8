"""AdamW with decay on matrices only, and the schedule: linear warm-up, then cosine to zero.

Not here: when a step is taken (`loop`).
"""

import math
from collections.abc import Iterable

import torch
from torch import nn


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], wd: float
) -> list[dict[str, object]]:
    """Split trainable parameters: matrices decay; biases, gains, CLS token, logit scale do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            # An axis of one is none: EVA's CLS token is 1 x 1 x D.
            axes = sum(size > 1 for size in parameter.shape)
            (decayed if axes >= 2 else plain).append(parameter)
    return [{"params": decayed, "weight_decay": wd}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, wd: float
) -> torch.optim.AdamW:
    """Make AdamW over a model's trainable parameters."""
    groups = [g for g in parameter_groups(model.named_parameters(), wd) if g["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


def default_warmup(steps: int) -> int:
    """Return the warm-up length where none is given: a tenth of the run, at most 1000 steps."""
    return min(1000, math.ceil(steps / 10))


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of a step.

    Args:
        step: 0..steps - 1.
        steps: of the whole run.
        warmup: steps over which it rises linearly; the last of them has the peak.
        peak: largest value.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
