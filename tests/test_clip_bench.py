"""clip_benchmark with our models: its data form, its two faults, and agreement with our scores."""

import json
import logging
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from eval import clip_bench, zeroshot_cls
from eval.clip_bench import accuracy, clean, load_benchmark, needs_accuracy
from eval.runs import collect
from lazyclip.base.errors import UserError
from lazyclip.shards import iterate_samples
from tests.toy import caption_sample, caption_shards, jpeg, write_shard
from tests.toy_models import saved

CLASSES = ("red", "blue", "green", "yellow", "white", "black")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
NANO = ("--model", "LaSt-ViT-nano", "--random-weights")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards of six classes and the same in wds form, with and without classes."""
    folder = tmp_path_factory.mktemp("bench")
    pattern = caption_shards(folder / "shards", 2, 30, CLASSES)
    common = ["--from-shards", pattern]
    words = [*common, "--classes", ",".join(CLASSES), "--templates", "simple"]
    assert clip_bench.main([*words, "--output", str(folder / "six")]) == 0
    assert clip_bench.main([*common, "--output", str(folder / "captions")]) == 0
    return folder, pattern


def bench(root: Path, out: Path, *more: str, model=NANO) -> dict:
    words = ["eval", "--dataset", f"wds/{root.name}", "--dataset_root", str(root), *model,
             "--output", str(out), "--quiet", "--num_workers", "0", *more]  # fmt: skip
    assert clip_bench.main(words) == 0
    return json.loads(out.read_text())


def refused(capsys, *words: object) -> str:
    assert clip_bench.main([str(word) for word in words]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_the_form_holds_the_same_bytes_and_the_class(world):
    folder, _ = world
    ours = [s for n in range(2) for s in iterate_samples(folder / "shards" / f"{n:05d}.tar")]
    test = folder / "six" / "test"
    theirs = [s for n in range(2) for s in iterate_samples(test / f"{n}.tar")]
    assert (test / "nshards.txt").read_text().strip() == "2"
    assert len(ours) == len(theirs) == 60
    for mine, other in zip(ours, theirs, strict=True):
        assert set(other.parts) == {"jpg", "cls"}
        assert other.parts["jpg"] == mine.parts["jpg"]
        assert int(other.parts["cls"]) == json.loads(mine.parts["json"])["class_index"]
    assert (folder / "six" / "classnames.txt").read_text().splitlines() == list(CLASSES)
    lines = (folder / "six" / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert len(lines) == 7
    assert all(line.count("{c}") == 1 for line in lines)


def test_captions_become_retrieval_one_a_line(tmp_path):
    about = {"captions": ["one\ntwo", " ", "three"]}
    shard = write_shard(tmp_path / "a.tar", [
        {"jpg": jpeg(0), "txt": b"left", "json": json.dumps(about).encode()},
        {"jpg": jpeg(1), "txt": b" a  plain one "},
    ])  # fmt: skip
    root = tmp_path / "out"
    assert clip_bench.main(["--from-shards", str(shard), "--output", str(root)]) == 0
    found = [s.parts["txt"].decode() for s in iterate_samples(root / "test" / "0.tar")]
    assert found == ["one two\nthree", "a plain one"]
    assert (root / "dataset_type.txt").read_text().strip() == "retrieval"
    assert not (root / "classnames.txt").exists()


def test_classification_agrees_with_ours(world, tmp_path):
    folder, pattern = world
    result = bench(folder / "six", tmp_path / "a.json")
    words = ["--val-data", pattern, "--classes", ",".join(CLASSES), "--templates", "simple", *NANO]
    assert zeroshot_cls.main([*words, "--output", str(tmp_path / "cls")]) == 0
    ours = json.loads((tmp_path / "cls" / "results.json").read_text())
    assert result["metrics"]["acc1"] == pytest.approx(ours["top1"], abs=1e-9)
    assert result["metrics"]["acc5"] == pytest.approx(ours["top5"], abs=1e-9)
    assert 0 < ours["top1"] < 1


def test_a_result_says_which_weights_and_is_read_by_the_table(world, tmp_path):
    folder, _ = world
    result = bench(folder / "six", tmp_path / "a.json", "--seed", "5")
    assert result["model_info"]["pooling"]["pooling"] == "last"
    assert result["record"]["config"]["precision"] == "fp32"
    (run,) = collect([tmp_path / "a.json"]).runs
    assert run.weights.label == "LaSt-ViT-nano RANDOM (seed 5)"
    assert set(run.scores) == {"top1", "top5", "mean_class_recall"}


def test_below_five_classes_acc5_is_null_and_no_nan_is_written(tmp_path):
    pattern = caption_shards(tmp_path / "shards", 1, 4)
    words = ["--from-shards", pattern, "--classes", "red,blue", "--templates", "plain"]
    assert clip_bench.main([*words, "--output", str(tmp_path / "two")]) == 0
    result = bench(tmp_path / "two", tmp_path / "a.json")
    assert result["metrics"]["acc5"] is None
    assert "NaN" not in (tmp_path / "a.json").read_text()


def test_retrieval_is_chosen_by_the_data_set_and_equals_an_independent_count(world, tmp_path):
    folder, _ = world
    root, model = folder / "captions", saved(tmp_path / "run" / "model", "LaSt-ViT-nano")
    result = bench(root, tmp_path / "a.json", "--recall_k", "1", "5",
                   model=("--model", str(model)))  # fmt: skip
    assert result["task"] == "zeroshot_retrieval"

    import io

    from PIL import Image

    import lazyclip

    loaded, preprocess, tokenizer = lazyclip.load(str(model))
    samples = [s for n in range(2) for s in iterate_samples(root / "test" / f"{n}.tar")]
    images = torch.stack([preprocess(Image.open(io.BytesIO(s.parts["jpg"])).convert("RGB"))
                          for s in samples])  # fmt: skip
    texts = tokenizer([s.parts["txt"].decode() for s in samples])
    with torch.inference_mode():
        x = loaded.encode_image(images).double().numpy()
        y = loaded.encode_text(texts).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    for k in (1, 5):
        best = np.argsort(-(x @ y.T), axis=0, kind="stable")[:k]
        hits = [i in best[:, i] for i in range(len(samples))]
        assert result["metrics"][f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))


def test_a_runs_folder_means_the_model_it_left_and_names_the_result(world, tmp_path):
    folder, _ = world
    saved(tmp_path / "logs" / "mine" / "model", "LaSt-ViT-nano")
    words = ["eval", "--dataset", "wds/six", "--dataset_root", str(folder / "six"), "--model",
             str(tmp_path / "logs" / "mine"), "--quiet", "--num_workers", "4",
             "--output", str(tmp_path / "{dataset}_{model}.json")]  # fmt: skip
    assert clip_bench.main(words) == 0
    result = json.loads((tmp_path / "six_mine.json").read_text())
    assert result["model_info"]["weights_sha256"]
    assert str(tmp_path) not in (tmp_path / "six_mine.json").read_text()


def test_a_file_keeps_the_activation_it_was_trained_with(world, tmp_path, capsys):
    folder, _ = world
    model = saved(tmp_path / "m", "LaSt-ViT-nano", force_quick_gelu=True)
    result = bench(folder / "six", tmp_path / "a.json",
                   model=("--model", "LaSt-ViT-nano", "--pretrained", str(model)))  # fmt: skip
    assert result["model_info"]["activation"] == "quickgelu"
    plain = saved(tmp_path / "p", "LaSt-ViT-nano")
    words = ["eval", "--dataset", "wds/six", "--dataset_root", folder / "six", "--model",
             "LaSt-ViT-nano", "--pretrained", plain, "--force-quick-gelu"]  # fmt: skip
    assert "was trained with GELU" in refused(capsys, *words)


def test_build_makes_one_csv_of_scalars(world, tmp_path):
    folder, _ = world
    bench(folder / "six", tmp_path / "r" / "a.json")
    bench(folder / "captions", tmp_path / "r" / "b.json")
    out = tmp_path / "all.csv"
    assert clip_bench.main(["build", str(tmp_path / "r"), "--output", str(out)]) == 0
    csv = pd.read_csv(out)
    assert len(csv) == 2
    assert {"acc1", "image_retrieval_recall@5", "model"} <= set(csv.columns)
    assert not {"record", "model_info"} & set(csv.columns)
    assert (tmp_path / "r" / "a.json").read_text().count("record") == 1  # the originals stay


def test_the_guard_of_accuracy_is_needed_only_where_theirs_fails():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=draw)
    target = torch.randint(7, (50,), generator=draw)
    order = logits.numpy().argsort(axis=1)[:, ::-1]
    expected = [(order[:, :k] == target.numpy()[:, None]).any(1).mean() for k in (1, 5)]
    assert accuracy(logits, target, (1, 5)) == pytest.approx(expected)
    assert not needs_accuracy(accuracy)

    def broken(output, target, topk=(1,)):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    assert needs_accuracy(broken)


def test_their_module_is_as_before_after_a_command(world, tmp_path):
    folder, _ = world
    module = load_benchmark()
    names = ("load_clip", "run", "json")
    before = [getattr(module, name) for name in names]
    metric = module.zeroshot_classification.accuracy
    bench(folder / "six", tmp_path / "a.json")
    assert [getattr(module, name) for name in names] == before
    assert module.zeroshot_classification.accuracy is metric


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ("requests", "it needs 'requests', which it does not install; pip install requests"),
        ("clip_benchmark", "clip_benchmark is not installed; pip install clip-benchmark"),
    ],
)
def test_a_missing_package_is_one_line_with_the_remedy(monkeypatch, hidden, said):
    for name in [n for n in sys.modules if n.split(".")[0] == "clip_benchmark"]:
        monkeypatch.delitem(sys.modules, name)

    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == hidden:
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    for name in [n for n in sys.modules if n.split(".")[0] == hidden]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hide(), *sys.meta_path])
    with pytest.raises(UserError) as caught:
        load_benchmark()
    assert said in str(caught.value)


def test_values_that_are_not_finite_become_null():
    assert clean({"a": [float("nan"), 1.0, (float("inf"),)], 3: "x"}) == {
        "a": [None, 1.0, [None]],
        "3": "x",
    }


def test_mistakes_are_one_line(world, tmp_path, capsys):
    folder, pattern = world
    six = ("eval", "--dataset", "wds/six", "--dataset_root", folder / "six")
    nowhere = refused(capsys, "eval", "--dataset", "wds/x", "--dataset_root", tmp_path, *NANO)
    assert "is no data set in wds form" in nowhere
    assert "--from-shards" in nowhere
    assert "has no weights" in refused(capsys, *six, "--model", "LaSt-ViT-nano")
    assert "exclude each other" in refused(capsys, *six, *NANO, "--pretrained", "x.pt")
    assert "nearest: LaSt-ViT-nano" in refused(capsys, *six, "--model", "LaSt-ViT-nana")
    assert "unrecognized arguments: --frob" in refused(capsys, *six, "--frob")
    assert "is no command" in refused(capsys, "evil")
    assert "hold no .json" in refused(capsys, "build", tmp_path)
    out = ("--output", tmp_path / "o")
    assert "--output is missing" in refused(capsys, "--from-shards", pattern)
    assert "names 0 existing shards" in refused(capsys, "--from-shards", tmp_path / "x*", *out)
    assert "outside 0..1" in refused(
        capsys, "--from-shards", pattern, "--classes", "red,blue", *out
    )
    taken = ("--from-shards", pattern, "--output", folder / "six")
    assert "is not empty" in refused(capsys, *taken)
    assert "holds something else" in refused(
        capsys, "--from-shards", pattern, "--output", folder / "shards", "--overwrite"
    )
    assert (folder / "shards" / "00000.tar").exists()


def test_no_command_prints_the_usage(capsys):
    assert clip_bench.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m eval.clip_bench eval")


def test_a_broken_sample_stops_the_writing_or_is_counted(tmp_path, capsys):
    good = caption_sample(0, CLASSES)
    shard = write_shard(tmp_path / "a.tar", [good, {**good, "jpg": b"torn"}, good])
    words = ["--from-shards", shard, "--classes", ",".join(CLASSES), "--output", tmp_path / "o"]
    assert "a.tar:1" in refused(capsys, *words)
    assert not (tmp_path / "o" / "test" / "nshards.txt").exists()  # cannot be scored by mistake
    assert clip_bench.main([str(w) for w in (*words, "--overwrite", "--max-bad", "1")]) == 0
    assert "undecodable" in capsys.readouterr().out
    with tarfile.open(tmp_path / "o" / "test" / "0.tar") as tar:
        assert len(tar.getnames()) == 4


def test_synonyms_that_their_form_cannot_hold_are_said(tmp_path, caplog):
    pattern = caption_shards(tmp_path / "shards", 1, 4)
    (tmp_path / "names.txt").write_text("red, scarlet\nblue\n")
    words = ["--from-shards", pattern, "--classes", str(tmp_path / "names.txt")]
    root = tmp_path / "two"
    form = types.SimpleNamespace(messages=[])
    handler = logging.Handler()
    handler.emit = lambda record: form.messages.append(record.getMessage())
    logging.getLogger("eval.wds_form").addHandler(handler)
    try:
        assert clip_bench.main([*words, "--output", str(root)]) == 0
    finally:
        logging.getLogger("eval.wds_form").removeHandler(handler)
    assert any("1 synonyms are left out" in text for text in form.messages)
    assert (root / "classnames.txt").read_text().split() == ["red", "blue"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:y_pred contains classes")  # 300 images lack some of 200
def test_tiny_imagenet_agrees_with_ours_within_a_tenth_of_a_point(shared_data, tmp_path):
    data = shared_data / "tiny-imagenet"
    shard = str(data / "val" / "00000.tar.gz")
    model = saved(tmp_path / "m", "LaSt-ViT-nano")
    words = ["--classes", str(data / "classes.json"), "--templates", "plain", "--limit", "300"]
    root = tmp_path / "tin"
    assert clip_bench.main(["--from-shards", shard, *words, "--output", str(root)]) == 0
    result = bench(root, tmp_path / "a.json", model=("--model", str(model)))
    more = ["--model", str(model), "--output", str(tmp_path / "c")]
    assert zeroshot_cls.main(["--val-data", shard, *words, *more]) == 0
    ours = json.loads((tmp_path / "c" / "results.json").read_text())
    assert ours["n"] == 300
    assert abs(result["metrics"]["acc1"] - ours["top1"]) < 0.001
    assert abs(result["metrics"]["acc5"] - ours["top5"]) < 0.001


@pytest.mark.data
def test_the_real_pairs_give_all_their_captions(shared_data, tmp_path):
    pattern = str(shared_data / "pairs" / "{00000..00004}.tar")
    root = tmp_path / "pairs"
    assert clip_bench.main(["--from-shards", pattern, "--output", str(root)]) == 0
    samples = [s for n in range(5) for s in iterate_samples(root / "test" / f"{n}.tar")]
    assert len(samples) == 165
    assert sum(len(s.parts["txt"].splitlines()) for s in samples) == 825
