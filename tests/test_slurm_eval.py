"""The SLURM scripts for evaluations: the array, and the table that is written for it."""

import subprocess
from pathlib import Path

import pytest

from lazyclip.base.resources import config_names
from tests.toy_batch import BASH, ROOT, make_checkout, stub
from tests.toy_batch import run_script as run

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    checkout = make_checkout(tmp_path)
    (checkout / "tasks.tsv").write_text(
        "# output\tmodule\tflags\n"
        "out/a\teval.zeroshot_seg\t--dataset voc20 --model 'x*'\n"
        "\n"
        "out/b\teval.point_in_box\t--val-data shards/{0..1}.tar\r\n"
        "out/c\teval.zeroshot_cls\n"
        "out/d eval.zeroshot_cls\n"
        "out/e\teval.interpolate\t--dataset voc20\n"
    )
    (checkout / "xylophone").touch()  # what an unquoted x* would become
    return checkout


def evaluate(folder: Path, index: int, **env: str) -> subprocess.CompletedProcess[str]:
    return run("eval_array.sbatch", ["tasks.tsv"], folder, SLURM_ARRAY_TASK_ID=str(index), **env)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (0, "eval.zeroshot_seg --dataset voc20 --model 'x*' --output out/a --resume"),
        (1, "eval.point_in_box --val-data shards/{0..1}.tar --output out/b"),
        (2, "eval.zeroshot_cls --output out/c"),
        (4, "eval.interpolate --dataset voc20 --output out/e --resume"),
    ],
)
def test_an_array_index_runs_its_line_of_the_table(tasks: Path, index: int, words: str) -> None:
    done = evaluate(tasks, index)
    assert done.returncode == 0, done.stderr
    assert (tasks / "calls.txt").read_text() == f"-m|{'|'.join(words.split())}|"


def test_words_for_srun_reach_an_evaluation(tasks: Path) -> None:
    done = evaluate(tasks, 2, SITE_SRUN_MORE="--container-image=a", SLURM_CPUS_PER_TASK="8")
    assert done.returncode == 0, done.stderr
    assert (tasks / "srun.txt").read_text().splitlines() == [
        "--nodes", "1", "--ntasks", "1", "--cpus-per-task", "8", "--container-image=a",
        "python", "-m", "eval.zeroshot_cls", "--output", "out/c",
    ]  # fmt: skip


def test_every_module_with_resume_gets_it() -> None:
    """The script names them: a module that learns to go on has to be named too."""
    script = (ROOT / "slurm" / "eval_array.sbatch").read_text()
    (line,) = [x for x in script.splitlines() if "words+=(--resume)" in x]
    named = set(line.split(")")[0].replace(" ", "").split("|"))
    able = {f"eval.{file.stem}" for file in (ROOT / "eval").glob("*.py")
            if '"--resume", action' in file.read_text()}  # fmt: skip
    assert named == able


def test_a_finished_evaluation_exits_at_once(tasks: Path) -> None:
    (tasks / "out" / "a").mkdir(parents=True)
    (tasks / "out" / "a" / "results.json").write_text("{}")
    done = evaluate(tasks, 0)
    assert done.returncode == 0
    assert "out/a/results.json exists" in done.stdout
    assert not (tasks / "calls.txt").exists()


def test_the_exit_code_of_the_evaluation_is_kept(tasks: Path) -> None:
    assert evaluate(tasks, 0, STUB_CODE="7").returncode == 7
    assert not (tasks / "scontrol.txt").exists()


@pytest.mark.parametrize(("restarts", "code"), [("0", 0), ("8", 0), ("9", 1)])
def test_an_evaluation_that_the_time_limit_cuts_short_goes_back(tasks, restarts, code) -> None:
    stub(tasks / "bin", "python", "kill -USR1 $PPID; for i in {1..100}; do sleep 0.1; done")
    done = evaluate(tasks, 0, SLURM_RESTART_COUNT=restarts, SLURM_ARRAY_JOB_ID="17")
    assert done.returncode == code, done.stdout + done.stderr
    assert (tasks / "scontrol.txt").exists() == (code == 0)


def test_an_index_beyond_the_table_names_the_range(tasks: Path) -> None:
    done = evaluate(tasks, 5)
    assert done.returncode == 2
    assert "--array=0-4" in done.stderr
    assert not (tasks / "calls.txt").exists()


def test_a_line_without_tabs_is_an_error(tasks: Path) -> None:
    done = evaluate(tasks, 3)
    assert done.returncode == 2
    assert "TAB" in done.stderr
    assert not (tasks / "calls.txt").exists()


def list_tasks(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return run("eval_tasks.sh", [str(word) for word in words], ROOT, **env)


def save(run_folder: Path, *names: str, sealed: bool = True) -> None:
    for name in names:
        folder = run_folder / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").touch()
        if sealed:
            (folder / "manifest.json").touch()


def test_each_checkpoint_meets_each_benchmark(tmp_path: Path) -> None:
    save(tmp_path / "a", "step_00000010", "step_00000020")
    save(tmp_path / "a", "step_00000030", sealed=False)
    save(tmp_path / "a", "step_00000040.part", "step_00000050.aside")
    out = tmp_path / "seg"
    done = list_tasks(tmp_path / "a", out, "--limit", 5, BENCHMARKS="voc20 ade20k")
    assert done.stdout == "4\n", done.stderr
    rows = [x.split("\t") for x in (out / "tasks.tsv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == [
        f"{out}/step_{step:08d}/{name}" for step in (10, 20) for name in ("voc20", "ade20k")
    ]
    assert rows[3][1:] == [
        "eval.zeroshot_seg",
        f"--dataset ade20k --model {tmp_path}/a/checkpoints/step_00000020 --limit 5",
    ]


def test_one_checkpoint_meets_every_benchmark_there_is(tmp_path: Path) -> None:
    save(tmp_path / "a", "step_00000010", "step_00000020")
    one = tmp_path / "a" / "checkpoints" / "step_00000010"
    count = len(config_names("protocols", ".yaml"))
    assert list_tasks(one, tmp_path / "seg").stdout == f"{count}\n"


def test_weights_by_tag_are_evaluated_too(tmp_path: Path) -> None:
    done = list_tasks("ViT-B-16-quickgelu:openai", tmp_path / "seg", BENCHMARKS="voc20")
    assert done.stdout == "1\n", done.stderr
    row = (tmp_path / "seg" / "tasks.tsv").read_text().splitlines()[1]
    assert row.split("\t")[0] == f"{tmp_path}/seg/ViT-B-16-quickgelu-openai/voc20"
    assert "--model ViT-B-16-quickgelu --pretrained openai" in row


def test_a_model_of_the_hub_is_one_name(tmp_path: Path) -> None:
    done = list_tasks("hf-hub:org/model", tmp_path / "seg", BENCHMARKS="voc20")
    assert done.stdout == "1\n", done.stderr
    output, _, flags = (tmp_path / "seg" / "tasks.tsv").read_text().splitlines()[1].split("\t")
    assert output == f"{tmp_path}/seg/hf-hub-org-model/voc20"
    assert flags.split() == ["--dataset", "voc20", "--model", "hf-hub:org/model"]


def test_classification_is_one_line_more_for_each_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a", "step_00000010", "step_00000020")
    out = tmp_path / "seg"
    words = ("--cls", "val/{0..1}.tar", "--classes", "c.json", tmp_path / "a", out, "--limit", 5)
    done = list_tasks(*words, BENCHMARKS="voc20")
    assert done.stdout == "4\n", done.stderr
    rows = [x.split("\t") for x in (out / "tasks.tsv").read_text().splitlines()[1:]]
    assert [row[1] for row in rows] == ["eval.zeroshot_seg", "eval.zeroshot_cls"] * 2
    assert rows[1][0] == f"{out}/step_00000010/cls"
    assert rows[1][2].split() == [
        "--val-data", "val/{0..1}.tar", "--classes", "c.json", "--model",
        f"{tmp_path}/a/checkpoints/step_00000010",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none", "seg"], "none is no folder, nor MODEL:TAG, nor hf-hub:"),
        (["--cls", "x", "V:t", "seg"], "--cls and --classes belong together"),
        (["--classes", "x"], "--cls and --classes belong together"),
        (["empty", "seg"], "no checkpoint step_* in"),
        (["V:t", "seg", "--classes", "a b"], "'a b' holds a blank"),
        (["V:t"], "usage: bash slurm/eval_tasks.sh"),
    ],
)
def test_a_mistake_in_listing_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    placed = [str(tmp_path / word) if word in ("empty", "seg") else word for word in words]
    done = list_tasks(*placed)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "seg").exists()


def test_an_unknown_benchmark_is_named(tmp_path: Path) -> None:
    done = list_tasks("V:t", tmp_path / "seg", BENCHMARKS="voc20 vok21")
    assert done.returncode == 2
    assert "no benchmark vok21" in done.stderr
