"""The command `lazyclip X`: its table, its help, its errors."""

import ast
import importlib.util
from pathlib import Path

import pytest

from lazyclip import cli
from lazyclip.base.resources import checkout_root

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_without_a_command_the_table_is_printed(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: lazyclip COMMAND")
    for name, (_, text) in cli.COMMANDS.items():
        assert f"  {name} " in out
        assert text in out


def test_an_unknown_command_is_one_line_with_the_nearest_and_exit_code_2(capsys):
    assert cli.main(["sge"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: unknown command 'sge'; nearest: seg")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_names_a_module_with_a_main(command):
    spec = importlib.util.find_spec(cli.resolve(cli.COMMANDS[command][0]))
    assert spec is not None
    tree = ast.parse(Path(spec.origin).read_text())
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    } | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "main" in names


@pytest.mark.parametrize("words", [["cls", "--help"], ["zeroshot_cls", "--help"],
                                   ["zeroshot-cls", "--help"]])  # fmt: skip
def test_a_command_hands_its_flags_on(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    assert "--pretrained" in capsys.readouterr().out


def test_the_exit_code_of_a_command_is_handed_back(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["cls", "--model", "LaSt-ViT-nano", "--data", "x", "--classes", "a,b"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "error:" in err


def test_in_a_checkout_modules_keep_their_top_level_names():
    assert checkout_root() == ROOT
    assert cli.resolve("training.main") == "training.main"
    assert cli.resolve("eval.zeroshot_seg") == "eval.zeroshot_seg"
