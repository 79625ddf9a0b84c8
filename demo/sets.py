"""What the demo's pictures show: classes, captions, and the drawing of sets of pictures.

Twelve classes, four colours times three fills; the outline of the object is a distractor. Each
class has a background texture of its own. Not here: how a picture is drawn from its parameters
(`scene`), the files (`world`).
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from .scene import (
    COLOURS,
    FILLS,
    SHAPES,
    SIDE,
    TEXTURES,
    Backgrounds,
    Floats,
    Ints,
    Masks,
    Objects,
    compose,
    extent,
    mask_boxes,
    object_masks,
    scale_for,
)

Pictures = npt.NDArray[np.uint8]

CLASSES = tuple(f"{fill} {colour}" for colour in COLOURS for fill in FILLS)
# Own texture of each class. The hue of texture t is t / 12, and none lies within 1/4 turn of the
# colour of its class: otherwise objects would vanish in just the pictures with their own texture.
OWN_TEXTURE = (4, 6, 9, 8, 11, 1, 0, 2, 3, 5, 7, 10)
SHARE = (0.06, 0.17)  # of the picture that an object covers, before pixels are counted
CAPTIONS = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "there is a {} here",
    "this is a {}",
    "one {} in the picture",
    "a {}",
    "look at the {}",
)
# Zero-shot prompts look like the captions: fill, colour, shape.
PROMPTS = tuple(
    f"{start} a {{}} {shape}"
    for start in ("a photo of", "a picture of")
    for shape in ("circle", "square", "star", "heart")
)


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Pictures of one or more objects each; o is the number of objects in a picture.

    Attributes:
        pictures: n x 64 x 64 x 3.
        masks: n x o x 64 x 64, exact, without overlap.
        boxes: n x o x 4, x0 y0 x1 y1, 0-based, inclusive.
        classes: n x o, index in CLASSES.
        shapes: n x o, index in SHAPES.
        textures: n, index of the background texture.
    """

    pictures: Pictures
    masks: Masks
    boxes: Ints
    classes: Ints
    shapes: Ints
    textures: Ints

    def label_maps(self) -> npt.NDArray[np.uint8]:
        """Return n x 64 x 64: 0 background, class index + 1 on objects."""
        ids = (self.classes + 1)[..., None, None] * self.masks
        return ids.sum(axis=1).astype(np.uint8)


def _draw_objects(n: int, classes: Ints, rng: np.random.Generator) -> tuple[Objects, Floats]:
    """Draw outlines, sizes, places and fills; returns them and their bounds n x 4 in pixels."""
    shape = rng.integers(len(SHAPES), size=n)
    scale = scale_for(shape, rng.uniform(*SHARE, size=n).astype(np.float32))
    angle = rng.uniform(-0.3, 0.3, size=n).astype(np.float32)
    left, up, right, down = extent(shape, scale, angle).T
    x = left + rng.random(n, dtype=np.float32) * (SIDE - left - right)
    y = up + rng.random(n, dtype=np.float32) * (SIDE - up - down)
    objects = Objects(
        colour=classes // len(FILLS),
        fill=classes % len(FILLS),
        shape=shape,
        scale=scale,
        angle=angle,
        x=x,
        y=y,
        turn=rng.uniform(0, np.pi, size=n).astype(np.float32),
        period=rng.uniform(7.5, 8.5, size=n).astype(np.float32),
        phase=rng.random((n, 2), dtype=np.float32),
    )
    return objects, np.stack([x - left, y - up, x + right, y + down], axis=1)


def _draw_grounds(textures: Ints, rng: np.random.Generator) -> Backgrounds:
    n = len(textures)
    return Backgrounds(
        texture=textures,
        contrast=rng.uniform(0.15, 0.35, size=n).astype(np.float32),
        phase=rng.random((n, 2), dtype=np.float32),
    )


def _other_texture(owned: Ints, rng: np.random.Generator) -> Ints:
    """Draw a texture that is not in `owned` (n x o), evenly among the others."""
    free = np.ones((len(owned), TEXTURES), dtype=bool)
    np.put_along_axis(free, owned, False, axis=1)
    return np.argmax(rng.random(free.shape) * free, axis=1)


def draw_single(n: int, own: float, rng: np.random.Generator) -> PictureSet:
    """Draw n pictures of one object, on the class's own texture with probability `own`."""
    classes = rng.integers(len(CLASSES), size=n)
    owned = np.array(OWN_TEXTURE)[classes]
    other = _other_texture(owned[:, None], rng)
    textures = np.where(rng.random(n) < own, owned, other)
    objects, _ = _draw_objects(n, classes, rng)
    masks = object_masks(objects)
    pictures = compose(_draw_grounds(textures, rng), [objects], [masks], rng)
    return PictureSet(
        pictures=pictures,
        masks=masks[:, None],
        boxes=mask_boxes(masks)[:, None],
        classes=classes[:, None],
        shapes=objects.shape[:, None],
        textures=textures,
    )


def _apart(first: Floats, second: Floats) -> Masks:
    """Tell which pairs of bounds n x 4 lie at least a pixel apart."""
    gaps: Masks = (first[:, 2:] + 1 < second[:, :2]) | (second[:, 2:] + 1 < first[:, :2])
    return np.any(gaps, axis=1)


def _take(objects: Objects, rows: Ints) -> Objects:
    return Objects(**{f.name: getattr(objects, f.name)[rows] for f in dataclasses.fields(Objects)})


def draw_two(n: int, rng: np.random.Generator) -> PictureSet:
    """Draw n pictures of two objects of different classes, boxes apart, on neither's own texture.

    Pairs whose boxes meet are drawn again, size and all, so objects are a little smaller here.
    """
    tries = 12 * n + 100  # about one pair in four fits
    first = rng.integers(len(CLASSES), size=tries)
    second = (first + rng.integers(1, len(CLASSES), size=tries)) % len(CLASSES)
    (one, bounds_one), (two, bounds_two) = (_draw_objects(tries, c, rng) for c in (first, second))
    rows = np.flatnonzero(_apart(bounds_one, bounds_two))[:n]
    if len(rows) < n:
        raise RuntimeError(f"only {len(rows)} of {n} pairs of objects fit; raise the tries")
    objects = [_take(one, rows), _take(two, rows)]
    classes = np.stack([first[rows], second[rows]], axis=1)
    textures = _other_texture(np.array(OWN_TEXTURE)[classes], rng)
    masks = [object_masks(item) for item in objects]
    pictures = compose(_draw_grounds(textures, rng), objects, masks, rng)
    return PictureSet(
        pictures=pictures,
        masks=np.stack(masks, axis=1),
        boxes=np.stack([mask_boxes(mask) for mask in masks], axis=1),
        classes=classes,
        shapes=np.stack([item.shape for item in objects], axis=1),
        textures=textures,
    )


def caption_of(class_index: int, shape: int, template: int) -> str:
    """Return a caption: one of the templates around fill, colour and shape."""
    return CAPTIONS[template].format(f"{CLASSES[class_index]} {SHAPES[shape]}")
