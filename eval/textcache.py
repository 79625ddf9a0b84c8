"""Text features on disk, so that a vocabulary is encoded once per text tower.

Not here: how texts are encoded (`lazyclip.zeroshot`).
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lazyclip.base.checkpoint import with_usual_mode
from lazyclip.base.errors import UserError
from lazyclip.base.logs import Progress
from lazyclip.factory import Built
from lazyclip.zeroshot import text_features

log = logging.getLogger(__name__)
TEXTS = 256  # encoded in one pass
TENSOR = "text_features"


def cache_folder() -> Path:
    """Return where text features lie: $LAZYCLIP_CACHE, else ~/.cache/lazyclip."""
    return Path(os.environ.get("LAZYCLIP_CACHE") or Path.home() / ".cache" / "lazyclip") / "text"


def text_key(built: Built, texts: Sequence[str]) -> str:
    """Hash what the features depend on: the text tower's tensors, its activation, the texts.

    The image tower is left out: models fine-tuned with a locked text tower share their features.
    """
    digest = hashlib.sha256()
    info = built.info
    digest.update(repr((info.activation, info.context_length, info.embed_dim)).encode())
    for name, tensor in sorted(built.model.state_dict().items()):
        if name.startswith("visual.") or tensor.numel() <= 1:  # the scale and bias of the loss
            continue
        raw = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {raw.dtype} {tuple(raw.shape)}".encode())
        digest.update(memoryview(raw.flatten().view(torch.uint8).numpy()))
    # The ids, not the words: another tokenizer makes other features of the same words.
    for start in range(0, len(texts), TEXTS):
        digest.update(built.tokenizer(list(texts[start : start + TEXTS])).numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, rows: int) -> Tensor | None:
    try:
        found = safetensors.torch.load_file(file)[TENSOR]
    except FileNotFoundError:
        return None
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        log.warning("%s cannot be read (%s); the prompts are encoded again", file, error)
        return None
    return found if found.shape[0] == rows else None


def _write(file: Path, features: Tensor) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with with_usual_mode(part):
            safetensors.torch.save_file({TENSOR: features.cpu().contiguous()}, part)
        part.replace(file)
    except OSError as error:
        log.warning("text features are not kept, %s cannot be written (%s)", file, error)


def encode_queries(
    built: Built,
    queries: Sequence[str],
    prompts: Sequence[Callable[[str], str]],
    *,
    use_cache: bool = True,
) -> Tensor:
    """Encode the prompts of all queries, or find them on disk.

    Args:
        built: the model.
        queries: Q words.
        prompts: templates, each applied to each query.
        use_cache: read and write the folder of `cache_folder`.

    Returns:
        Q x E float32, unit length, on the CPU; the same bytes with and without the cache.

    Raises:
        UserError: features that are not finite.
    """
    file = None
    if use_cache:
        texts = [prompt(query) for query in queries for prompt in prompts]
        file = cache_folder() / f"{text_key(built, texts)[:32]}.safetensors"
        found = _read(file, len(queries))
        if found is not None:
            log.info("text features of %d queries: read from the cache (%s)", len(queries), file)
            return found
    log.info("encoding %d queries x %d templates", len(queries), len(prompts))
    progress = Progress(len(queries), "queries")
    few = max(1, TEXTS // len(prompts))
    parts = []
    for start in range(0, len(queries), few):
        some = queries[start : start + few]
        parts.append(text_features(built.model, built.tokenizer, some, prompts, TEXTS).cpu())
        progress.update(len(some))
    features = torch.cat(parts)
    if not bool(torch.isfinite(features).all()):
        raise UserError("text features are not finite: the weights are broken, or not this model's")
    if file is not None:
        _write(file, features)
    return features
