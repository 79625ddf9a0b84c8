"""The demo's one page: what the world is, what each model sees, the table, and what it says.

Reads what `run` left in the folder and writes report.html there, one file without links: pictures
are inside it. Not here: the figures (`table`), the rows of pictures (`examples`).
"""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import draw, table
from .examples import Shown, examples
from .sets import CLASSES
from .world import palette

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 1240px; margin: 0 auto; padding: 24px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 36px 0 8px; }
p, ul { max-width: 820px; }
.note { color: #555; font-size: 14px; }
.said li { margin-bottom: 8px; }
table { border-collapse: collapse; }
.figures td, .figures th { padding: 4px 12px; text-align: right; border-bottom: 1px solid #ddd; }
.figures th:first-child, .figures td:first-child { text-align: left; }
.figures tr.trained td { font-weight: 600; }
.pictures { overflow-x: auto; }
.pictures td, .pictures th { padding: 3px; text-align: center; font-size: 12px; line-height: 1.2;
  font-weight: normal; vertical-align: bottom; }
.pictures th.arm { font-size: 14px; font-weight: 600; border-bottom: 2px solid #1c1c1c; }
.pictures td.first, .pictures th.first { padding-left: 16px; }
.pictures img { width: 84px; height: 84px; display: block; image-rendering: pixelated;
  margin: 0 auto 2px; }
.bar { height: 10px; width: 180px; vertical-align: middle; image-rendering: pixelated; }
.keys span { display: inline-block; margin-right: 14px; font-size: 14px; }
.keys i { display: inline-block; width: 12px; height: 12px; margin-right: 4px;
  border: 1px solid #999; vertical-align: -1px; }
svg { font: 11px system-ui, sans-serif; } svg .head { font-size: 13px; font-weight: 600; }
svg .grid { stroke: #e2e2e2; }
pre { font-size: 12px; background: #f6f6f4; padding: 10px; white-space: pre-wrap; }
footer { margin-top: 40px; border-top: 1px solid #ddd; font-size: 14px; color: #444; }
"""
INTRODUCTION = """
<p>A <b>vision transformer</b> cuts a picture into square <b>patches</b> (here 8 x 8 of them) and
passes them through layers in which every patch looks at every other. A picture needs one vector
that can be compared with a caption; usually an extra token, <b>CLS</b>, gathers it. The CLS token
is lazy: it is content with whatever patches give the answer, and those need not lie on the object.
Then the patches themselves say little about what is where.</p>
<p><b>LaSt</b> leaves the CLS token aside. For every channel it takes the K patches whose values
are the most stable under a smoothing along the channels, and averages them. Nothing is added that
must be learnt; only the way of gathering changes. Both models below have the same size, saw the
same pictures in the same order, and were trained with captions only: no box, no mask.</p>
<p>The <b>world</b> is synthetic. A thing has one of four colours and one of three fills (plain,
striped, dotted): these twelve classes are in the caption, together with an outline, which says
nothing about the class. The ground is not mentioned, yet in 70 % of the training pictures it is the
one that goes with the class. In the test pictures shown here it never is.</p>
"""
CAUTION = """
<p class="note">Read with care: this is one seed of a small synthetic world, and K = 1 is not the
paper's K (half of the patches); the objects here are smaller than half of the picture, so K must be
small. Between seeds, Point-in-Box of the token model varies by about 12 points to either side, that
of LaSt by about 6, top-1 by about 1 and mIoU 1 by about 4. mIoU 1 alone measures naming as much as
finding: painting each whole picture with one class does well in it, which is why the table has that
row and why the pictures below hold two objects.</p>
"""


def _figure_table(figures: Sequence[table.Figure], trained: Sequence[str]) -> str:
    heads = "".join(f"<th>{html.escape(c.heading)}</th>" for c in table.COLUMNS)
    lines = [f"<tr><th></th>{heads}</tr>"]
    for name, values in table.pivot(figures).items():
        cells = "".join(f"<td>{table.shown(values.get(c.key), c)}</td>" for c in table.COLUMNS)
        mark = ' class="trained"' if name in trained else ""
        lines.append(f"<tr{mark}><td>{html.escape(name)}</td>{cells}</tr>")
    meanings = "".join(
        f"<li><b>{html.escape(c.heading)}</b>: {html.escape(c.meaning)}</li>" for c in table.COLUMNS
    )
    rows = (
        "<li><b>untrained</b>: the same tower with random weights; <b>painted</b>: each whole "
        "picture filled with the class that the model gives it; <b>centre patch</b>: always the "
        "middle of the picture; <b>chance</b>: a blind guess</li>"
    )
    return (
        f'<table class="figures">{"".join(lines)}</table>'
        f'<p class="note">Per cent, AUROC as a fraction.</p><ul class="note">{meanings}{rows}</ul>'
    )


def _curve(path: Path, key: str) -> tuple[list[float], list[float]]:
    x, y = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values.get(key) is not None:
            x.append(float(values["samples"]))
            y.append(float(values[key]))
    return x, y


def curves(folder: Path, arms: Sequence[Shown]) -> str:
    """Return loss and top-1 over samples seen, as two charts."""
    charts = []
    for key, title, y_title, factor, ends in (
        ("train/loss", "Training loss", "nats", 1, None),
        ("probe/top1", "Zero-shot top-1, first 300 test pictures", "per cent", 100, (0.0, 100.0)),
    ):
        lines = []
        for arm in arms:
            x, y = _curve(folder / "logs" / arm.name / "metrics.jsonl", key)
            lines.append((arm.label, x, [factor * value for value in y]))
        charts.append(
            draw.line_chart(
                lines, title=title, x_title="samples seen", y_title=y_title, y_range=ends
            )
        )
    return "".join(charts)


def _class_keys() -> str:
    colours = palette()
    spans = [
        f'<span><i style="background: rgb{tuple(colours[3 * i + 3 : 3 * i + 6])}"></i>{name}</span>'
        for i, name in enumerate(CLASSES)
    ]
    return f'<p class="keys">{"".join(spans)}</p>'


def _footer(results: Mapping[str, Any]) -> str:
    record = results["record"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
    git = record["git"]
    commit = (
        f"{git['commit']}{' with changes' if git['dirty'] else ''}" if git["commit"] else "none"
    )
    by_arm = [f["command"] for f in results["figures"] if f["command"].startswith("python")]
    commands = "\n".join([*results["training"].values(), *dict.fromkeys(by_arm)])
    return (
        f"<footer><p>Made by <code>{html.escape(record['command'])}</code>, seed "
        f"{results['seed']}, config {record['config_hash']}, commit {html.escape(commit)}, "
        f"{record['start']}, {results['seconds']['total']:.0f} s in all. "
        f"{html.escape(versions)}.</p>"
        f"<details><summary>The commands behind the figures (table.csv has one a line)</summary>"
        f"<pre>{html.escape(commands)}</pre></details></footer>"
    )


def write_page(folder: Path) -> Path:
    """Write report.html from what a run left in the demo's folder; returns its path."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    figures = [table.Figure(**figure) for figure in results["figures"]]
    trained = [Shown(arm["name"], arm["label"]) for arm in results["arms"] if arm["trained"]]
    main, extra = trained[:2], trained[2:]
    said = "".join(f"<li>{html.escape(text)}</li>" for text in table.sentences(figures))
    parts = [
        "<h1>What a lazy CLS token costs, and what another way of gathering brings</h1>",
        INTRODUCTION,
        f'<h2>What came out</h2><ul class="said">{said}</ul>',
        _figure_table(figures, [arm.label for arm in trained]),
        CAUTION,
        "<h2>Pictures with two things</h2><p><b>Patch score</b>: how near each patch is to the "
        "model's own vector of the picture. <b>Text map</b>: how near it is to the words below it, "
        "left thing first. <b>Votes</b>: for how many channels LaSt picked the patch. "
        "<b>Masks</b>: the class whose words are nearest, at every pixel, pale where the score "
        "does not look: it counts the pixels of the things only. The first pictures of the set, "
        "not chosen ones.</p>",
        _class_keys(),
        examples(folder, main, "two", 6),
        "<h2>Pictures with one thing</h2>",
        examples(folder, main, "one", 4),
    ]
    if extra:
        parts += [
            "<h2>Other ways of gathering</h2><p>The same for the other models, K up to half of the "
            "patches among them.</p>",
            *(examples(folder, [arm], "two", 3) for arm in extra),
        ]
    parts += ["<h2>How the training went</h2>", curves(folder, trained), _footer(results)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lazyclip: the demonstration</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file
