"""What a loader process does when it begins: it leaves signals to its rank and ends with it.

Not here: what it loads.
"""

import ctypes
import logging
import os
import signal

import torch

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def settle(worker: int) -> None:
    """Set up a loader process; DataLoader calls this with its number.

    A request to end that is sent to the whole process group must not reach it: its rank decides,
    saves, and ends it. When the rank is killed, the system ends it too (Linux).
    """
    del worker
    torch.set_num_threads(1)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # SIGTERM stays with DataLoader, which ends a stuck process by it.
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    except (OSError, AttributeError, TypeError):
        log.warning("this system cannot tie a process to its parent; look for orphans by hand")
