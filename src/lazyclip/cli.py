"""The command `lazyclip X`: a table of names, each resolved when it is called.

The only place in the library that knows training and eval; it never imports them before a command
is chosen. In a checkout they are the top-level packages, in an installed lazyclip its own parts.
"""

import importlib
import sys
from collections.abc import Sequence

from lazyclip.base.errors import cli, unknown
from lazyclip.base.resources import PACKAGE, checkout_root

# command -> (module below training or eval, what it does)
COMMANDS = {
    "train": ("training.main", "train from webdataset shards"),
    "index": ("training.index", "index training shards and say what is odd about them"),
    "audit": ("training.audit", "compare the samples that two runs were trained on"),
    "seg": ("eval.zeroshot_seg", "score zero-shot segmentation"),
    "cls": ("eval.zeroshot_cls", "score zero-shot classification"),
    "point-in-box": ("eval.point_in_box", "score Patch Score and Point-in-Box"),
    "interpolate": ("eval.interpolate", "mix start and tuned weights, and score the mixtures"),
    "segment": ("eval.segment", "paint masks for anyone's pictures"),
    "clip-bench": ("eval.clip_bench", "clip_benchmark's command line with lazyclip's models"),
    "table": ("eval.table", "collect results; published figures beside ours"),
}


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: lazyclip COMMAND [flags]   (lazyclip COMMAND --help)\n\n" + "\n".join(rows)


def resolve(module: str) -> str:
    """Return the importable name of a command's module, in a checkout or in a wheel."""
    if (PACKAGE / module.split(".")[0]).is_dir():
        return f"{PACKAGE.name}.{module}"
    root = checkout_root()
    if root is not None and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return module


def run(argv: Sequence[str] | None = None) -> None:
    """Run one command of lazyclip."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return
    # `lazyclip zeroshot_seg` is understood as well as `lazyclip seg`.
    by_module = {module.split(".")[1]: name for name, (module, _) in COMMANDS.items()}
    name = by_module.get(words[0].replace("-", "_"), words[0])
    if name not in COMMANDS:
        raise unknown("command", words[0], COMMANDS, "see lazyclip --help")
    entry = importlib.import_module(resolve(COMMANDS[name][0])).main
    raise SystemExit(entry(words[1:]))


main = cli(run)

if __name__ == "__main__":
    raise SystemExit(main())
