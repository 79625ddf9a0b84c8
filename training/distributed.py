"""Ranks: start and end of the process group, and the gather that carries gradients.

Rank and world come from torchrun's environment, or SLURM's; a plain process is rank 0 of 1.
Not here: what is gathered (`objectives`).
"""

import contextlib
import dataclasses
import datetime
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lazyclip.base.errors import UserError

# A collective that waits longer ends its rank; the watchdog is meant to speak first.
TIMEOUT = datetime.timedelta(minutes=30)
# Waiting for rank 0 while it indexes shards or saves is no fault of anybody's.
PATIENT = datetime.timedelta(hours=24)
_PATIENT_GROUP: list[Any] = []


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands: its rank of world, its rank on the node, and its device.

    `planned`: the other ranks are only counted; there is nobody to talk to and nothing runs.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    planned: bool = False

    @property
    def first(self) -> bool:
        """Whether this rank writes files and lines."""
        return self.rank == 0


def _number(*names: str, default: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return default


def _check_meeting(by_slurm: bool) -> None:
    """Refuse tasks of srun that would each train alone, into the same folder."""
    tasks = _number("SLURM_STEP_NUM_TASKS", default=1)
    if "RANK" not in os.environ and not by_slurm and tasks > 1:
        raise UserError(
            f"srun started {tasks} tasks and MASTER_ADDR is not set: each would train alone; use "
            "slurm/train.sbatch, or export MASTER_ADDR (the first node) and MASTER_PORT"
        )
    if by_slurm and _number("SLURM_NTASKS", default=1) > 1 and "MASTER_PORT" not in os.environ:
        raise UserError("MASTER_ADDR is set and MASTER_PORT is not; export MASTER_PORT=29500")


def find_place(device: str | None) -> Place:
    """Read this process's place from the environment.

    Args:
        device: `cuda`, `cpu`, or None for CUDA where there is one.

    Raises:
        UserError: CUDA asked for and not there, more ranks on a node than GPUs, or several tasks
            of srun that were not told where to meet.
    """
    # torchrun sets RANK and WORLD_SIZE; srun without torchrun sets SLURM's, and counts as ranks
    # only where a rendezvous address was given with it.
    by_slurm = "RANK" not in os.environ and "MASTER_ADDR" in os.environ
    _check_meeting(by_slurm)
    rank = _number("RANK", *(["SLURM_PROCID"] if by_slurm else []), default=0)
    world = _number("WORLD_SIZE", *(["SLURM_NTASKS"] if by_slurm else []), default=1)
    local = _number("LOCAL_RANK", *(["SLURM_LOCALID"] if by_slurm else []), default=0)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return Place(rank, world, local, torch.device("cpu"))
    if kind.split(":")[0] != "cuda":
        raise UserError(f"--device {kind} is not known here; use cuda or cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {kind}: no CUDA device is visible; use --device cpu")
    if by_slurm and torch.cuda.device_count() == 1:
        # Under --gpus-per-task each task sees its own GPU alone, as number 0. Tasks that share one
        # by mistake are told so by NCCL.
        return Place(rank, world, local, torch.device("cuda", 0))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"rank {local} of this node has no GPU, {torch.cuda.device_count()} are visible; lower "
            "--nproc_per_node"
        )
    return Place(rank, world, local, torch.device("cuda", local))


@contextlib.contextmanager
def process_group(place: Place) -> Iterator[None]:
    """Hold a process group (NCCL on CUDA, gloo on the CPU) where there are several ranks."""
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if place.world == 1 or place.planned:
        yield
        return
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=TIMEOUT)
    _PATIENT_GROUP.append(dist.new_group(backend="gloo", timeout=PATIENT))
    try:
        yield
    finally:
        _PATIENT_GROUP.clear()
        dist.destroy_process_group()


def _patient() -> Any:
    """Return the group that waits long; the plain one where somebody else opened it."""
    return _PATIENT_GROUP[-1] if _PATIENT_GROUP else None


def from_first(value: Any, place: Place) -> Any:
    """Return rank 0's value of a plain object on every rank; waits as long as rank 0 takes."""
    if place.world == 1 or place.planned:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient())
    return box[0]


def first_alone(work: Callable[[], Any], place: Place) -> Any:
    """Do something on rank 0 and return its plain result everywhere.

    Raises:
        UserError: on every rank, what rank 0 met.
    """
    found: tuple[Any, str | None] = (None, None)
    if place.first:
        try:
            found = (work(), None)
        except UserError as error:
            found = (None, str(error))
    value, mistake = from_first(found, place)
    if mistake is not None:
        raise UserError(mistake)
    return value


def agree(values: Sequence[float], place: Place) -> list[float]:
    """Return the sums of some numbers over the ranks, the same on each; one small collective."""
    if place.world == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=place.device)
    dist.all_reduce(summed)
    return summed.tolist()


def gathered(value: Any, place: Place) -> list[Any]:
    """Return every rank's plain object, in rank order, on every rank."""
    if place.world == 1:
        return [value]
    parts: list[Any] = [None] * place.world
    dist.all_gather_object(parts, value, group=_patient())
    return parts


def total(value: Tensor, place: Place) -> Tensor:
    """Return the sum of a tensor over the ranks; the tensor given is left alone."""
    if place.world == 1:
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def counted(counter: Counter[str], place: Place) -> Counter[str]:
    """Return the sum of a counter over the ranks."""
    if place.world == 1:
        return counter
    return sum(gathered(counter, place), Counter())


def current_rank() -> int:
    """Return this process's rank in the group that is open; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All ranks' rows, in rank order; backward sums what every rank asks of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rank, ctx.count = dist.get_rank(), rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        summed = grad.contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count]


def gather(rows: Tensor) -> Tensor:
    """Gather rows B x E of all ranks to (world * B) x E, with gradients; B is equal on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


def gather_plain(rows: Tensor) -> Tensor:
    """Gather a tensor of all ranks along its first axis, without gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    # Neither gloo nor NCCL takes bool everywhere.
    sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows.contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(rows.dtype)
