"""The SLURM scripts on a real controller with two nodes on this machine: `make test-slurm`.

Minutes long, and in need of slurm-wlm and munge: not part of `make test`. Not here: the scripts'
logic with stand-ins (`test_slurm`), the decisions (`test_requeue`).
"""

import json
import os
import signal
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.toy import caption_shards
from tests.toy_run import metrics
from tests.toy_slurm import Cluster, cluster, until
from tests.toy_voc import make_protocol, make_voc
from training.audit import compare, read_audit

if os.environ.get("LAZYCLIP_TEST_SLURM") != "1":
    pytest.skip("starts a SLURM controller: make test-slurm", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
PASSES, PASS_STEPS, BATCH = 12, 16, 4
STEPS = PASSES * PASS_STEPS
# Steps into a run at which something happens to it.
LATER = 40
LONG = 240.0
RECIPE = "nano.yaml"
REAL = {
    "voc20": "voc2012_sample", "ade20k": "ade20k_sample", "coco_stuff": "coco_stuff164k_sample",
}  # fmt: skip


class Place(NamedTuple):
    """A cluster, the folder of a test's files, and the environment of its submissions."""

    cluster: Cluster
    folder: Path
    env: dict[str, str]

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def submit(self, *words: object, **env: str) -> int:
        return self.cluster.submit(ROOT, *words, env={**self.env, **env})

    def said(self, job: int, index: int | None = None) -> str:
        """What a job wrote, over all its starts; empty where it has not begun."""
        end = f"-{job}.out" if index is None else f"-{job}_{index}.out"
        return "".join(p.read_text() for p in (self.logs / "slurm").glob(f"*{end}"))

    def steps(self, name: str) -> int:
        file = self.logs / name / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def status(self, name: str) -> dict:
        return json.loads((self.logs / name / "status.json").read_text())

    def until_step(self, name: str, step: int = LATER) -> None:
        until(lambda: self.steps(name) >= step, LONG, f"{name} is at {self.steps(name)}")

    def until_restarted(self, job: object) -> None:
        until(lambda: self.cluster.field(job, "Restarts") == "1", LONG, f"{job} does not restart")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    make_recipe(folder)
    kept = {
        "LAZYCLIP_SITE": str(ROOT / "slurm" / "site.sh"), "SITE_GPUS_PER_NODE": "1",
        "SITE_GRES": "", "SITE_EVAL_GRES": "", "SITE_CPUS_PER_NODE": "1", "SITE_EVAL_CPUS": "1",
        "SITE_TIME": "60", "SITE_EVAL_TIME": "60", "SITE_SIGNAL_SECONDS": "40", "SITE_VENV": "",
        "SITE_SAVE_SECONDS": "60", "SITE_LOGS": str(folder / "logs"), "SITE_MASTER": "127.0.0.1",
        "LAUNCH": "srun", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "LAZYCLIP_CACHE": str(folder / "cache"),
    }  # fmt: skip
    with cluster() as made:
        path = os.pathsep.join([str(Path(sys.executable).parent), made.env["PATH"]])
        yield Place(made, folder, {**kept, "PATH": path})


def make_recipe(folder: Path) -> None:
    """Shards, and a recipe of the nano model on the CPU that names them."""
    pattern = caption_shards(folder / "shards", 4, BATCH * PASS_STEPS // 4, ("red", "blue"))
    about = {
        "model": "LaSt-ViT-nano", "train_data": pattern, "epochs": PASSES, "workers": 0,
        "threads": 1, "device": "cpu", "batch_size": BATCH, "report_to": "none",
        "log_every_n_steps": 1, "warmup": 4, "save_every": 16, "audit": "ids",
        "grad_clip_norm": 1.0,
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in about.items()]
    (folder / RECIPE).write_text("".join(lines))


def same(one: Path, two: Path, steps: int = STEPS) -> None:
    """Check that two runs saw the same samples and had the same losses, bit for bit."""
    lines, equal = compare(one, two)
    assert equal, lines
    assert read_audit(one) == read_audit(two)
    kept = ("step", "samples", "train/loss", "lr", "logit_scale")
    ours, theirs = ([[line[k] for k in kept] for line in metrics(f)] for f in (one, two))
    assert [line[0] for line in ours] == list(range(1, steps + 1))
    assert ours == theirs


def processes(name: str) -> list[int]:
    """The trainers of a run: Python, not srun or bash that carry the same words."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "python" in Path(words[0]).name and "training.main" in words and name in words:
            found.append(int(file.parent.name))
    return found


def time_limit_comes(place: Place, job: str, name: str) -> None:
    """Bring a task's time limit so near that SLURM warns it; it stands still until then."""
    place.until_step(name)
    held = processes(name)
    assert held
    for number in held:
        os.kill(number, signal.SIGSTOP)
    hours, minutes, _ = place.cluster.field(job, "RunTime").rsplit("-")[-1].split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    place.cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    number, index = map(int, job.split("_"))
    try:
        until(lambda: "the time limit is near" in place.said(number, index), LONG, "no warning")
    finally:
        for one in held:
            os.kill(one, signal.SIGCONT)
    place.until_restarted(job)
    place.cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")


@pytest.fixture(scope="module")
def tuned(place):
    """An array of three equal trainings: undisturbed; put back by SLURM; met by the time limit."""
    table = place.folder / "tune.tsv"
    names = ("plain", "requeued", "timed")
    rows = [f"{n}\t{place.folder / RECIPE}\t-\t-\t--lr 1e-3 --keep 2" for n in names]
    table.write_text("# name\n" + "\n".join(rows) + "\n")
    job = place.submit("finetune_array.sbatch", table, "--seed", "3")
    place.until_step("requeued")
    place.cluster.call("scontrol", "requeue", f"{job}_1")
    time_limit_comes(place, f"{job}_2", "timed")
    place.cluster.wait(job, 2 * LONG)
    return job, table


def test_a_task_that_slurm_puts_back_goes_on_bit_for_bit(place, tuned):
    job, _ = tuned
    assert place.cluster.field(f"{job}_1", "Restarts") == "1"
    assert "resumed from step_" in place.said(job, 1)
    same(place.logs / "plain", place.logs / "requeued")


def test_a_task_that_meets_its_time_limit_goes_on_bit_for_bit(place, tuned):
    job, _ = tuned
    said = place.said(job, 2)
    assert "requeue: timed: preempted at step" in said
    assert "(SIGUSR1: saved)" in said
    assert said.count("USR1: the time limit is near") == 1
    assert "resumed from step_" in said
    same(place.logs / "plain", place.logs / "timed")
    assert "resumed from step_" not in place.said(job, 0)


def test_a_finished_array_that_is_submitted_again_does_nothing(place, tuned):
    _, table = tuned
    before = [place.status(name) for name in ("plain", "requeued", "timed")]
    job = place.submit("finetune_array.sbatch", table, "--seed", "3")
    place.cluster.wait(job, LONG)
    for index, name in enumerate(("plain", "requeued", "timed")):
        assert f"{name}: finished: at step {STEPS}, nothing to do" in place.said(job, index)
        assert place.status(name) == before[index]
        assert "Train Epoch" not in place.said(job, index)


def test_two_nodes_by_srun_and_by_a_torchrun_that_is_cut_short_agree_bit_for_bit(place, tuned):
    words = [
        "train.sbatch",
        "--config",
        place.folder / RECIPE,
        "--batch-size",
        BATCH // 2,
        "--name",
    ]
    plain = place.submit(*words, "srun2", SITE_NODES="2")
    cut = place.submit(*words, "torchrun2", SITE_NODES="2", LAUNCH="torchrun")
    place.until_step("torchrun2")
    place.cluster.call("scancel", "--batch", "--signal=USR1", cut)
    place.until_restarted(cut)
    place.cluster.wait(plain, LONG)
    place.cluster.wait(cut, LONG)
    assert "requeue: torchrun2: preempted at step" in place.said(cut)
    for name in ("srun2", "torchrun2"):
        record = json.loads((place.logs / name / "params.json").read_text())
        assert record["ranks"] == 2
    same(place.logs / "srun2", place.logs / "torchrun2")


@pytest.fixture(scope="module")
def living(place, tuned):
    """A job whose training is under way, and the words it was submitted with."""
    words = ["train.sbatch", "--config", place.folder / RECIPE, "--name", "cancelled"]
    job = place.submit(*words)
    place.until_step("cancelled")
    return job, words


def test_a_second_job_on_a_run_that_lives_stops_and_leaves_it_alone(place, living):
    job, words = living
    counted = (place.logs / "slurm" / "cancelled.starts.json").read_text()
    second = place.submit(*words)
    place.cluster.wait(second, LONG, "FAILED")
    assert place.cluster.field(second, "Restarts") == "0"
    assert "cancelled is being trained by process" in place.said(second)
    assert (place.logs / "slurm" / "cancelled.starts.json").read_text() == counted
    assert place.cluster.states(job) == {"RUNNING"}


def test_a_cancelled_training_saves_and_does_not_come_back(place, living):
    job, _ = living
    place.cluster.call("scancel", job)
    place.cluster.wait(job, LONG, "CANCELLED")
    assert place.status("cancelled")["state"] == "preempted"
    assert place.cluster.field(job, "Restarts") == "0"


def test_a_mistyped_flag_of_a_run_that_goes_on_stops_before_torchrun(place):
    (place.logs / "mistyped").mkdir(parents=True)
    about = {"state": "preempted", "step": 3, "reason": "SIGUSR1: saved", "retryable": True}
    (place.logs / "mistyped" / "status.json").write_text(json.dumps(about))
    words = ["train.sbatch", "--config", place.folder / RECIPE, "--name", "mistyped", "--sede", 1]
    job = place.submit(*words, LAUNCH="torchrun")
    place.cluster.wait(job, LONG, "FAILED")
    assert place.cluster.field(job, "Restarts") == "0"
    (line,) = place.said(job).splitlines()
    assert line.startswith("error: mistyped: ")
    assert "--sede" in line


def test_three_starts_without_a_checkpoint_are_the_last(place):
    """A trainer that dies without a word each time: out of memory, a driver that fails."""
    stub = place.folder / "stub" / "python"
    stub.parent.mkdir()
    status = '{"state": "running", "reason": null, "retryable": false, "step": 0, "time": "%s"}'
    stub.write_text(
        "#!/usr/bin/env bash\n"
        f'if [[ $2 != training.main ]]; then exec "{sys.executable}" "$@"; fi\n'
        f"mkdir -p '{place.logs}/dies'\n"
        f"printf '{status}' \"$(date +%s%N)\" > '{place.logs}/dies/status.json'\n"
        "exit 9\n"
    )
    stub.chmod(0o755)
    path = os.pathsep.join([str(stub.parent), place.env["PATH"]])
    job = place.submit("train.sbatch", "--name", "dies", PATH=path)
    place.cluster.wait(job, LONG, "FAILED")
    said = place.said(job)
    assert place.cluster.field(job, "Restarts") == "2"
    assert said.count("requeue: dies: ended with code 9 without a word") == 2
    assert said.count("3 starts ended without a first checkpoint") == 1


@pytest.fixture(scope="module")
def data(place):
    """Real samples where there are any, a made data set in any case; root and benchmarks."""
    root = place.folder / "data"
    make_voc(root / "toy")
    names = []
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    shared = Path(os.environ.get("LAZYCLIP_SHARED_DATA", default)) / "segmentation"
    for name, tar in REAL.items():
        if (shared / f"{tar}.tar").is_file():
            with tarfile.open(shared / f"{tar}.tar") as opened:
                opened.extractall(root, filter="data")
            names.append(name)
    if names:
        return root, names
    return root / "toy", [str(make_protocol(place.folder / "toy"))]


def test_every_checkpoint_is_scored_on_every_benchmark_once(place, tuned, data):
    root, names = data
    output = place.folder / "seg"
    quick = ("--limit", 2, "--short", 112, "--window", 64, "--stride", 48, "--templates", "plain",
             "--device", "cpu", "--threads", 1, "--workers", 0, "--overlays", 0)  # fmt: skip
    words = ["bash", ROOT / "slurm" / "eval_tasks.sh", place.logs / "plain", output]
    count = int(place.cluster.call(*words, "--data-root", root, *quick, BENCHMARKS=" ".join(names)))
    assert count == 2 * len(names)
    more = {"SITE_AT_ONCE": "2", "SITE_SRUN_MORE": "--export=ALL"}
    job = place.submit("eval_array.sbatch", output / "tasks.tsv", **more)
    place.cluster.wait(job, 2 * LONG)
    found = sorted(output.glob("*/*/results.json"))
    assert len(found) == count
    for file in found:
        result = json.loads(file.read_text())
        assert result["images"] == 2 or result["dataset"] == "toy"
        assert file.parents[1].name in result["model"]["name"] + json.dumps(result["record"])
    times = [file.stat().st_mtime_ns for file in found]
    again = place.submit("eval_array.sbatch", output / "tasks.tsv")
    place.cluster.wait(again, LONG)
    assert all("nothing to do" in place.said(again, index) for index in range(count))
    assert [file.stat().st_mtime_ns for file in found] == times
