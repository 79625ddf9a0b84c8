"""Zero-shot top-1 while training, over all ranks.

Not here: the classifier itself (`lazyclip.zeroshot`), other scores (the evaluation).
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor, nn

from lazyclip.base.errors import UserError
from lazyclip.shards import Sample, class_index_of, image_part, iterate_samples
from lazyclip.zeroshot import class_logits, templates, text_features, topk_correct

from .data.samples import decode_picture
from .distributed import Place, total
from .preflight import ValData, check_class

log = logging.getLogger(__name__)


class Probe:
    """Scores the model on the validation shards."""

    def __init__(
        self,
        val: ValData,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        place: Place,
        batch_size: int,
        limit: int | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep what scoring needs.

        Args:
            val: shards, classes, prompts.
            transform: picture -> 3 x H x W, without augmentation.
            tokenizer: texts -> B x context.
            place: each rank scores its share.
            batch_size: images in one pass.
            limit: score the first so many images, None for all.
            alive: called for each batch of images.
        """
        self.val, self.transform, self.tokenizer = val, transform, tokenizer
        self.place, self.batch_size, self.limit = place, batch_size, limit
        self.alive = alive
        self.images = 0  # scored last time, by all ranks

    @property
    def chance(self) -> float:
        """Top-1 of guessing among the classes."""
        return 1 / len(self.val.classes)

    def _samples(self) -> Iterator[Sample]:
        """Yield this rank's share of the samples."""
        number = 0
        for shard in self.val.shards:
            for sample in iterate_samples(shard):
                if self.limit is not None and number >= self.limit:
                    return
                if number % self.place.world == self.place.rank:
                    yield sample
                number += 1

    def _batches(self, passed: Counter[str]) -> Iterator[tuple[Tensor, Tensor]]:
        images: list[Tensor] = []
        targets: list[int] = []
        for sample in self._samples():
            content, target = image_part(sample), class_index_of(sample)
            if content is None or target is None:
                passed["no picture" if content is None else "no class"] += 1
                continue
            check_class(target, sample.label, len(self.val.classes))
            try:
                images.append(self.transform(decode_picture(content)))
            except ValueError as error:
                passed["bad picture"] += 1
                log.warning("--val-data %s: %s", sample.label, error)
                continue
            targets.append(target)
            if len(images) == self.batch_size:
                yield torch.stack(images), torch.tensor(targets)
                images, targets = [], []
        if images:
            yield torch.stack(images), torch.tensor(targets)

    @torch.no_grad()
    def top1(self, model: nn.Module) -> float:
        """Score the bare model; its training mode is put back.

        Raises:
            UserError: no image with a class, or a class beyond the list.
        """
        device, classes = self.place.device, self.val.classes
        was_training = model.training
        model.eval()
        prompts = templates(self.val.templates)
        queries = text_features(model, self.tokenizer, classes.queries, prompts)
        counts = torch.zeros(3, dtype=torch.float64, device=device)
        passed: Counter[str] = Counter()
        for images, targets in self._batches(passed):
            features = model.encode_image(images.to(device))  # type: ignore[operator]
            logits = class_logits(features, queries, classes.query_class, len(classes))
            counts[0] += topk_correct(logits, targets.to(device), (1,))[1]
            counts[1] += len(targets)
            self.alive()
        counts[2] = passed.total()
        model.train(was_training)
        correct, seen, lost = total(counts, self.place).tolist()
        if lost:
            log.warning("--val-data: %d images were not scored: %s", int(lost), dict(passed))
        if not seen:
            raise UserError(
                "--val-data holds no image with a class; its json needs class_index, or add KEY.cls"
            )
        self.images = int(seen)
        return correct / seen
