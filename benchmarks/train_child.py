"""One training by its own command in a process of its own, timed at the optimiser's steps.

Runs in either environment: `theirs` is `open_clip_train.main`, `ours` is `training.main`; both are
timed by one hook of torch's optimisers. The last line printed is JSON. Not here: what is compared.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from processes import cpu_seconds, family
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """The times at which optimiser steps were done; ends the process after so many."""

    def __init__(self, warm: int, stop: int, batch: int) -> None:
        """Count from the step after `warm` to step `stop`."""
        self.warm, self.stop, self.batch = warm, stop, batch
        self.times: list[float] = []
        self.cpu = 0.0

    def __call__(self, *_: object) -> None:
        """Note one step."""
        self.times.append(time.time())
        if len(self.times) == self.warm:
            self.cpu = cpu_seconds()
        if len(self.times) == self.stop:
            self.end()

    def end(self) -> None:
        """Print what was found and end this process with its children."""
        found: dict[str, Any] = {"times": self.times}
        samples = (self.stop - self.warm) * self.batch
        if samples > 0:
            found["per_cpu_second"] = samples / (cpu_seconds() - self.cpu)
            found["per_second"] = samples / (self.times[-1] - self.times[self.warm - 1])
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        sys.stdout.flush()
        for child in family(os.getpid())[1:]:
            os.kill(child, signal.SIGKILL)
        os._exit(0)


def main() -> None:
    """Train until the last step that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("ours", "theirs"), required=True)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--stop", type=int, required=True)
    parser.add_argument("--batch", type=int, default=64)
    args, rest = parser.parse_known_args()
    torch.set_num_threads(1)
    register_optimizer_step_post_hook(Clock(args.warm, args.stop, args.batch))
    words = [*rest, "--batch-size", str(args.batch)]
    if args.side == "ours":
        importlib.import_module("training.main").run(words)
    else:
        importlib.import_module("open_clip").add_model_config(ROOT / "configs" / "models")
        importlib.import_module("open_clip_train.main").main(words)
    raise SystemExit("the training ended before the step that was asked for")


if __name__ == "__main__":
    main()
