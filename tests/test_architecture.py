"""The rules of the house that a parser can check: who imports whom, sizes, words."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "training", "eval", "demo", "benchmarks", "tests", "docs")
# Left may not import right; names of one group may import each other, without a circle.
LAYERS = (
    {"base"},
    {"lowpass", "pooling", "scores", "boxes", "poolflags", "shards"},
    {"bridge"},
    {"tower", "weights", "dense", "zeroshot"},
    {"creation"},
    {"factory"},
    {"export"},
    {"cli"},
)
TEXTS = (".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".csv", ".sh", ".sbatch", ".tsv")


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if "__pycache__" not in path.parts]


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every imported dotted name with its level (0 absolute), inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module, node.level
            if node.level == 0:
                for alias in node.names:
                    yield f"{module}.{alias.name}", 0


def layer_of(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


LIBRARY = python_files("src")
PROGRAMS = python_files("training", "eval")
ALL_CODE = python_files("src", "training", "eval", "demo", "benchmarks", "tests")


def test_every_module_of_the_library_has_its_layer():
    package = ROOT / "src" / "lazyclip"
    known = set().union(*LAYERS)
    there = {path.stem for path in package.glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert there == known


@pytest.mark.parametrize("path", named(LIBRARY))
def test_the_library_imports_leftwards_only(path):
    own = path.relative_to(ROOT / "src" / "lazyclip").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name, level in imports(path):
        top = name.split(".")[0]
        assert level == 0, f"{name}: the library imports absolutely"
        assert top not in ("training", "eval", "tests", "demo", "benchmarks"), name
        parts = name.split(".")
        if top == "lazyclip" and len(parts) > 1 and parts[1] in set().union(*LAYERS):
            assert layer_of(parts[1]) <= layer_of(own), f"{own} imports {parts[1]}"


def test_no_circle_of_imports_inside_the_library():
    edges: dict[str, set[str]] = {}
    for path in LIBRARY:
        own = path.relative_to(ROOT / "src" / "lazyclip").with_suffix("").as_posix()
        if own.endswith("__init__"):
            continue
        names = {name.split(".", 1)[1].replace(".", "/") for name, _ in imports(path)
                 if name.startswith("lazyclip.")}  # fmt: skip
        edges[own] = names
    edges = {own: {n for n in names if n in edges and n != own} for own, names in edges.items()}
    while edges:
        free = [own for own, names in edges.items() if not names]
        assert free, f"a circle among {sorted(edges)}"
        for own in free:
            del edges[own]
        edges = {own: names - set(free) for own, names in edges.items()}


@pytest.mark.parametrize("path", named([*LIBRARY, *PROGRAMS, *python_files("demo", "benchmarks")]))
def test_only_the_bridge_reaches_into_open_clip(path):
    if path.parent == ROOT / "src" / "lazyclip" / "bridge":
        return
    modules = {
        "model", "factory", "transformer", "timm_model", "pretrained", "transform", "tokenizer",
        "loss", "coca_model", "hf_model", "modified_resnet", "zero_shot_classifier",
        "zero_shot_metadata", "utils", "push_to_hf_hub", "openai", "constants", "model_configs",
    }  # fmt: skip
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "open_clip" and len(parts) > 1:
            assert parts[1] not in modules, name
        assert parts[0] not in ("open_clip_train", "timm"), name
    for node in ast.walk(tree_of(path)):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        if node.value.id == "open_clip":
            assert node.attr not in modules, f"open_clip.{node.attr} in line {node.lineno}"
            assert not node.attr.startswith("_"), node.attr


@pytest.mark.parametrize("path", named(PROGRAMS))
def test_training_and_eval_know_siblings_relatively_and_not_each_other(path):
    top = path.relative_to(ROOT).parts[0]
    for name, level in imports(path):
        assert level <= 1, f"parent-relative import of {name}"
        first = name.split(".")[0]
        if level == 0:
            assert first not in ("training", "eval"), f"{top} imports {name}"
            assert first not in ("tests", "demo", "benchmarks"), name
        assert not name.startswith(("lazyclip.training", "lazyclip.eval")), name


@pytest.mark.parametrize("path", named(python_files("tests", "demo", "benchmarks")))
def test_nobody_imports_a_program_under_its_installed_name(path):
    for name, _ in imports(path):
        assert not name.startswith(("lazyclip.training", "lazyclip.eval")), name


@pytest.mark.parametrize("folder", ["lowpass", "pooling", "scores", "boxes"])
def test_the_formulas_need_neither_open_clip_nor_timm(folder):
    path = ROOT / "src" / "lazyclip" / f"{folder}.py"
    tops = {name.split(".")[0] for name, level in imports(path) if level == 0}
    assert tops <= {"torch", "numpy", "math", "dataclasses", "collections", "typing", "functools",
                    "lazyclip"}  # fmt: skip


@pytest.mark.parametrize("name", ["reference", "reference_dense"])
def test_the_references_import_numpy_only(name):
    tops = {name.split(".")[0] for name, _ in imports(ROOT / "tests" / f"{name}.py")}
    assert tops <= {"numpy", "math", "dataclasses", "collections"}


@pytest.mark.parametrize("path", named(LIBRARY))
def test_the_library_has_no_flags_no_print_and_no_process_group(path):
    names = {name for name, _ in imports(path)}
    assert "argparse" not in names
    assert not [name for name in names if name.startswith("torch.distributed")]
    calls = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call)]
    printed = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not printed or path.name == "cli.py", printed


@pytest.mark.parametrize("path", named([*LIBRARY, *PROGRAMS, *python_files("demo", "benchmarks")]))
def test_assert_stands_in_tests_only(path):
    lines = [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Assert)]
    assert not lines


@pytest.mark.parametrize("path", named(ALL_CODE))
def test_files_and_functions_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 600
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 120, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", named([*LIBRARY, *PROGRAMS]))
def test_every_module_says_what_it_is_for(path):
    text = ast.get_docstring(tree_of(path))
    assert text, "no module docstring"


def tracked_texts() -> list[Path]:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
        )
        names = [name for name in done.stdout.split("\0") if name]
        found = [ROOT / name for name in names if (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):  # no git here: an unpacked archive
        found = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [p for p in found if p.suffix in TEXTS or p.name in ("Makefile", "run")]


def test_the_project_speaks_of_itself_alone():
    # Put together from parts, so that this file does not hold what it looks for.
    frozen = [
        r"/wo" + r"rk/", r"\bses" + r"sions?\b", r"\bsub" + r"-?agents?\b", r"\bclau" + r"de\b",
        r"\banthro" + r"pic\b", r"\b(inter" + r"faces|style|openclip|toy_world|users)\.m" + r"d\b",
        r"\b(this|our|the next) iss" + r"ue\b",
    ]  # fmt: skip
    pattern = re.compile("|".join(frozen), re.IGNORECASE)
    allowed = re.compile(r"scope=\W" + "ses" + r"sion\W")  # pytest's own word
    found = []
    for path in tracked_texts():
        text = allowed.sub("", path.read_text(encoding="utf-8", errors="replace"))
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_no_config_names_a_path_of_a_machine():
    for path in (ROOT / "configs").rglob("*"):
        if path.suffix in (".yaml", ".json"):
            assert not re.search(r"(^|[\s\"'])/(home|data|mnt|scratch|root|tmp)/", path.read_text())
