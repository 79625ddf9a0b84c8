"""Protocol files: all of ours parse, the hash holds what changes the task, mistakes are named."""

import dataclasses

import pytest

from eval.segmentation.protocol import read_task
from lazyclip.base.config import read_yaml
from lazyclip.base.errors import UserError
from lazyclip.base.resources import config_names, config_root
from tests.toy_voc import make_protocol

ALL = [
    (name, protocol)
    for name in config_names("protocols", ".yaml")
    for protocol in read_yaml(config_root() / "protocols" / f"{name}.yaml")["protocols"]
]


@pytest.mark.parametrize(("name", "protocol"), ALL)
def test_every_protocol_of_ours_parses(name, protocol):
    task = read_task(name, protocol)
    assert task.benchmark.dataset == name
    assert task.protocol.name == protocol
    assert task.protocol.classes == len(task.names) == len(set(task.names))
    assert len(task.protocol.hash) == 12
    assert task.benchmark.split in task.benchmark.images


def test_voc20_holds_the_values_of_sclip():
    task = read_task("voc20")
    assert task.protocol.name == "sclip"
    assert (task.protocol.classes, len(task.classes.queries)) == (20, 30)
    assert len(task.templates) == 80
    assert task.templates[0]("cat") == "a bad photo of a cat."
    sizes = (task.protocol.short, task.protocol.cap, task.protocol.window, task.protocol.stride)
    assert sizes == (336, 2048, 224, 112)
    assert (task.protocol.threshold, task.protocol.area) == (0, 0)
    assert task.protocol.labels == "zero_ignored"
    assert task.benchmark.images["val"] == 1449
    assert task.names[0] == "aeroplane"
    assert task.names[19] == "television monitor"


# Short, window, stride as in the configs of the three projects; elsewhere as in `USUAL`.
USUAL = {"sclip": (336, 224, 112), "naclip": (336, 224, 112), "clearclip": (448, 448, 224)}
OTHERS = {
    "voc20": {"naclip": (336, 0, 0)},
    "voc21": {"naclip": (336, 0, 0)},
    "coco_stuff": {"sclip": (448, 224, 112)},
    "cityscapes": {
        "sclip": (560, 224, 112),
        "naclip": (560, 224, 112),
        "clearclip": (448, 224, 224),
    },
}
# Columns: logit scale, threshold, area; elsewhere 40 (ClearCLIP 50), 0, 0.
DECISIONS = {
    "voc21": {"sclip": (65, 0.1, 0.1), "naclip": (40, 0.1, 0), "clearclip": (50, 0.5, 0)},
    "context60": {"sclip": (50, 0.1, 0), "naclip": (40, 0.1, 0), "clearclip": (50, 0.15, 0)},
    "coco_object": {"sclip": (50, 0.1, 0), "naclip": (40, 0.1, 0), "clearclip": (50, 0.4, 0)},
}
# Classes, queries, expected images of val and train.
COUNTS = {
    "voc20": (20, 30, 1449, 1464),
    "voc21": (21, 56, 1449, 1464),
    "context59": (59, 59, 5104, 4996),
    "context60": (60, 60, 5104, 4996),
    "cityscapes": (19, 19, 500, 2975),
    "ade20k": (150, 150, 2000, 20210),
    "coco_stuff": (171, 171, 5000, 118287),
    "coco_object": (81, 113, 5000, 118287),
}
NAMES = ("sclip", "naclip", "clearclip")


def test_the_eight_benchmarks_each_have_the_three_protocols():
    assert set(COUNTS) == set(config_names("protocols", ".yaml"))
    assert sorted(ALL) == sorted((d, p) for d in COUNTS for p in NAMES)
    for dataset in COUNTS:
        assert read_task(dataset).protocol.name == "sclip"


@pytest.mark.parametrize(("dataset", "name"), ALL)
def test_the_values_are_those_of_the_published_configs(dataset, name):
    protocol = read_task(dataset, name).protocol
    sizes = (protocol.short, protocol.window, protocol.stride)
    assert sizes == OTHERS.get(dataset, {}).get(name, USUAL[name])
    plain = (50 if name == "clearclip" else 40, 0, 0)
    decision = DECISIONS.get(dataset, {}).get(name, plain)
    assert (protocol.logit_scale, protocol.threshold, protocol.area) == decision
    assert protocol.remainder == ("pad" if name == "clearclip" else "drop")
    assert protocol.pamr == ("naclip" if name == "naclip" else "off")
    assert protocol.positions == "offset"
    assert protocol.cap == 2048
    assert protocol.mean == (122.771, 116.746, 104.094)
    assert protocol.std == (68.501, 66.632, 70.323)
    assert protocol.templates == "openai"
    assert protocol.background == (dataset in DECISIONS)


@pytest.mark.parametrize("dataset", COUNTS)
def test_classes_queries_and_expected_images(dataset):
    task = read_task(dataset)
    images = task.benchmark.images
    found = (len(task.names), len(task.classes.queries), images["val"], images["train"])
    assert found == COUNTS[dataset]
    assert (task.names[0] == "background") == (dataset in DECISIONS)
    assert read_task(dataset, split="train").protocol.split == "train"


def test_clearclip_has_class_names_of_its_own():
    voc, object_ = read_task("voc21", "clearclip"), read_task("coco_object", "clearclip")
    assert voc.classes.queries[0] == "background"
    assert (voc.classes.queries[15], voc.classes.queries[20]) == ("person", "tvmonitor")
    assert len(voc.classes.queries) == 21
    assert object_.classes.queries[:3] == ("background", "person", "bicycle")
    assert len(object_.classes.queries) == 81
    assert read_task("voc20", "clearclip").classes.queries[14::5] == ("person", "tvmonitor")
    for dataset in ("voc20", "voc21", "coco_object"):
        own, other = (read_task(dataset, name).classes for name in ("clearclip", "sclip"))
        differ = [a != b for a, b in zip(own.names, other.names, strict=True)]
        assert sum(differ) <= 3
        assert own.sha256 != other.sha256
    for dataset in ("context59", "context60", "cityscapes", "ade20k", "coco_stuff"):
        digests = {read_task(dataset, name).protocol.classes_sha256 for name in NAMES}
        assert len(digests) == 1


@pytest.mark.parametrize("dataset", COUNTS)
def test_the_first_comment_holds_command_expected_result_and_cost(dataset):
    text = (config_root() / "protocols" / f"{dataset}.yaml").read_text(encoding="utf-8")
    first = text[: text.index("dataset:")]
    assert f"python -m eval.zeroshot_seg --dataset {dataset} " in first
    assert "(SCLIP paper)" in first
    assert "TMAC" in first
    assert all(line.startswith("# ") for line in first.splitlines())


# A new value here makes all earlier scores incomparable: change the protocol's name as well.
HASHES = {
    "voc20": ("01e3f834e4d8", "9026d925a147", "617f352d9887"),
    "voc21": ("1dab73560d2c", "f2f22db99d90", "ce7d1e1fdd5e"),
    "context59": ("820642207953", "2205a311ea40", "3ed2fd0d0f28"),
    "context60": ("fb25e657136a", "b7399ea74488", "dd23e4d50be7"),
    "cityscapes": ("0ce2d60e4c87", "b00e43f7243b", "31d05cfc4481"),
    "ade20k": ("6786c7ff9d2e", "4b4db5576d69", "e7dae7f25fcf"),
    "coco_stuff": ("737b5d0dc7c4", "5f80d5cba807", "6d41a3f09995"),
    "coco_object": ("48859094dcca", "54f0a90525f5", "9ac1100eecff"),
}


@pytest.mark.parametrize(("dataset", "name"), ALL)
def test_no_hash_has_changed(dataset, name):
    assert read_task(dataset, name).protocol.hash == HASHES[dataset][NAMES.index(name)]


def test_no_two_protocols_share_a_hash():
    assert len({h for hashes in HASHES.values() for h in hashes}) == len(ALL) == 24


def changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(v + 1 for v in value)
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def test_the_hash_changes_with_every_field_but_the_names():
    protocol = read_task("voc20").protocol
    for field in dataclasses.fields(protocol):
        value = changed(getattr(protocol, field.name))
        other = dataclasses.replace(protocol, **{field.name: value})
        same = field.name in ("name", "templates")  # the template texts have a hash of their own
        assert (other.hash == protocol.hash) == same, field.name


def test_the_hash_changes_with_class_file_templates_and_split(tmp_path):
    plain = read_task(str(make_protocol(tmp_path / "a"))).protocol.hash
    again = read_task(str(make_protocol(tmp_path / "b"))).protocol.hash
    assert plain == again  # the place of the file is not part of the task
    classes = ("red thing", "blue thing", "green thing")
    for index, file in enumerate(
        (
            make_protocol(tmp_path / "c", classes=classes),
            make_protocol(tmp_path / "d", templates="simple"),
            make_protocol(tmp_path / "e", stride=31),
        )
    ):
        assert read_task(str(file)).protocol.hash != plain, index
    file = make_protocol(tmp_path / "f")
    assert read_task(str(file), split="train").protocol.hash != plain


def test_numbers_written_otherwise_give_the_same_hash(tmp_path):
    one = make_protocol(tmp_path / "a", logit_scale="40")
    other = make_protocol(tmp_path / "b", logit_scale="40.0", threshold="0.0")
    assert read_task(str(one)).protocol.hash == read_task(str(other)).protocol.hash


def test_the_result_form_holds_name_hash_and_all_values():
    protocol = read_task("voc20").protocol
    written = protocol.to_dict()
    assert list(written)[:2] == ["name", "hash"]
    assert set(written) == {f.name for f in dataclasses.fields(protocol)} | {"hash"}


def test_files_named_in_a_protocol_are_seen_from_its_folder(tmp_path, monkeypatch):
    file = make_protocol(tmp_path / "deep" / "folder", templates="prompts.txt")
    (file.parent / "prompts.txt").write_text("a picture of a {}.\nmy {}\n")
    monkeypatch.chdir(tmp_path)
    task = read_task("deep/folder/toy.yaml")
    assert task.names == ("red thing", "blue thing", "green thing")
    assert task.classes.queries == ("red thing", "blue thing", "azure thing", "green thing")
    assert [t("cup") for t in task.templates] == ["a picture of a cup.", "my cup"]


def test_class_zero_is_called_background_where_it_is_one(tmp_path):
    file = make_protocol(
        tmp_path, classes=("sky, wall", "cat"), labels="as_is", background=True, threshold=0.1
    )
    assert read_task(str(file)).names == ("background", "cat")


def test_unknown_names_are_answered_by_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown data set 'voc2'; .*voc20"):
        read_task("voc2")
    with pytest.raises(UserError, match=r"unknown protocol of voc20 'sclipp'; known: .*sclip"):
        read_task("voc20", "sclipp")
    with pytest.raises(UserError, match=r"data set file .*none\.yaml does not exist"):
        read_task(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": 0.1}, "threshold 0.1 .* toy has no background class"),
        ({"area": 0.1}, "area 0.1: toy has no background class"),
        ({"threshold": 40, "background": True}, "threshold is 40; give a number within 0..1"),
        ({"logit_scale": 0}, "logit_scale is 0"),
        ({"logit_scale": ".inf"}, "logit_scale is inf; give a number"),
        ({"logit_scale": ".nan"}, "logit_scale is nan; give a number"),
        ({"stride": 0}, "stride 0 leaves gaps between windows of 64; use 1..64"),
        ({"stride": 65}, "stride 65 leaves gaps"),
        ({"short": 33.5}, "short is 33.5; give a whole number from 1 on"),
        ({"window": "true"}, "window is True; give a whole number"),
        ({"std": "[1, 0, 1]"}, "std is .*; all three must be above 0"),
        ({"mean": "[1, 2]"}, "mean is .*; give three numbers"),
        ({"remainder": "drp"}, "remainder is 'drp'; known: drop, pad"),
        ({"positions": "exact"}, "positions is 'exact'; known: .*antialias"),
        ({"pamr": "yes"}, "pamr is True; known: .*off"),
        ({"labels": "cityscapes_ids"}, "cityscapes_ids gives 19 classes, the class file has 3"),
        ({"templates": "opnai"}, "templates 'opnai' are neither a file nor one of"),
        ({"labels": "zero_ignore"}, "labels is 'zero_ignore'; nearest: zero_ignored"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        read_task(str(make_protocol(tmp_path, **change)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    cap: 2048\n", "", "protocols.small: key 'cap' is missing"),
        ("    cap: 2048\n", "    capp: 2048\n", "unknown key 'capp'; nearest: cap"),
        ("    cap: 2048\n", "    cap: 2048\n    cap: 9\n", "key 'cap' stands twice"),
        ("layout: voc\n", "", "key 'layout' is missing"),
        ("layout: voc\n", "layout: vok\n", "layout is 'vok'; nearest: voc"),
        ("title: a toy\n", "title: a toy\ncolour: red\n", "unknown key 'colour'"),
        ("split: val\n", "split: 3\n", "split is 3; give text"),
        ("images: {val: 3}\n", "images: {val: 0}\n", "images.val is 0; give a whole number"),
        ("background: false\n", "background: 0\n", "background is 0; give true or false"),
        ("classes: classes.txt\n", "classes: none.txt\n", "none.txt does not exist"),
        ("classes: classes.txt\n", "classes: voc22\n", "unknown classes 'voc22'; nearest: voc2"),
        ("protocols:\n  small:\n", "protocol:\n  small:\n", "protocols must be a mapping"),
        ("    positions: offset\n", "", "protocols.small: key 'positions' is missing"),
        ("title: a toy\n", "title: a toy\nalso: {vok: as_is}\n", "layout is 'vok'; nearest: voc"),
        ("title: a toy\n", "title: a toy\nalso: {voc: as_si}\n", "labels is 'as_si'; .*as_is"),
        ("title: a toy\n", "title: a toy\ntraps: {a: b}\n", "traps is .*; give a list of texts"),
    ],
)
def test_a_file_with_a_wrong_key_is_refused(tmp_path, old, new, words):
    file = make_protocol(tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=words):
        read_task(str(file))


# --- other values by flag -------------------------------------------------------------------------


def test_single_values_can_be_changed_and_change_name_and_hash():
    plain = read_task("voc21").protocol
    other = read_task("voc21", overrides={"threshold": 0.2}).protocol
    assert other.name == "sclip+threshold=0.2"
    assert other.hash != plain.hash
    assert dataclasses.replace(other, name="sclip", threshold=plain.threshold) == plain


def test_changes_may_come_as_text_and_their_order_does_not_matter():
    one = read_task("voc20", "naclip", overrides={"window": "224", "stride": 112, "pamr": "off"})
    other = read_task("voc20", "naclip", overrides={"pamr": "off", "stride": "112", "window": 224})
    assert one.protocol == other.protocol
    assert one.protocol.name == "naclip+pamr=off+stride=112+window=224"
    assert (one.protocol.window, one.protocol.pamr) == (224, "off")
    triple = read_task("voc20", overrides={"mean": "1,2.5,3"}).protocol
    assert triple.mean == (1.0, 2.5, 3.0)
    assert triple.name == "sclip+mean=1,2.5,3"


def test_a_change_to_the_same_value_changes_nothing():
    plain = read_task("voc21").protocol
    same = {"threshold": "0.1", "logit_scale": 65.0, "pamr": "off", "mean": list(plain.mean)}
    assert read_task("voc21", overrides=same).protocol == plain


def test_the_name_in_a_result_can_be_given_as_a_protocol():
    made = read_task("voc21", overrides={"threshold": 0.2, "positions": "antialias"}).protocol
    assert read_task("voc21", made.name).protocol == made
    with pytest.raises(UserError, match=r"'threshold' is no KEY=VALUE, such as threshold=0\.2"):
        read_task("voc21", "sclip+threshold")


def test_classes_and_templates_of_ones_own_are_seen_from_here(tmp_path, monkeypatch):
    names = [f"thing {i}" for i in range(20)]
    (tmp_path / "mine.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "prompts.txt").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    task = read_task("voc20", overrides={"classes": "mine.txt", "templates": "prompts.txt"})
    assert task.names == tuple(names)
    assert task.protocol.name == "sclip+classes=mine+templates=prompts"
    assert [t("cat") for t in task.templates] == ["cat"]
    assert read_task("voc20", overrides={"classes": "voc20_clearclip"}).names[19] == "tvmonitor"
    (tmp_path / "mine.txt").write_text("\n".join(names[:19]) + "\n")
    with pytest.raises(UserError, match=r"mine\.txt has 19 classes, voc20 has 20; write one class"):
        read_task("voc20", overrides={"classes": "mine.txt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"treshold": 0.2}, "unknown protocol key 'treshold'; nearest: threshold"),
        ({"split": "train"}, "unknown protocol key 'split'"),
        ({"threshold": 0.2}, r"protocol sclip\+threshold=0.2 of voc20: threshold 0.2 .* no backgr"),
        ({"area": 0.1}, "voc20 has no background class"),
        ({"short": "many"}, "short is 'many'; give a whole number"),
        ({"pamr": "on"}, "pamr is 'on'; known: .*off"),
        ({"stride": 300}, "stride 300 leaves gaps between windows of 224"),
    ],
)
def test_a_change_that_cannot_be_right_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        read_task("voc20", overrides=change)
