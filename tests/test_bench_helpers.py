"""The benchmarks' helpers: shards as LAION's, a process counted with its children, ratios."""

import io
import json
import os
import subprocess
import sys
import tarfile

import pytest

from training.data.prepare import Wanted, prepare

BURN = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_the_shards_have_the_layout_of_laion(load, tmp_path):
    made = load("laion_shards")
    pattern = made.write_shards(tmp_path / "s", shards=2, each=3, side=16)
    content = (tmp_path / "s" / "00001.tar").read_bytes()
    assert content[156:157] == b"x"  # a pax header comes first
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = archive.getnames()
        about = json.load(archive.extractfile("000010002.json"))
    assert names[:3] == ["000010000.jpg", "000010000.json", "000010000.txt"]
    assert about["key"] == "000010002"
    assert about["width"] == 16
    made.forget(tmp_path / "s")
    manifest = prepare(Wanted(pattern=pattern, fallback=tmp_path)).manifest
    assert manifest.counts.sum() == 6
    assert not manifest.findings
    before = (tmp_path / "s" / "00000.tar").stat().st_mtime_ns
    assert made.write_shards(tmp_path / "s", shards=2, each=3, side=16) == pattern
    assert (tmp_path / "s" / "00000.tar").stat().st_mtime_ns == before


def test_processor_time_counts_children_that_live_and_that_ended(load):
    processes = load("processes")
    before = processes.cpu_seconds()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    ended = processes.cpu_seconds() - before
    assert ended >= 0.25
    command = [sys.executable, "-c", BURN + "print(1, flush=True)\nimport time; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert child.pid in processes.family(os.getpid())
        assert processes.cpu_seconds() - before >= ended + 0.25
        rss, pss = processes.memory_bytes()
        alone, _ = processes.memory_bytes(child.pid)
        assert rss > alone > 0
        assert 0 < pss <= rss
        child.kill()


def test_ratios_are_of_one_round_each(load):
    load("timing")
    kept = load("kept")
    ratio = kept.ratio_of([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert ratio == (3.0, 2.0, 4.0)
    assert str(ratio) == "3.00 x (2.00-4.00)"


def test_the_slope_is_that_of_the_second_half(load):
    for name in ("timing", "kept", "laion_shards", "processes"):
        load(name)
    memory = load("bench_loader_memory")
    assert memory.slope_of([0, 50, 90, 100, 103, 106]) == pytest.approx(3.0)
