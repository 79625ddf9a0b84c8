"""Ranks from SLURM's environment alone: what counts, what is refused, which GPU is whose."""

import pytest
import torch

from lazyclip.base.errors import UserError
from training.distributed import find_place

KNOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
         "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def put(**values: str) -> None:
        for name in KNOWN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def test_a_task_of_srun_with_an_address_is_a_rank(environment):
    environment(**TASK, **MEETING)
    place = find_place("cpu")
    assert (place.rank, place.world, place.local_rank) == (5, 8, 1)


def test_tasks_of_srun_without_an_address_would_each_train_alone(environment):
    environment(**TASK)
    with pytest.raises(UserError, match="srun started 8 tasks and MASTER_ADDR is not set"):
        find_place("cpu")


def test_an_address_without_a_port_is_refused(environment):
    environment(**TASK, MASTER_ADDR="n1")
    with pytest.raises(UserError, match="export MASTER_PORT"):
        find_place("cpu")


def test_one_task_of_srun_needs_no_address(environment):
    environment(**{**TASK, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"})
    assert find_place("cpu").world == 1


def test_ranks_of_torchrun_do_not_ask_for_slurms(environment):
    environment(**TASK, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    place = find_place("cpu")
    assert (place.rank, place.world, place.local_rank) == (1, 2, 1)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 1)])
def test_a_task_takes_its_gpu_or_the_only_one_it_sees(environment, monkeypatch, visible, index):
    environment(**TASK, **MEETING)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert find_place("cuda").device == torch.device("cuda", index)


def test_more_processes_than_gpus_are_refused(environment, monkeypatch):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="rank 4 of this node has no GPU"):
        find_place("cuda")
