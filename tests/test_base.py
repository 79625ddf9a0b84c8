"""Errors, strict configs, registries, resources, logs and records."""

import dataclasses
import io
import json
import logging
import math
import os
import sys

import pytest

from lazyclip.base import logs, record, resources
from lazyclip.base.config import config_hash, read_json, read_yaml, strict, write_json
from lazyclip.base.errors import UserError, cli, nearest, unknown
from lazyclip.base.registry import Registry

# --- errors --------------------------------------------------------------------------------------


def test_nearest_puts_the_closest_name_first_and_counts_the_rest():
    names = ["paper", "repo", "abs", "negdist", "value", "other"]
    assert nearest("papre", names).startswith("nearest: paper, ")
    assert nearest("papre", names).endswith("(of 6)")
    assert nearest("x", ["b", "a"]) in ("known: a, b", "known: b, a")
    assert nearest("x", []) == "none are known"
    assert nearest("VOC20", ["voc20", "voc21"]).startswith("known: voc20")


def test_unknown_names_kind_value_and_remedy():
    error = unknown("score", "papr", ["paper", "repo"], "pass --last-score")
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)
    assert str(error) == "unknown score 'papr'; known: paper, repo; pass --last-score"


@cli
def sample_entry(argv=None):
    """Do something."""
    if argv == ["bad"]:
        raise UserError("--x 3 exceeds 2;\n   use 1..2")
    if argv == ["bug"]:
        raise ZeroDivisionError
    if argv == ["stop"]:
        raise KeyboardInterrupt


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("LAZYCLIP_TRACEBACK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert sample_entry(["bad"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: --x 3 exceeds 2; use 1..2\n"
    assert captured.out == ""
    assert sample_entry([]) == 0
    assert sample_entry.__doc__ == "Do something."


def test_interruption_is_130_and_our_own_bug_keeps_its_traceback(capsys):
    assert sample_entry(["stop"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        sample_entry(["bug"])


def test_every_rank_says_who_it_is(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert sample_entry(["bad"]) == 2
    assert capsys.readouterr().err.startswith("[rank 3] error: ")


def test_the_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("LAZYCLIP_TRACEBACK", "1")
    with pytest.raises(UserError):
        sample_entry(["bad"])


# --- configs -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int
    name: str = "x"


def test_strict_builds_and_refuses_unknown_and_missing_keys():
    assert strict(Settings, {"width": 3}, "a.yaml") == Settings(3)
    with pytest.raises(UserError, match=r"^a\.yaml: unknown key 'widht'; known: width, name"):
        strict(Settings, {"widht": 3}, "a.yaml")
    with pytest.raises(UserError, match=r"a\.yaml: .*width"):
        strict(Settings, {}, "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1\na: 2\n", "key 'a' stands twice"), ("- 1\n", "found list"), ("a: [1\n", "not readable"),
     ("b:\n  c: 1\n  c: 2\n", "key 'c' stands twice"), ("a: !!python/object:os.system {}", "YAML")],
)  # fmt: skip
def test_a_wrong_yaml_names_the_file(tmp_path, text, said):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_yaml(path)
    assert "x.yaml" in str(caught.value)


def test_yaml_and_json_read_what_they_hold(tmp_path):
    (tmp_path / "x.yaml").write_text("# only a comment\n")
    assert read_yaml(tmp_path / "x.yaml") == {}
    (tmp_path / "x.yaml").write_text("a: {b: 1e-6, c: [1, 2]}\n1: x\n")
    assert set(read_yaml(tmp_path / "x.yaml")) == {"a", "1"}
    (tmp_path / "x.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, None]}


@pytest.mark.parametrize(
    ("content", "said"),
    [(b'{"a": ', "line 1"), (b"[1]", "found list"), (b"\xff\xfe\x00", "cannot be read as text")],
)
def test_a_wrong_json_names_file_and_place(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_json(path)
    assert "x.json" in str(caught.value)


@pytest.mark.parametrize("reader", [read_json, read_yaml])
def test_a_file_that_is_not_there_is_named(tmp_path, reader):
    with pytest.raises(UserError, match=r"gone: no such file"):
        reader(tmp_path / "gone")
    with pytest.raises(UserError):
        reader(tmp_path)  # a folder


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1, "é": None})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": [1.0, -math.inf]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1, "é": None}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_hash_knows_values_and_not_the_order_of_keys():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    others = [{"a": 1, "b": [2, 1]}, {"a": 1}, {"a": "1", "b": [1, 2]}, {"a": 1.5, "b": [1, 2]}]
    assert len({config_hash(c) for c in [{"a": 1, "b": [1, 2]}, *others]}) == 5
    assert len(config_hash({})) == 12


# --- registry and resources ----------------------------------------------------------------------


def test_a_registry_keeps_order_and_refuses_doubles_and_strangers():
    table = Registry("thing")
    table.add("b")(1)
    assert table.add("a")(2) == 2
    assert (list(table), len(table), table["b"], "a" in table) == (["b", "a"], 2, 1, True)
    with pytest.raises(RuntimeError, match="thing 'a' is registered twice"):
        table.add("a")(3)
    assert table["a"] == 2
    with pytest.raises(UserError, match="unknown thing 'c'; known: "):
        table["c"]


def test_configs_are_found_by_name_or_by_path(tmp_path):
    assert (resources.config_root() / "models").is_dir()
    path = resources.config_file("protocols", "voc20", ".yaml")
    assert path.is_file()
    mine = tmp_path / "mine.yaml"
    mine.write_text("")
    assert resources.config_file("protocols", str(mine), ".yaml") == mine
    with pytest.raises(UserError, match=r"unknown protocol 'voc2'; .*voc20"):
        resources.config_file("protocols", "voc2", ".yaml", "protocol")
    with pytest.raises(UserError, match="does not exist"):
        resources.config_file("protocols", str(tmp_path / "gone.yaml"), ".yaml")
    with pytest.raises(UserError, match="unknown"):
        resources.config_file("protocols", "../protocols/voc20", ".yaml")
    assert "voc20" in resources.config_names("classes", ".txt")
    assert resources.config_names("nothing-here", ".txt") == []


# --- logs ----------------------------------------------------------------------------------------


@pytest.fixture
def own_root_logger():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers = []
    yield root
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


def test_logs_go_to_stderr_and_file_and_only_warnings_from_other_ranks(
    own_root_logger, tmp_path, capsys
):
    logs.setup(0, tmp_path / "out.log")
    logging.getLogger("lazyclip.x").info("hello %d", 3)
    logs.setup(2)
    logging.getLogger("lazyclip.x").info("unheard")
    logging.getLogger("lazyclip.x").warning("heard")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "| INFO | hello 3" in captured.err
    assert "unheard" not in captured.err
    assert "[rank 2]" in captured.err
    assert "hello 3" in (tmp_path / "out.log").read_text()


def test_setting_up_twice_prints_once(own_root_logger, capsys):
    logs.setup()
    logs.setup()
    logging.getLogger("lazyclip.x").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_metrics_are_one_json_object_a_line_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = logs.MetricsWriter(path)
    writer.write({"step": 1, "train/loss": 2.5, "probe/pib": math.nan, "x": math.inf})
    assert json.loads(path.read_text()) == {
        "step": 1, "train/loss": 2.5, "probe/pib": None, "x": None,
    }  # fmt: skip
    writer.write({"step": 2})
    writer.close()
    again = logs.MetricsWriter(path)
    again.write({"step": 3})
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_progress_logs_rarely_and_always_the_end(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO):
        bar = logs.Progress(100, "images")
        for _ in range(100):
            bar.update()
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("100/100 images")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_is_a_bar_that_ends_its_line(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = logs.Progress(4, "images")
    bar.update(4, "note")
    assert screen.getvalue().startswith("\r[####")
    assert "4/4 images" in screen.getvalue()
    assert screen.getvalue().endswith("\n")


def test_progress_of_nothing_does_not_divide_by_zero(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    logs.Progress(0, "images").update(0)


# --- record --------------------------------------------------------------------------------------


def test_a_record_holds_command_versions_and_hash():
    made = record.make_record("eval.x", ["--k", "3", "a b"], {"k": 3}, seed=0, device="cpu")
    assert made["command"] == "python -m eval.x --k 3 'a b'"
    assert made["config"] == {"k": 3}
    assert made["config_hash"] == config_hash({"k": 3})
    assert made["seed"] == 0
    assert made["versions"]["torch"]
    assert made["versions"]["open_clip_torch"].startswith("3.")
    assert set(made["git"]) == {"commit", "dirty"}
    assert made["start"].endswith("Z")
    json.dumps(made, allow_nan=False)


def test_no_absolute_path_of_this_machine_is_written(tmp_path):
    path = str(tmp_path / "shards" / "{00000..00009}.tar")
    made = record.make_record(
        "training.main",
        ["--train-data", path, f"--val-data={path}", f"{path}::{path}"],
        {"data": tmp_path, "list": [path, f"{path}::{path}"], "deep": {"x": (path,)}},
        file=tmp_path / "x",
    )
    text = json.dumps(made)
    assert str(tmp_path.parent) not in text
    assert os.path.expanduser("~") + "/" not in text
    assert "shards/{00000..00009}.tar" in text


def test_the_hash_of_a_record_does_not_depend_on_the_folder(tmp_path):
    a, b = (
        record.make_record("x", [], {"data": str(tmp_path / side / "d" / "a.tar")})
        for side in ("left", "right")
    )
    assert a["config_hash"] == b["config_hash"]
