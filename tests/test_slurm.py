"""The SLURM scripts: their syntax, and their logic with stand-ins for the cluster's commands."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


def run(
    script: str, words: list[str], folder: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    env = {
        **kept,
        "PATH": f"{folder / 'bin'}:{kept['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        **env,
    }
    # Started elsewhere, as SLURM runs a copy of the script from its own spool folder.
    return subprocess.run(
        [str(BASH), str(ROOT / "slurm" / script), *words],
        cwd="/", env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "tasks.tsv").write_text(
        "# output\tmodule\tflags\n"
        "out/a\teval.zeroshot_seg\t--dataset voc20 --model 'x*'\n"
        "\n"
        "out/b\teval.point_in_box\t--val-data shards/{0..1}.tar\r\n"
        "out/c\teval.zeroshot_cls\n"
        "out/d eval.zeroshot_cls\n"
    )
    (tmp_path / "xylophone").touch()  # what an unquoted x* would become
    stub(tmp_path / "bin", "python", 'printf "%s|" "$@" >> calls.txt; exit "${STUB_CODE:-0}"')
    return tmp_path


def evaluate(folder: Path, index: int, **env: str) -> subprocess.CompletedProcess[str]:
    return run("eval_array.sbatch", ["tasks.tsv"], folder, SLURM_ARRAY_TASK_ID=str(index), **env)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script_and_it_stops_at_errors(script: Path) -> None:
    done = subprocess.run([str(BASH), "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert 'cd "${SLURM_SUBMIT_DIR' in text


def test_both_scripts_are_there() -> None:
    assert {path.name for path in SCRIPTS} >= {"train.sbatch", "eval_array.sbatch"}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            0,
            [
                "-m",
                "eval.zeroshot_seg",
                "--dataset",
                "voc20",
                "--model",
                "'x*'",
                "--output",
                "out/a",
            ],
        ),
        (1, ["-m", "eval.point_in_box", "--val-data", "shards/{0..1}.tar", "--output", "out/b"]),
        (2, ["-m", "eval.zeroshot_cls", "--output", "out/c"]),
    ],
)
def test_an_array_index_runs_its_line_of_the_table(
    tasks: Path, index: int, words: list[str]
) -> None:
    done = evaluate(tasks, index)
    assert done.returncode == 0, done.stderr
    assert (tasks / "calls.txt").read_text() == "".join(f"{word}|" for word in words)


def test_a_finished_task_exits_at_once(tasks: Path) -> None:
    (tasks / "out" / "a").mkdir(parents=True)
    (tasks / "out" / "a" / "results.json").write_text("{}")
    done = evaluate(tasks, 0)
    assert done.returncode == 0
    assert "out/a/results.json exists" in done.stdout
    assert not (tasks / "calls.txt").exists()


def test_the_exit_code_of_the_evaluation_is_kept(tasks: Path) -> None:
    assert evaluate(tasks, 0, STUB_CODE="7").returncode == 7


def test_an_index_beyond_the_table_names_the_range(tasks: Path) -> None:
    done = evaluate(tasks, 4)
    assert done.returncode == 2
    assert "--array=0-3" in done.stderr
    assert not (tasks / "calls.txt").exists()


def test_a_line_without_tabs_is_an_error(tasks: Path) -> None:
    done = evaluate(tasks, 3)
    assert done.returncode == 2
    assert "TAB" in done.stderr
    assert not (tasks / "calls.txt").exists()


def test_a_missing_table_is_an_error(tmp_path: Path) -> None:
    done = run("eval_array.sbatch", ["none.tsv"], tmp_path, SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 2
    assert "none.tsv" in done.stderr


def test_training_meets_on_the_first_host_and_passes_the_flags(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "scontrol", '[[ $* == "show hostnames n[1-2]" ]] && printf "n1\\nn2\\n"')
    stub(tmp_path / "bin", "srun", 'printf "%s\\n" "$@"')
    done = run(
        "train.sbatch", ["--train-data", "a b/{0..1}.tar"], tmp_path,
        SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2", SLURM_JOB_ID="17",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[words.index("--rdzv-endpoint") + 1] == "n1:29500"
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--rdzv-id") + 1] == "17"
    assert words[-5:] == ["-m", "--", "training.main", "--train-data", "a b/{0..1}.tar"]
