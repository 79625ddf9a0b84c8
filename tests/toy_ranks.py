"""Several ranks as forked processes, which need no second start of Python. Not here: what they do.

Fork and not spawn: importing torch takes seconds, and a fault test starts dozens of processes.
"""

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WAIT = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    world: int, work: Callable[..., Any], *args: object, log: Path | None = None
) -> list[int]:
    """Fork `world` processes in a group of their own; each calls `work(*args)` with the environment
    of a rank and exits with its code. Returns their ids, the first being the group's."""
    port = free_port()
    ids: list[int] = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _be_a_rank(rank, world, port, ids[0] if ids else 0, work, args, log)
        if not ids:
            os.setpgid(child, child)
        ids.append(child)
    return ids


def _be_a_rank(
    rank: int, world: int, port: int, group: int, work: Callable[..., Any], args: tuple,
    log: Path | None,
) -> None:  # fmt: skip
    code = 1
    try:
        os.setpgid(0, group)
        torch.set_num_threads(1)
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
        if world > 1:
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        code = work(*args) or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(ids: list[int], seconds: float = WAIT) -> list[int]:
    """Wait for processes; returns exit codes, negative ones are signals. A late one is killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(ids):
        for child in set(ids) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            kill(ids)
            raise TimeoutError(f"processes {set(ids) - set(codes)} were still running")
        time.sleep(0.01)
    return [codes[child] for child in ids]


def kill(ids: list[int]) -> None:
    """Kill the whole group of processes that `start` returned."""
    try:
        os.killpg(ids[0], signal.SIGKILL)
    except ProcessLookupError:
        return


def in_ranks(world: int, work: Callable[..., Any], *args: object) -> list[Any]:
    """Call `work(rank, *args)` on gloo ranks; returns their results in order of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        codes = wait(start(world, _with_group, world, work, folder, *args, log=log))
        if any(codes):
            raise RuntimeError(f"exit codes {codes}: {log.read_text()[-4000:]}")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _with_group(world: int, work: Callable[..., Any], folder: str, *args: object) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    found = work(rank, *args)
    torch.save(found, f"{folder}/{rank}.pt")
    if world > 1:
        dist.destroy_process_group()
