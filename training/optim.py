"""AdamW with decay on matrices only, peak rates by tower and layer, and the schedule.

The schedule is a linear warm-up, then a cosine to zero, from each group's own peak. Not here: when
a step is taken (`loop`), which layer a parameter belongs to (`lazyclip.bridge`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from lazyclip import bridge

from .params import TrainArgs


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak learning rates of a model's parts.

    Fields: base, of the logit scale and of what has none of its own; image and text, of a tower's
    end (its final norm and projection), None for base; image_decay and text_decay, the factor from
    one layer to the one below it: rate x decay ** (depth + 1 - layer), where layer is 0 for
    embeddings, i + 1 for block i and depth + 1 for the final norm and the projection. That is the
    layer-wise decay of BEiT (microsoft/unilm, beit/optim_factory.py).
    """

    base: float
    image: float | None = None
    text: float | None = None
    image_decay: float = 1.0
    text_decay: float = 1.0

    @property
    def of_tower(self) -> dict[str, tuple[float, float]]:
        """Rate and decay of `image`, `text` and `scale`."""
        return {
            "image": (self.base if self.image is None else self.image, self.image_decay),
            "text": (self.base if self.text is None else self.text, self.text_decay),
            "scale": (self.base, 1.0),
        }

    @property
    def plain(self) -> bool:
        """Whether every parameter has the base rate."""
        return all(pair == (self.base, 1.0) for pair in self.of_tower.values())


def rates_of(args: TrainArgs) -> Rates:
    """Return the peak rates that a run's flags ask for."""
    return Rates(args.lr, args.lr_image, args.lr_text, args.layer_decay, args.layer_decay_text)


def peak_rates(model: nn.Module, rates: Rates) -> dict[str, float]:
    """Return each trainable parameter's peak learning rate, by its name.

    Raises:
        UserError: layers are told apart, and a parameter belongs to none that is known.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    table = rates.of_tower
    if all(decay == 1 for _, decay in table.values()):
        if rates.plain:
            return dict.fromkeys(names, rates.base)
        return {name: table[bridge.tower_of(name)][0] for name in names}
    places = bridge.layer_places(model)
    found = {}
    for name in names:
        rate, decay = table[places[name].tower]
        found[name] = rate * decay ** places[name].below_top
    return found


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], wd: float, peaks: Mapping[str, float]
) -> list[dict[str, object]]:
    """Split trainable parameters by decay and peak rate, those that decay first.

    Matrices decay; biases, gains, CLS token and logit scale do not. Where all rates are one there
    are two groups at most; a parameter's place in its group is that in the model.
    """
    decayed: dict[float, list[nn.Parameter]] = {}
    plain: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            # An axis of one is none: EVA's CLS token is 1 x 1 x D.
            axes = sum(size > 1 for size in parameter.shape)
            part = decayed if axes >= 2 else plain
            part.setdefault(peaks[name], []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": peak}
        for part, decay in ((decayed, wd), (plain, 0.0))
        for peak, parameters in part.items()
    ]


def make_optimizer(
    model: nn.Module,
    *,
    lr: float | Rates,
    betas: tuple[float, float],
    eps: float,
    wd: float,
) -> torch.optim.AdamW:
    """Make AdamW over a model's trainable parameters; each group's rate is its peak.

    Args:
        model: the bare model, towers locked as they shall be.
        lr: one peak for all, or by tower and layer.
        betas: of Adam.
        eps: of Adam.
        wd: weight decay of matrices.
    """
    rates = lr if isinstance(lr, Rates) else Rates(lr)
    groups = parameter_groups(model.named_parameters(), wd, peak_rates(model, rates))
    return torch.optim.AdamW(groups, lr=rates.base, betas=betas, eps=eps)


def peaks_of(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """Return the peak rate of each group of an optimiser that was just made."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


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


def set_rates(
    optimizer: torch.optim.Optimizer, peaks: Sequence[float], step: int, *, steps: int, warmup: int
) -> None:
    """Give each group the rate that the schedule has at a step, from the group's own peak."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = learning_rate(step, steps=steps, warmup=warmup, peak=peak)


def describe_rates(model: nn.Module, rates: Rates) -> list[str]:
    """Phrase the peak rates by tower for the banner; nothing where there is one rate for all."""
    peaks = peak_rates(model, rates)
    towers: dict[str, list[float]] = {"image": [], "text": [], "scale": []}
    for name, peak in peaks.items():
        towers[bridge.tower_of(name)].append(peak)
    if rates.plain:
        return []
    parts = []
    for tower, of_names in towers.items():
        decay = rates.of_tower[tower][1]
        if not of_names:
            text = "locked, its rate and layer decay act on nothing"
        elif min(of_names) == max(of_names):
            text = f"{max(of_names):.3g}"
        else:
            text = f"{min(of_names):.3g} (lowest layer) to {max(of_names):.3g} (top)"
        if of_names and decay != 1:
            text += f", layer decay {decay:g}"
        parts.append(f"{'logit scale' if tower == 'scale' else tower} {text}")
    return ["rates at their peak: " + "; ".join(parts)]
