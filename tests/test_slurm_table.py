"""The table of the paper's fine-tunes: what its lines mean, and that the site's GPUs hold them."""

import json
import re
from pathlib import Path

import pytest

from lazyclip.base.resources import config_names
from tests.toy_batch import ROOT
from training.main import main
from training.params import parse

# An 80 GB card. To what is counted come CUDA's own, about 1 GiB, and a tenth for fragmentation.
CARD, OWN, LOST = 80e9, 2**30, 1.1


def table_rows() -> list[list[str]]:
    lines = (ROOT / "slurm" / "finetune.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def test_the_table_holds_three_families_in_two_sizes() -> None:
    names = [row[0] for row in table_rows()]
    assert len(set(names)) == 6
    for family in ("-clip-", "-metaclip-", "-eva02-"):
        assert sum(family in name for name in names) == 2
    assert sum("b16" in name for name in names) == sum("l14" in name for name in names) == 3


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0])
def test_a_line_of_the_table_is_what_the_trainer_reads(row: list[str]) -> None:
    name, recipe, model, pretrained, *flags = row
    assert {recipe, f"{recipe}-cautious"} <= set(config_names("recipes", ".yaml"))
    words = ["--config", recipe, "--name", name, *(flags[0].split() if flags else [])]
    read = parse(words).args
    assert (read.model, read.pretrained) == (model, pretrained)
    assert recipe in (name, f"{name}-cautious")


def memory(row: list[str], gpus: int, folder: Path, *more: str) -> float:
    """Bytes that a line's training takes on each of some GPUs, by the dry run."""
    name, recipe, model, pretrained, *flags = row
    plan = folder / "plan.json"
    words = ["--config", recipe, *(flags[0].split() if flags else []), "--model", model,
             "--pretrained", pretrained, *more, "--name", name]  # fmt: skip
    assert main([*words, "--dry-run", str(plan), "--gpus", str(gpus), "--gpu", "h100"]) == 0
    return LOST * json.loads(plan.read_text())["costs"]["memory"]["total"] + OWN


def site_gpus() -> int:
    text = (ROOT / "slurm" / "site.sh").read_text()
    values = [re.search(rf"{name}:-(\d+)}}", text) for name in ("SITE_NODES", "SITE_GPUS_PER_NODE")]
    return int(values[0][1]) * int(values[1][1])


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0])
def test_a_line_fits_the_sites_gpus_and_no_more_pieces_than_that_needs(
    row: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = site_gpus()
    assert gpus == 4
    assert memory(row, gpus, tmp_path) < CARD
    pieces = int(row[4].split()[row[4].split().index("--accum-freq") + 1])
    for fewer in range(1, pieces):
        asked = ["--accum-freq", str(fewer)]
        if parse(["--config", row[1]]).args.global_batch % (gpus * fewer) == 0:
            assert memory(row, gpus, tmp_path, *asked) > CARD


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0])
def test_a_line_is_cut_evenly_on_more_gpus_too(row: list[str], tmp_path: Path) -> None:
    for gpus in (8, 64):
        assert memory(row, gpus, tmp_path) < CARD
