"""Zero-shot classifiers: templates, class files, text features, and top-k counts.

Used by training probes and by every evaluation. Not here: which images are scored, what a dense
map does with the logits.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

from lazyclip import bridge
from lazyclip.base.errors import UserError
from lazyclip.base.resources import config_names, config_root

Template = Callable[[str], str]
_NAMED: dict[str, Sequence[Template]] = {
    "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
    "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    "plain": [lambda name: f"a photo of a {name}."],
}
TEMPLATE_NAMES = tuple(_NAMED)


@dataclasses.dataclass(frozen=True)
class ClassList:
    """Classes and their text queries.

    Fields: names, one a class (its first query); queries, all of them in order; query_class, the
    class index of each query; sha256 of the canonical text.
    """

    names: tuple[str, ...]
    queries: tuple[str, ...]
    query_class: tuple[int, ...]
    sha256: str

    def __len__(self) -> int:
        """Count the classes."""
        return len(self.names)


def templates(name: str = "openai") -> list[Template]:
    """Return prompt templates by name, or from a text file with one `{}` template a line.

    Args:
        name: `openai` (80), `simple` (7), `plain` (1), or the path of a file.

    Raises:
        UserError: neither a name nor a file, or a line without exactly one `{}`.
    """
    if name in _NAMED:
        return list(_NAMED[name])
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"templates '{name}' are neither a file nor one of {', '.join(TEMPLATE_NAMES)}"
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no template; write one a line, such as 'a photo of a {{}}.'")
    for line in lines:
        if line.count("{}") != 1:
            raise UserError(f"{path}: template '{line}' needs exactly one {{}} for the class name")
    # Not str.format: other braces of the line are text.
    return [functools.partial(line.replace, "{}") for line in lines]


def class_list(lines: Iterable[str]) -> ClassList:
    """Make a class list from lines, one class each, synonyms separated by comma and blank."""
    return _from_words(
        [word.strip() for word in line.split(", ") if word.strip()] for line in lines
    )


def _from_words(classes: Iterable[Sequence[str]]) -> ClassList:
    """Make a class list from each class's queries."""
    names: list[str] = []
    queries: list[str] = []
    owners: list[int] = []
    for index, words in enumerate(classes):
        if not words:
            raise UserError(f"class {index} has no name; write one class a line")
        names.append(words[0])
        queries.extend(words)
        owners.extend([index] * len(words))
    if not names:
        raise UserError("the class list is empty; give one class a line, or a comma list")
    text = "\n".join("|".join(q for q, o in zip(queries, owners, strict=True) if o == i)
                     for i in range(len(names)))  # fmt: skip
    digest = hashlib.sha256(text.encode()).hexdigest()
    return ClassList(tuple(names), tuple(queries), tuple(owners), digest)


def read_classes(spec: str | Path) -> ClassList:
    """Read classes from a file, a shipped list, or a comma list.

    Args:
        spec: path of a text file (one class a line, synonyms by ', ') or of a `.json` file (a list
            of `{"index", "name"}` or of names, or an object that holds one; only `name` is used,
            synonyms are not); the name of a list in `configs/classes` such as `voc20`; or words
            such as `cat, sofa, wall`, each its own class.

    Raises:
        UserError: no such file or one of another form, or a class without a name.
    """
    path = Path(spec)
    try:
        is_file = path.is_file()
    except OSError:  # a long comma list is no file name
        is_file = False
    if is_file and path.suffix.lower() == ".json":
        return _from_words([name] for name in _json_names(path))
    if is_file:
        try:
            return class_list(path.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise UserError(f"class file {path} is no UTF-8 text; write one class a line") from None
    text = str(spec)
    if text in config_names("classes", ".txt"):
        shipped = config_root() / "classes" / f"{text}.txt"
        return class_list(shipped.read_text(encoding="utf-8").splitlines())
    if path.suffix in (".txt", ".json") or "/" in text:
        shipped_names = config_names("classes", ".txt")
        hint = (
            f"the shipped list is named without its ending: {path.stem}"
            if path.stem in shipped_names
            else 'give a file with one class a line, a comma list such as "cat, dog", or a shipped '
            f"list: {', '.join(shipped_names)}"
        )
        raise UserError(f"class file {spec} does not exist; {hint}")
    return class_list(word.strip() for word in text.split(",") if word.strip())


def _json_names(path: Path) -> list[str]:
    """Read class names, in the order of their index, from a JSON file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"class file {path} is not readable as JSON ({error})") from None
    if isinstance(loaded, dict):
        lists = [value for value in loaded.values() if isinstance(value, list)]
        loaded = lists[0] if len(lists) == 1 else None
    if not isinstance(loaded, list):
        raise UserError(f'class file {path} needs one list of {{"index": 0, "name": "cat"}}')
    found: dict[int, str] = {}
    for place, row in enumerate(loaded):
        index = row.get("index", place) if isinstance(row, dict) else place
        name = row.get("name") if isinstance(row, dict) else row
        if not (isinstance(name, str) and name.strip() and type(index) is int):
            raise UserError(f"class file {path}: entry {place} lacks a name or a whole index")
        if index in found:
            raise UserError(f"class file {path}: index {index} stands twice; keep one")
        found[index] = name.strip()
    gaps = sorted(set(range(len(found))) - set(found))
    if gaps:
        raise UserError(f"class file {path}: index {gaps[0]} is missing of 0..{len(found) - 1}")
    return [found[index] for index in range(len(found))]


@torch.no_grad()
def text_features(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    queries: Sequence[str],
    prompts: Sequence[Template],
    batch_size: int = 256,
) -> Tensor:
    """Encode queries: each prompt to unit length, their mean, to unit length again.

    Prompts go through the tower in order of length, each batch cut to its longest where the text
    tower is causal; elsewhere at full length.

    Args:
        model: a CLIP model of open_clip.
        tokenizer: texts -> B x context.
        queries: Q words.
        prompts: templates, each applied to each query.
        batch_size: texts in one pass.

    Returns:
        Text features, Q x E float32, of unit length, on the model's device.
    """
    tokens = tokenizer([prompt(query) for query in queries for prompt in prompts])
    order = bridge.text_lengths(model, tokens).argsort(stable=True)
    parts = []
    for rows in order.split(batch_size):
        features = bridge.encode_text(model, tokens[rows])
        parts.append(functional.normalize(features.float(), dim=-1))
    in_order = torch.cat(parts)[order.argsort().to(parts[0].device)]
    per_query = in_order.reshape(len(queries), len(prompts), -1).mean(dim=1)
    return functional.normalize(per_query, dim=-1)


def class_logits(
    features: Tensor, query_features: Tensor, query_class: Sequence[int], classes: int
) -> Tensor:
    """Score images against classes: the largest cosine over a class's queries.

    Args:
        features: image features, B x E, any length.
        query_features: text features, Q x E, unit length.
        query_class: class index of each query, Q.
        classes: number of classes C.

    Returns:
        Cosines, B x C float32.
    """
    cosine = functional.normalize(features.float(), dim=-1) @ query_features.float().T  # B x Q
    owner = torch.as_tensor(query_class, device=cosine.device).expand(cosine.shape[0], -1)
    logits = cosine.new_full((cosine.shape[0], classes), -torch.inf)
    return logits.scatter_reduce(1, owner, cosine, reduce="amax")


def topk_correct(logits: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, int]:
    """Count images whose class is among the k largest logits.

    Args:
        logits: B x C.
        targets: class indices, B.
        ks: the counts k asked for; those above C are left out.

    Returns:
        k -> number of images.
    """
    kept = [k for k in ks if k <= logits.shape[1]]
    best = logits.topk(max(kept, default=1), dim=1).indices == targets[:, None]  # B x max k
    return {k: int(best[:, :k].any(dim=1).sum()) for k in kept}
