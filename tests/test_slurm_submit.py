"""Submission: what `slurm/submit.sh` hands to sbatch, and what it refuses before."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.toy_batch import BASH, ROOT, make_checkout
from tests.toy_batch import run_script as run

pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path)


def submit(checkout: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run("submit.sh", list(words), checkout, SITE_LOGS=str(checkout / "logs"), **env)


def test_the_sites_values_reach_sbatch_and_flags_come_after_them(checkout: Path) -> None:
    done = submit(
        checkout, "--nodes", "8", "train.sbatch", "--name", "a b",
        SITE_PARTITION="gpu", SITE_ACCOUNT="me", SITE_NODES="2", SITE_GPUS_PER_NODE="8",
        SITE_SBATCH_MORE="--exclusive --mail-type=END",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    for word in ("--partition=gpu", "--account=me", "--gres=gpu:8", "--signal=B:USR1@300",
                 "--exclusive", "--mail-type=END"):  # fmt: skip
        assert word in words
    assert words.index("--nodes=2") < words.index("--nodes")
    assert words[-3:] == ["slurm/train.sbatch", "--name", "a b"]
    assert not [word for word in words if word.startswith(("--qos", "--mem", "--array"))]
    assert (checkout / "logs" / "slurm").is_dir()


def test_an_array_has_the_size_of_its_table(checkout: Path) -> None:
    done = submit(checkout, "finetune_array.sbatch", "slurm/finetune.tsv", SITE_AT_ONCE="2")
    assert "--array=0-5%2" in done.stdout.splitlines()


def test_an_evaluation_asks_for_one_gpu(checkout: Path) -> None:
    table = checkout / "t.tsv"
    table.write_text("a\tb\tc\n")
    words = submit(checkout, "eval_array.sbatch", str(table)).stdout.splitlines()
    assert "--gres=gpu:1" in words
    assert "--array=0-0" in words
    assert "--nodes=1" not in words


def test_print_submits_nothing_and_makes_no_folder(checkout: Path) -> None:
    done = submit(checkout, "--print", "train.sbatch", "--name", "a")
    assert done.stdout == ""
    assert done.stderr.startswith("sbatch --nodes=1 ")
    assert not (checkout / "logs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: bash slurm/submit.sh"),
        (["none.sbatch"], "no script slurm/none.sbatch; there are eval_array.sbatch"),
        (["eval_array.sbatch"], "usage: bash slurm/submit.sh eval_array.sbatch TABLE.tsv"),
        (["eval_array.sbatch", "none.tsv"], "no table none.tsv"),
        (
            ["finetune_array.sbatch", "short.tsv"],
            "short.tsv has 1 of the 4 columns it needs at least; separate them by TABs: b mine - -",
        ),
    ],
)
def test_a_mistake_in_submitting_is_one_line(checkout: Path, words: list[str], said: str) -> None:
    short = checkout / "short.tsv"
    short.write_text("# name\na\tmine\t-\t-\nb mine - -\n")
    done = submit(checkout, *(str(short) if word == short.name else word for word in words))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / "logs").exists()


def test_an_array_keeps_the_table_it_was_submitted_with(checkout: Path) -> None:
    table = checkout / "t.tsv"
    table.write_text("a\teval.x\nb\teval.x\n")
    first = submit(checkout, "eval_array.sbatch", str(table)).stdout.splitlines()[-1]
    table.write_text("b\teval.x\nc\teval.x\n")
    second = submit(checkout, "eval_array.sbatch", str(table)).stdout.splitlines()[-1]
    assert Path(first).parent == Path(second).parent == checkout / "logs" / "slurm"
    assert Path(first).read_text() == "a\teval.x\nb\teval.x\n"
    assert Path(second).read_text() == table.read_text()
    assert submit(checkout, "eval_array.sbatch", str(table)).stdout.splitlines()[-1] == second
    assert len(list((checkout / "logs" / "slurm").iterdir())) == 2


def test_a_copy_that_was_changed_is_put_right(checkout: Path) -> None:
    table = checkout / "t.tsv"
    table.write_text("a\teval.x\n")
    copy = Path(submit(checkout, "eval_array.sbatch", str(table)).stdout.splitlines()[-1])
    copy.write_text("other\n")
    submit(checkout, "eval_array.sbatch", str(table))
    assert copy.read_text() == table.read_text()


def test_what_is_printed_of_an_array_can_be_typed(checkout: Path) -> None:
    done = submit(checkout, "--print", "finetune_array.sbatch", "slurm/finetune.tsv", "--seed", "1")
    copied, called = done.stderr.splitlines()
    assert copied.startswith("cp slurm/finetune.tsv ")
    copy = copied.split()[-1]
    assert called.split()[-4:] == ["slurm/finetune_array.sbatch", copy, "--seed", "1"]
    assert not (checkout / "logs").exists()


def test_without_sbatch_one_line_says_where_to_go(checkout: Path) -> None:
    few = checkout / "few"
    few.mkdir()
    for name in ("dirname", "basename"):
        (few / name).symlink_to(str(shutil.which(name)))
    done = submit(checkout, "train.sbatch", "--name", "a", PATH=str(few))
    assert done.returncode == 2
    assert "there is no sbatch on PATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / "logs").exists()
    done = submit(checkout, "--print", "train.sbatch", "--name", "a", PATH=str(few))
    assert done.returncode == 0


def test_help_names_the_scripts(checkout: Path) -> None:
    done = submit(checkout, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bash slurm/submit.sh")
    for script in (ROOT / "slurm").glob("*.sbatch"):
        assert f"  {script.name} " in done.stdout
    assert not (checkout / "logs").exists()
