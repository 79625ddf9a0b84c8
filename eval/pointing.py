"""The measurement behind Point-in-Box: which pictures count, their views, and the scores of a net.

Not here: the command line and the files written (`point_in_box`), the measures themselves
(`lazyclip.scores`), the geometry (`lazyclip.boxes`).
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lazyclip import bridge
from lazyclip.base.errors import UserError
from lazyclip.base.logs import Progress
from lazyclip.boxes import Box, View, crop_view, patch_hits, squash_view, to_view
from lazyclip.factory import Built
from lazyclip.pooling import vote_count
from lazyclip.scores import centre_share, chance_share, patch_score, point_in_box, wilson_interval
from lazyclip.shards import Sample
from lazyclip.tower import encode_tokens, pooling_of, project

from .samples import batches, boxes_of, class_of, picture_of

FILTERS = ("single", "single_small")
SMALL = 0.25  # of the picture's area, before any crop


@dataclasses.dataclass(frozen=True)
class Settings:
    """What defines the measurement.

    Fields: rule, see `lazyclip.boxes.RULES`; filters, of FILTERS; q `own` (the tower's pooled
    vector) or `text` (the feature of the image's class); geometry `crop` or `squash`; resize, the
    shorter side in pixels before the crop, None for squash; space `pre` or `post` the projection.
    """

    rule: str = "centre"
    filters: tuple[str, ...] = ("single",)
    q: str = "own"
    geometry: str = "crop"
    resize: int | None = None
    space: str = "pre"


class Case(NamedTuple):
    """One picture: its view 3 x H x W and its box there; both None where no filter takes it.

    `reasons` names for each filter why it leaves the picture out, None where it takes it; `target`
    is the class, -1 where none is needed.
    """

    key: str
    view: Tensor | None
    box: Box | None
    reasons: Mapping[str, str | None]
    target: int = -1


def exclusion(boxes: int, small: bool, empty: bool, filter_name: str) -> str | None:
    """Say why a filter leaves a picture out; None when it takes it.

    Args:
        boxes: how many the picture has.
        small: whether its only box covers less than `SMALL` of it.
        empty: whether the crop left nothing of the box.
        filter_name: one of FILTERS.
    """
    if boxes != 1:
        return "several_boxes" if boxes else "no_box"
    if filter_name == "single_small" and not small:
        return "not_small"
    return "empty_after_crop" if empty else None


def view_of(width: int, height: int, settings: Settings, size: tuple[int, int]) -> View:
    """Return the geometry of one picture for an input of (H, W)."""
    if settings.geometry == "squash":
        return squash_view(width, height, size[1], size[0])
    return crop_view(width, height, settings.resize or size[0], size[0])


def view_transform(built: Built, settings: Settings) -> Callable[..., Tensor]:
    """Make the transform RGB picture -> 3 x H x W whose geometry is `view_of`."""
    config = bridge.preprocess_of(built.model)
    bilinear = config.get("interpolation") == "bilinear"
    mode = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
    size = list(built.info.image_size)
    if settings.geometry == "squash":
        steps: list[Any] = [transforms.Resize(size, interpolation=mode)]
    else:
        shorter = settings.resize or size[0]
        steps = [transforms.Resize(shorter, interpolation=mode), transforms.CenterCrop(size)]
    normalise = transforms.Normalize(built.info.mean, built.info.std)
    return transforms.Compose([*steps, transforms.ToTensor(), normalise])


def make_prepare(
    settings: Settings,
    size: tuple[int, int],
    transform: Callable[..., Tensor],
    classes: int | None = None,
) -> Callable[[Sample], Case]:
    """Make the function sample -> case; it raises `samples.BadSample`.

    Args:
        settings: of the measurement.
        size: the view's (H, W).
        transform: RGB picture -> 3 x H x W.
        classes: number of classes where the image's own is needed.
    """

    def prepare(sample: Sample) -> Case:
        boxes = boxes_of(sample)
        if len(boxes) != 1:
            reasons = {name: exclusion(len(boxes), False, False, name) for name in settings.filters}
            return Case(sample.key, None, None, reasons)
        image = picture_of(sample)
        box = to_view(boxes[0], view_of(*image.size, settings, size))
        small = boxes[0].area < SMALL * image.width * image.height
        reasons = {name: exclusion(1, small, box.area <= 0, name) for name in settings.filters}
        if all(reasons.values()):
            return Case(sample.key, None, None, reasons)
        target = -1 if classes is None else class_of(sample, classes)
        return Case(sample.key, transform(image), box, reasons, target)

    return prepare


@dataclasses.dataclass(frozen=True)
class Net:
    """A model to score and, for q `text`, its own text features.

    Fields: text Q x E, unit length; query_class, the class of each of the Q.
    """

    model: nn.Module
    text: Tensor | None = None
    query_class: tuple[int, ...] = ()


def net_scores(
    net: Net,
    images: Tensor,
    targets: Sequence[int],
    settings: Settings,
    precision: str = "fp32",
    with_votes: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Score the patches of images with one net.

    Args:
        net: model, and text features for q `text`.
        images: B x 3 x H x W on the model's device.
        targets: class of each image, read for q `text` only.
        settings: of the measurement.
        precision: `fp32`, or `amp_bf16` for the tower; cosines are float32 in both.
        with_votes: count votes too, where the pooling is `last`.

    Returns:
        Scores B x N float32, and votes B x N int64 or None, on the CPU.

    Raises:
        UserError: scores that are not finite.
    """
    kind = images.device.type
    with (
        torch.inference_mode(),
        torch.autocast(kind, torch.bfloat16, enabled=precision == "amp_bf16"),
    ):
        tokens = encode_tokens(net.model, images)
        patches, q = tokens.patches, tokens.pooled
        if settings.space == "post":
            patches, q = project(net.model, patches), project(net.model, q)
    with torch.inference_mode():
        spec = pooling_of(net.model)
        votes = None
        if with_votes and spec.pooling == "last":
            votes = vote_count(
                tokens.patches, spec.k, score=spec.score, sigma=spec.sigma, kernel=spec.kernel,
                eps=spec.eps,
            ).cpu()  # fmt: skip
        if settings.q == "own":
            scores = patch_score(patches, q)
        else:
            scores = torch.stack(
                [_text_score(net, one, int(c)) for one, c in zip(patches, targets, strict=True)]
            )
    if not bool(scores.isfinite().all()):
        raise UserError("the model's patch scores are not finite; its weights are damaged")
    return scores.cpu(), votes


def _text_score(net: Net, patches: Tensor, target: int) -> Tensor:
    """Score one image's projected patches N x E with its class: the best of the class's queries."""
    if net.text is None:
        raise ValueError("q 'text' needs the net's text features")
    own = [row for row, owner in enumerate(net.query_class) if owner == target]
    queries = net.text[own]
    return patch_score(patches.expand(len(own), -1, -1), queries).amax(dim=0)


@dataclasses.dataclass
class Found:
    """What is kept of the scored pictures, in reading order, and the reasons of all others.

    Fields: taken, filter -> whether it takes each scored picture; excluded, filter -> reason ->
    count over all pictures; hit and untrained, whether the best patch lies in the box; chance and
    centre, shares; without_centre, boxes that hold no patch centre; scores h x w, votes h x w and
    boxes (view pixels, half open) of each picture, the first two kept only where asked for.
    """

    taken: dict[str, list[bool]]
    excluded: dict[str, Counter[str]]
    keys: list[str] = dataclasses.field(default_factory=list)
    boxes: list[Box] = dataclasses.field(default_factory=list)
    hit: list[bool] = dataclasses.field(default_factory=list)
    untrained: list[bool] = dataclasses.field(default_factory=list)
    chance: list[float] = dataclasses.field(default_factory=list)
    centre: list[float] = dataclasses.field(default_factory=list)
    without_centre: list[bool] = dataclasses.field(default_factory=list)
    scores: list[Tensor] = dataclasses.field(default_factory=list)
    votes: list[Tensor] = dataclasses.field(default_factory=list)


def measure(
    cases: Iterable[Case],
    nets: Sequence[Net],
    settings: Settings,
    *,
    grid: tuple[int, int],
    batch_size: int = 64,
    precision: str = "fp32",
    keep_maps: bool = False,
    progress: Progress | None = None,
) -> Found:
    """Score all cases.

    Args:
        cases: from `make_prepare`.
        nets: the model, and its untrained twin or nothing.
        settings: of the measurement.
        grid: (h, w) of the patches.
        batch_size: pictures in one pass.
        precision: see `net_scores`.
        keep_maps: keep the scores and votes of each picture.
        progress: updated by the pictures read, scored or not.
    """
    found = Found({n: [] for n in settings.filters}, {n: Counter() for n in settings.filters})
    for block in batches(cases, batch_size):
        for case in block:
            for name, reason in case.reasons.items():
                if reason is not None:
                    found.excluded[name][reason] += 1
        kept = [case for case in block if case.view is not None]
        if kept:
            _measure_batch(kept, nets, settings, grid, precision, keep_maps, found)
        if progress is not None:
            share = 100 * sum(found.hit) / max(len(found.hit), 1)
            progress.update(len(block), f"PiB {share:.1f} %")
    return found


def _measure_batch(
    kept: Sequence[Case],
    nets: Sequence[Net],
    settings: Settings,
    grid: tuple[int, int],
    precision: str,
    keep_maps: bool,
    found: Found,
) -> None:
    device = next(nets[0].model.parameters()).device
    images = torch.stack([case.view for case in kept if case.view is not None])
    boxes = [case.box for case in kept if case.box is not None]
    size = (images.shape[2], images.shape[3])
    hits = patch_hits(boxes, grid, size, settings.rule)
    found.keys += [case.key for case in kept]
    found.boxes += boxes
    for name in settings.filters:
        found.taken[name] += [case.reasons[name] is None for case in kept]
    found.chance += chance_share(hits).tolist()
    found.centre += centre_share(hits, grid).tolist()
    found.without_centre += (~patch_hits(boxes, grid, size, "centre").any(dim=1)).tolist()
    targets = [case.target for case in kept]
    images = images.to(device)
    for place, net in enumerate(nets):
        maps = keep_maps and not place
        scores, votes = net_scores(net, images, targets, settings, precision, maps)
        (found.untrained if place else found.hit).extend(point_in_box(scores, hits).tolist())
        if maps:
            found.scores += list(scores.reshape(-1, *grid))
            found.votes += [] if votes is None else list(votes.reshape(-1, *grid))


@dataclasses.dataclass(frozen=True)
class Row:
    """The result under one filter; shares are fractions.

    Fields: interval, Wilson's at 95 %; untrained and its interval None where it was left out;
    no_centre, pictures whose box holds no patch centre (they count).
    """

    filter: str
    pib: float
    interval: tuple[float, float]
    n: int
    excluded: Mapping[str, int]
    chance: float
    centre: float
    no_centre: int
    untrained: float | None
    untrained_interval: tuple[float, float] | None


def make_row(found: Found, filter_name: str) -> Row:
    """Sum up the pictures that one filter takes.

    Raises:
        UserError: none is left, with the reasons.
    """
    taken = [place for place, yes in enumerate(found.taken[filter_name]) if yes]
    excluded = dict(found.excluded[filter_name])
    n = len(taken)
    if not n:
        raise UserError(
            f"--filter {filter_name} leaves no image: excluded "
            f"{', '.join(f'{count} {reason}' for reason, count in excluded.items()) or 'none'}"
        )

    def count(values: Sequence[bool]) -> int:
        return sum(values[place] for place in taken)

    def mean(values: Sequence[float]) -> float:
        return sum(values[place] for place in taken) / n

    hits = count(found.hit)
    blind = count(found.untrained) if found.untrained else None
    return Row(
        filter=filter_name,
        pib=hits / n,
        interval=wilson_interval(hits, n),
        n=n,
        excluded=excluded,
        chance=mean(found.chance),
        centre=mean(found.centre),
        no_centre=count(found.without_centre),
        untrained=None if blind is None else blind / n,
        untrained_interval=None if blind is None else wilson_interval(blind, n),
    )
