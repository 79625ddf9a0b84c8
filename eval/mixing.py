"""Two models of one shape mixed weight by weight, as WiSE-FT does.

theta = (1 - alpha) theta_start + alpha theta_tuned, for every parameter, the logit scale (kept as a
logarithm, as CLIP trains it) included. Wortsman et al., "Robust fine-tuning of zero-shot models"
(arXiv 2109.01903), Eq. 1. Not here: which models, and how a mixture is scored (`interpolate`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lazyclip.base.errors import UserError

State = Mapping[str, Tensor]
MOST_ALPHAS = 201
NAMED = 4


def parse_alphas(text: str, flag: str = "--alphas") -> tuple[float, ...]:
    """Read shares of the tuned weights, such as `0,0.1,...,1` or `0,0.5,1`, in rising order.

    Args:
        text: numbers of 0..1; `...` between two numbers goes on in the step before it.
        flag: that gave the text, for the message.

    Raises:
        UserError: no number, one outside 0..1 or named twice, or a `...` that leads nowhere.
    """
    found: list[float] = []
    words = [word.strip() for word in text.split(",")]
    for place, word in enumerate(words):
        if word not in ("...", "…"):
            found.append(_share(word, flag))
            continue
        after = _share(words[place + 1], flag) if place + 1 < len(words) else 0.0
        step = found[-1] - found[-2] if len(found) > 1 else 0.0
        count = round((after - found[-1]) / step) if step > 0 else 0
        if not 0 < count < MOST_ALPHAS or abs(found[-1] + count * step - after) > 1e-6:
            raise UserError(
                f"{flag} {text}: '...' stands between two numbers and a last one that the step "
                "meets, as in 0,0.1,...,1"
            )
        found += [round(found[-1] + n * step, 6) for n in range(1, count)]
    twice = sorted({a for a in found if found.count(a) > 1})
    if twice:
        raise UserError(f"{flag} {text} names {twice[0]:g} twice; name each share once")
    return tuple(sorted(found))


def _share(word: str, flag: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise UserError(f"{flag}: '{word}' is no share of the tuned weights; use numbers of 0..1")
    return round(value, 6)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def check_pair(start: State, tuned: State, names: tuple[str, str]) -> None:
    """Check that two state dicts can be mixed.

    Args:
        start: weights at alpha 0.
        tuned: weights at alpha 1.
        names: of the two, for the message.

    Raises:
        UserError: tensors that one lacks, of another shape, or counts that differ, all by name.
    """
    both = [key for key in start if key in tuned]
    faults = (
        ("only in the start", [key for key in start if key not in tuned]),
        ("only in the tuned", [key for key in tuned if key not in start]),
        (
            "of another shape",
            [
                f"{key} ({_sizes(start[key])} and {_sizes(tuned[key])})"
                for key in both
                if start[key].shape != tuned[key].shape
            ],
        ),
        (
            "no weights, and not equal",
            [
                key
                for key in both
                if start[key].shape == tuned[key].shape
                and not start[key].is_floating_point()
                and not torch.equal(start[key], tuned[key])
            ],
        ),
    )
    said = [f"{len(keys)} {word}: {_some(keys)}" for word, keys in faults if keys]
    if said:
        raise UserError(
            f"{names[0]} and {names[1]} cannot be mixed; tensors {'; '.join(said)}; give the model "
            "that the fine-tune began with as --start"
        )


def _sizes(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def mix(start: State, tuned: State, alpha: float) -> dict[str, Tensor]:
    """Mix two state dicts that `check_pair` has passed.

    Args:
        start: name -> tensor, alpha 0.
        tuned: the same names and shapes, alpha 1.
        alpha: share of the tuned weights, 0..1.

    Returns:
        New tensors in the dtype of `tuned`, computed in float64; at 0 and 1 exactly the given ones.
        What is no weight (whole numbers) is taken from `tuned`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha = {alpha} is outside 0..1")
    mixed = {}
    for name, after in tuned.items():
        before = start[name]
        if alpha in (0, 1) or not after.is_floating_point():
            # Not by the formula: 0 x w would lose signed zeros, and 0 x inf is no number.
            mixed[name] = (before if alpha == 0 else after).clone().to(after.dtype)
            continue
        total = (1 - alpha) * before.double() + alpha * after.double()
        mixed[name] = total.to(after.dtype)
    return mixed
