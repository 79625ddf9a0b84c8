"""The wheel: only `lazyclip` at the top, configs and programs inside, usable from any folder."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*words: str, cwd: Path | str = "/", **env: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "COVERAGE"))}
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True,
        env={**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build in a temporary copy: a stale build/ of the checkout would be shipped with it."""
    folder = tmp_path_factory.mktemp("build")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "training", "eval", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
        elif name == "README.md":
            (folder / name).write_text("lazyclip\n")
    build = (
        "from setuptools import build_meta; import os;"
        "os.makedirs('out', exist_ok=True); print(build_meta.build_wheel('out'))"
    )
    name = run(sys.executable, "-c", build, cwd=folder).strip().splitlines()[-1]
    return folder / "out" / name


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Unpack the wheel, which is what installing a pure wheel does."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_only_lazyclip_comes_to_the_top_level(installed):
    (info,) = installed.glob("*.dist-info")
    assert (info / "top_level.txt").read_text().split() == ["lazyclip"]
    assert sorted(p.name for p in installed.iterdir()) == ["lazyclip", info.name]


def test_every_config_travels(installed):
    here = {p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*") if p.is_file()}
    there = {
        p.relative_to(installed / "lazyclip")
        for p in (installed / "lazyclip" / "configs").rglob("*")
        if p.is_file()
    }
    assert {p for p in here if "__pycache__" not in p.parts} == there


def test_every_module_travels(installed):
    for source, target in (("src/lazyclip", ""), ("training", "training"), ("eval", "eval")):
        for path in (ROOT / source).rglob("*.py"):
            inside = installed / "lazyclip" / target / path.relative_to(ROOT / source)
            assert inside.is_file(), inside
    assert (installed / "lazyclip" / "py.typed").is_file()


def test_the_commands_are_defined_and_lead_to_functions(installed):
    (info,) = installed.glob("*.dist-info")
    parser = configparser.ConfigParser()
    parser.read(info / "entry_points.txt")
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == {"lazyclip", "lazyclip-train", "lazyclip-seg"}
    for place in scripts.values():
        module, function = place.split(":")
        file = installed / Path(*module.split(".")).with_suffix(".py")
        assert file.is_file(), place
        assert f"{function} =" in file.read_text() or f"def {function}(" in file.read_text()


def test_the_requirements_avoid_what_is_known_to_break(installed):
    (info,) = installed.glob("*.dist-info")
    lines = (info / "METADATA").read_text().splitlines()
    needed = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    plain = [line for line in needed if "extra ==" not in line]
    (open_clip,) = [line for line in plain if line.startswith("open_clip_torch")]
    # Its extra [training] pins an old webdataset; 2.24 and before occupy the name `training`.
    assert "[" not in open_clip
    assert ">=3.0" in open_clip
    assert "<4" in open_clip
    names = {re.split(r"[<>=!~ ;\[]", line)[0].lower() for line in plain}
    assert "requests" in names  # clip-benchmark imports it without declaring it
    assert {"torch", "torchvision", "timm", "webdataset", "safetensors", "numpy"} <= names


FROM_ANYWHERE = """
import json, sys
from pathlib import Path
import lazyclip, open_clip
from lazyclip import cli
from lazyclip.base import resources
here = Path(sys.argv[1])
assert Path(lazyclip.__file__).is_relative_to(here), lazyclip.__file__
assert resources.config_root() == here / "lazyclip" / "configs", resources.config_root()
assert resources.checkout_root() is None
names = {p.stem for p in (resources.config_root() / "models").glob("*.json")}
assert names and names <= set(open_clip.list_models())
for module, _ in cli.COMMANDS.values():
    assert cli.resolve(module) == f"lazyclip.{module}"
for name in ("training", "eval", "configs"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"a bare {name} can be imported")
from lazyclip.base.record import make_record
assert make_record("x", [], {})["versions"]["lazyclip_from"] == "wheel"
try:
    cli.main(["cls", "--help"])
except SystemExit as stop:
    assert stop.code == 0
print("fine")
"""


def test_the_installed_package_works_from_any_folder(installed):
    out = run(sys.executable, "-c", FROM_ANYWHERE, str(installed), PYTHONPATH=str(installed))
    assert out.strip().endswith("fine")
