"""One training step, ours and open_clip_train's own, on the same batch in memory.

Ours is the trainer's real step (`training.loop.Loop`): bytes travel to the device, are normalised
there, and the step ends with the checks and the agreement of the ranks. Theirs is
`open_clip_train.train.train_one_epoch` on the plain tower, with open_clip's loss, AdamW in the
groups of its `main`, and float images, as its loader makes them. Not here: timing.
"""

import dataclasses
import gc
import importlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from training.assemble import build_model, make_trained
from training.distributed import find_place
from training.feed import Fed, fixed
from training.loop import Loop, Run
from training.params import parse
from training.preflight import make_plan

CLIP, LR, WD = 1.0, 5e-4, 0.2
LAST_TOKEN, WORDS = 49407, 49000  # CLIP's end of text, the largest id: where its tower pools


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained: plain name of the model, pooling, batch, and how it is run."""

    model: str
    pooling: str
    batch: int
    compiled: bool = False
    checkpointing: bool = False

    @property
    def how(self) -> str:
        """Name compile and checkpointing: `plain`, `compile`, `checkpointing` or both."""
        words = [w for w, on in (("compile", self.compiled), ("checkpointing", self.checkpointing))
                 if on]  # fmt: skip
        return "+".join(words) or "plain"


def sync(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give memory of dropped models back."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def make_batch(batch: int, side: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make uint8 images B x 3 x side x side and token ids B x context, on the host."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=draw)
    texts = torch.randint(1, WORDS, (batch, context), generator=draw)
    texts[:, -1] = LAST_TOKEN
    return (images.pin_memory(), texts.pin_memory()) if device.type == "cuda" else (images, texts)


class Ours:
    """The trainer's own step over one batch, again and again."""

    def __init__(self, setting: Setting, precision: str, device: str) -> None:
        """Build model, optimiser and loop as `training.main` does, without files."""
        words = [
            "--model", f"LaSt-{setting.model}", "--last-pooling", setting.pooling,
            "--batch-size", str(setting.batch), "--precision", precision, "--device", device,
            "--grad-clip-norm", str(CLIP), "--lr", str(LR), "--wd", str(WD), "--warmup", "100",
            *(["--torchcompile"] if setting.compiled else []),
            *(["--grad-checkpointing"] if setting.checkpointing else []),
        ]  # fmt: skip
        args = parse(words).args
        self.place = find_place(device)
        self.device, self.batch = self.place.device, setting.batch
        self.built = build_model(args, self.place)
        _, wrapped, optimizer = make_trained(self.built.model, args, self.place)
        info = self.built.info
        images, texts = make_batch(
            setting.batch, info.image_size[0], info.context_length, self.device
        )
        self.fed = Fed(images, texts)
        self.loop = Loop(
            Run(
                args=args, plan=make_plan(args, 100_000 * setting.batch, self.place),
                place=self.place, precision=precision, model=self.built.model, wrapped=wrapped,
                info=info, optimizer=optimizer, feed=fixed(lambda: (_ for _ in ())), probe=None,
                record={}, folder=None, metrics=None, curves=None,
            )
        )  # fmt: skip
        wrapped.train()

    def steps(self, count: int) -> None:
        """Take steps, and wait for the device."""
        for _ in range(count):
            self.loop._advance(self.fed)
            self.loop.step += 1
        sync(self.device)


def _plain_adamw(model: nn.Module) -> torch.optim.AdamW:
    """Make AdamW with the two groups of open_clip_train 3.3.0's `main.py`."""
    apart = ("bn", "ln", "bias", "logit_scale")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    bare = [p for n, p in named if p.ndim < 2 or any(word in n for word in apart)]
    rest = [p for n, p in named if not (p.ndim < 2 or any(word in n for word in apart))]
    groups = [{"params": bare, "weight_decay": 0.0}, {"params": rest, "weight_decay": WD}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)


class _Batches:
    """What `train_one_epoch` takes for its data: the same batch so many times."""

    def __init__(self, images: Tensor, texts: Tensor, count: int) -> None:
        self.images, self.texts, self.num_batches = images, texts, count
        self.num_samples = count * len(images)
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_batches):
            yield self.images, self.texts


class Theirs:
    """open_clip_train's own loop on the plain tower; where it is missing, its step written out."""

    def __init__(self, setting: Setting, precision: str, device: str) -> None:
        """Build model, loss and optimiser as its `main` does."""
        self.device, self.batch, self.precision = torch.device(device), setting.batch, precision
        made = open_clip.create_model_and_transforms(
            setting.model, precision=precision, device=device, output_dict=True
        )
        self.model: Any = made[0]
        if setting.checkpointing:
            self.model.set_grad_checkpointing()
        side = self.model.visual.image_size
        images, texts = make_batch(
            setting.batch, side[0] if isinstance(side, tuple) else side, self.model.context_length,
            self.device,
        )  # fmt: skip
        floats = images.float().div_(127.5).sub_(1)
        self.images = floats.pin_memory() if self.device.type == "cuda" else floats
        self.texts = texts
        self.optimizer = _plain_adamw(self.model)
        self.loss = open_clip.ClipLoss(cache_labels=True, rank=0, world_size=1)
        if setting.compiled:
            self.model = torch.compile(self.model)
        self.args = SimpleNamespace(
            device=device, precision=precision, accum_freq=1, distill=False, horovod=False,
            skip_scheduler=True, grad_clip_norm=CLIP, log_every_n_steps=10**9, world_size=1,
            batch_size=setting.batch, rank=0, local_rank=0, wandb=False, distributed=False,
        )  # fmt: skip
        try:
            self.epoch = importlib.import_module("open_clip_train.train").train_one_epoch
        except ImportError:
            self.epoch = None

    @property
    def how(self) -> str:
        """Say whose step this is."""
        return "open_clip_train's train_one_epoch" if self.epoch else "its step, written out"

    def steps(self, count: int) -> None:
        """Take steps, and wait for the device."""
        if self.epoch is not None:
            data = {"train": _Batches(self.images, self.texts, count)}
            self.epoch(self.model, data, self.loss, 0, self.optimizer, None, None, None, self.args)
        else:
            self.model.train()
            for _ in range(count):
                self._step()
        sync(self.device)

    def _step(self) -> None:
        on = self.precision == "amp_bf16"
        images = self.images.to(self.device, non_blocking=True)
        texts = self.texts.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on):
            total = sum(self.loss(**self.model(images, texts), output_dict=True).values())
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
