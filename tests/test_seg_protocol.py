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


def test_the_hash_of_voc20_has_not_changed():
    # A new value here makes all earlier scores incomparable: change the name as well.
    assert read_task("voc20", "sclip").protocol.hash == "290a1e2a9e77"


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
        ({"remainder": "drp"}, "remainder is 'drp'; known: drop"),
        ({"pamr": "yes"}, "pamr is True; known: off"),
        ({"templates": "opnai"}, "templates 'opnai' are neither a file nor one of"),
        ({"labels": "zero_ignore"}, "labels is 'zero_ignore'; known: .*zero_ignored"),
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
        ("layout: voc\n", "layout: vok\n", "layout is 'vok'; known: .*voc"),
        ("title: a toy\n", "title: a toy\ncolour: red\n", "unknown key 'colour'"),
        ("split: val\n", "split: 3\n", "split is 3; give text"),
        ("images: {val: 3}\n", "images: {val: 0}\n", "images.val is 0; give a whole number"),
        ("background: false\n", "background: 0\n", "background is 0; give true or false"),
        ("classes: classes.txt\n", "classes: none.txt\n", "none.txt does not exist"),
        ("classes: classes.txt\n", "classes: voc22\n", "unknown classes 'voc22'; nearest: voc2"),
        ("protocols:\n  small:\n", "protocol:\n  small:\n", "protocols must be a mapping"),
    ],
)
def test_a_file_with_a_wrong_key_is_refused(tmp_path, old, new, words):
    file = make_protocol(tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=words):
        read_task(str(file))
