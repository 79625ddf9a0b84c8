"""One picture of a finished run, for a page that has room for one: `python -m demo.figure`.

Three pictures with two things each: what they are, and what the words find in the patches of the
CLS-token model and of the LaSt model. Not here: the whole page (`page`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lazyclip.base.errors import UserError, cli

from . import draw
from .commands import ARMS
from .examples import FOLDERS, mask_colours, read_labels, read_maps, read_picture, shared_range
from .sets import CLASSES
from .world import palette

ROWS, SIDE, GAP, HEAD, FOOT = 3, 128, 10, 46, 20


def make_figure(folder: Path) -> Image.Image:
    """Draw the figure from what a run left in the demo's folder."""
    world = folder / "world" / "seg" / "VOCdevkit" / FOLDERS["two"]
    results = folder / "results"
    maps = {arm.name: read_maps(results / arm.name / "look" / "two.npz") for arm in ARMS}
    low, high = shared_range([m.text for m in maps.values()])
    width, height = 8 * (SIDE + GAP) + GAP, HEAD + ROWS * (SIDE + FOOT + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    big = ImageFont.load_default(size=16)

    def put(column: int, row: int, picture: np.ndarray, below: str = "") -> None:
        x, y = GAP + column * (SIDE + GAP), HEAD + row * (SIDE + FOOT + GAP)
        canvas.paste(
            Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y)
        )
        pen.text((x + SIDE / 2, y + SIDE + 2), below, "black", font, "ma")

    heads = ["picture", "truth", *["text map", "text map", "masks"] * 2]
    for column, text in enumerate(heads):
        pen.text((GAP + column * (SIDE + GAP) + SIDE / 2, 26), text, "#444444", font, "ma")
    for column, text in ((3, "CLS token"), (6, "LaSt, K = 1")):
        pen.text((GAP + column * (SIDE + GAP) + SIDE / 2, 4), text, "black", big, "ma")
    for row, name in enumerate(maps[ARMS[0].name].ids[:ROWS]):
        truth = read_labels(world / "SegmentationClass" / f"{name}.png")
        put(0, row, read_picture(world / "JPEGImages" / f"{name}.jpg"))
        put(1, row, draw.label_colours(truth, palette()))
        for number, arm in enumerate(ARMS):
            made = maps[arm.name]
            pairs = zip(made.text[row], made.classes[row], strict=True)
            for place, (text_map, index) in enumerate(pairs):
                column = 2 + 3 * number + place
                put(column, row, draw.colour_map(text_map, low, high), CLASSES[index])
            masks = results / arm.name / "seg-two" / "masks" / f"{name}.png"
            put(4 + 3 * number, row, mask_colours(masks, truth))
    return canvas


def run(argv: Sequence[str] | None = None) -> None:
    """Write the figure of a finished demo."""
    parser = argparse.ArgumentParser(prog="python -m demo.figure", description="Draw one picture.")
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="a finished demo")
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"), help="PNG to write")
    args = parser.parse_args(argv)
    if not (args.demo / "results.json").is_file():
        raise UserError(f"--demo {args.demo} holds no finished demo; run make demo first")
    make_figure(args.demo).save(args.output, optimize=True)
    print(args.output)


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
