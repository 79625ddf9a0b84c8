"""The two models of an interpolation: the one a fine-tune began with, and the one it left.

Not here: mixing (`mixing`), scoring (`interpolate`).
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from lazyclip.base.checkpoint import newest_whole
from lazyclip.base.errors import UserError
from lazyclip.factory import HUB, Built, ModelInfo, build
from lazyclip.pooling import PoolSpec
from lazyclip.weights import CONFIG_FILE, clean_tag, trained_pooling

from .mixing import check_pair, mix

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Endpoints:
    """Two models that can be mixed.

    Fields: built, the tuned model, whose tower takes every mixture in turn; start and tuned, state
    dicts on the CPU; own, the pooling the start weights were trained with; names and sha256, of
    start and tuned.
    """

    built: Built
    start: dict[str, Tensor]
    tuned: dict[str, Tensor]
    own: PoolSpec
    names: tuple[str, str]
    sha256: tuple[str, str]

    def at(self, alpha: float) -> Built:
        """Put the mixture of a share into the model.

        Returns:
            The model, its info saying what it holds: `weights_sha256` hashes both weights' own and
            the share, and tells mixtures apart.
        """
        self.built.model.load_state_dict(mix(self.start, self.tuned, alpha))
        text = f"{alpha:g} {' '.join(self.sha256)} {self.built.info.image_size}"
        info = dataclasses.replace(
            self.built.info,
            pretrained=f"mix {alpha:g} of {_word(self.names[0])} and {_word(self.names[1])}",
            weights_sha256=hashlib.sha256(text.encode()).hexdigest(),
        )
        return dataclasses.replace(self.built, info=info)


def _word(name: str) -> str:
    """Write a path's last two parts, or a model and its tag, without a slash: tables cut there."""
    return " ".join(Path(name).parts[-2:])


def find_tuned(text: str) -> Path:
    """Find the saved model that `--tuned` means: a run's, a checkpoint, or a saved model's folder.

    Raises:
        UserError: no folder, or none that holds a model.
    """
    place = Path(text)
    for folder in (place, place / "model"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (place / "checkpoints").is_dir():
        newest = newest_whole(place / "checkpoints")
        if newest is not None:
            log.info("--tuned %s has not ended: its newest checkpoint is taken, %s", text, newest)
            return newest
    raise UserError(
        f"--tuned {text} holds no {CONFIG_FILE}; give a run's folder (logs/NAME), one of its "
        "checkpoints, or a saved model's folder"
    )


def _recorded(folder: Path) -> dict[str, Any]:
    """Read what a saved model's record tells of the model it began as, empty if nothing."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return dict(record["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def other_start(tuned: Path, start: ModelInfo) -> str | None:
    """Say what a tuned model began with where its record shows that it was not this start.

    Args:
        tuned: folder of the tuned model.
        start: of the model that is given as its start.

    Returns:
        What it began with; None where that is this start, or nothing shows it.
    """
    began = _recorded(tuned)
    if "weights_sha256" not in began or str(began.get("name")).startswith(HUB):
        return None
    digest, weights = began["weights_sha256"], began.get("pretrained")
    if digest is None:
        return None if weights else "random weights"
    if start.weights_sha256 in (None, digest):
        return None
    given = start.pretrained
    # One tag may lie in the cache in two formats.
    if weights and given and "/" not in weights and clean_tag(weights) == clean_tag(given):
        return None
    return f"{weights or began.get('name')} ({digest[:12]})"


def split_start(text: str, tuned: Path) -> tuple[str, str | None]:
    """Read `--start` as a model name and its weights.

    Args:
        text: a saved model's or a run's folder, a weight file, `MODEL/TAG`, a tag alone, or a name
            of the hub.
        tuned: folder of the tuned model, whose record names the model for a tag or a file alone.

    Raises:
        UserError: a tag or a file alone, and no record that names the model.
    """
    place = Path(text)
    if text.startswith(HUB) or place.is_dir():
        return text, None
    if not place.is_file() and "/" in text:
        name, _, tag = text.rpartition("/")
        return name, tag
    name_of = _recorded(tuned).get("name")
    if name_of is None or "/" in name_of:
        raise UserError(
            f"--start {text} names no model, and {tuned} records none; write MODEL/TAG, such as "
            "LaSt-ViT-B-16/openai, or give a saved model's folder"
        )
    return name_of, text


def load_endpoints(start: str, tuned: str, device: str, last: dict[str, Any] | None) -> Endpoints:
    """Build both models and check that they can be mixed.

    The start is built at the tuned model's image size, its positions resized as the fine-tune did.

    Args:
        start: see `split_start`.
        tuned: see `find_tuned`.
        device: of the model that is scored.
        last: single keys of the pooling that override the tuned model's.

    Raises:
        UserError: models that are not there, or that cannot be mixed.
    """
    folder = find_tuned(tuned)
    after = build(str(folder), device=device, last=last)
    name, weights = split_start(start, folder)
    h, w = after.info.image_size
    before = build(name, weights, image_size=h if h == w else None)
    if before.info.activation != after.info.activation:
        raise UserError(
            f"--start {start} runs with {before.info.activation}, --tuned {tuned} with "
            f"{after.info.activation}: they do not belong together; give the model that the "
            "fine-tune began with"
        )
    states = [
        {key: value.detach().cpu().clone() for key, value in one.model.state_dict().items()}
        for one in (before, after)
    ]
    check_pair(states[0], states[1], (f"--start {start}", f"--tuned {tuned}"))
    own = trained_pooling(name, weights)
    if own is None and not name.startswith(HUB):
        raise UserError(f"--start {start} has no weights; write MODEL/TAG or a saved folder")
    hashes = [str(one.info.weights_sha256 or text) for one, text in ((before, start),
                                                                    (after, tuned))]  # fmt: skip
    began = other_start(folder, before.info)
    if began is not None:
        log.warning(
            "--tuned %s records that it began with %s, not with the weights of --start %s: these "
            "need not mix; give what it began with", tuned, began, start,
        )  # fmt: skip
    log.info("start %s, tuned %s: %d tensors", start, folder, len(states[1]))
    return Endpoints(
        built=after,
        start=states[0],
        tuned=states[1],
        own=own or PoolSpec(pooling="token"),
        names=(start, tuned),
        sha256=(hashes[0], hashes[1]),
    )
