"""The plain procedure of the segmentation benchmark against the steps of the evaluation."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from eval.segmentation.decide import by_canvas

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """Import the benchmark as running it would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("bench_seg", FOLDER / "bench_segmentation.py")
    module = importlib.util.module_from_spec(spec)
    for name in ("bench_seg", "plain_segmentation", "timing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "bench_seg", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize(("height", "width"), [(60, 80), (90, 31)])
def test_the_plain_procedure_labels_as_the_steps_on_full_maps_do(bench, threshold, height, width):
    case = bench.Case("small", 7, height, width, 250)
    plan, protocol, maps = case.plan(), case.protocol(threshold), bench.cosines(case)
    assert len(plan.boxes) > 1
    found = bench.plain(lambda i: maps[i], plan, protocol)
    expected = by_canvas(maps, plan, protocol, range(7))
    assert (found == expected).double().mean() > 0.999
    assert len(found.unique()) > 1


def test_other_label_maps_do_not_pass_the_comparison(bench, monkeypatch):
    case = bench.Case("small", 5, 60, 80, 250)
    agreement = bench.compare(case, 0.3)
    parts = {"post": [{"agreement": {"0.3": agreement}}], "image": []}
    assert bench.equal_enough(parts)
    right = bench.postprocess
    monkeypatch.setattr(
        bench,
        "postprocess",
        lambda maps, plan, protocol, queries: right(
            maps, plan, dataclasses.replace(protocol, threshold=0.31), queries
        ),
    )
    agreement = bench.compare(case, 0.3)
    assert agreement["equal"] < 1
    assert agreement["gap"] > 1e-4
    assert not bench.equal_enough({"post": [{"agreement": {"0.3": agreement}}]})


def test_the_margin_of_a_decision_is_that_of_all_steps_in_float64(bench):
    case = bench.Case("small", 4, 60, 80, 250)
    plan, protocol, maps = case.plan(), case.protocol(), bench.cosines(case)
    canvas = sys.modules["plain_segmentation"].on_canvas(lambda i: maps[i].double(), plan)
    full = torch.nn.functional.interpolate(canvas[None], (60, 80), mode="bilinear")[0]
    best = (full * protocol.logit_scale).softmax(dim=0).topk(2, dim=0).values
    where = torch.zeros(60, 80, dtype=torch.bool)
    where[[0, 17, 59], [3, 40, 79]] = True
    expected = (best[0] - best[1])[where].max().item()
    assert bench.gap_in_float64(maps, plan, protocol, where) == pytest.approx(expected, abs=1e-9)
