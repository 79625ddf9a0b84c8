"""What all tests share: one thread, no network, a short hypothesis profile, the real data."""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "lazyclip",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lazyclip")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep text features of the tests out of the user's cache."""
    os.environ["LAZYCLIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _leave_logging_alone() -> Iterator[None]:
    """Take away handlers that a command adds: they write to a stream that ends with the test."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data; skip where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LAZYCLIP_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set LAZYCLIP_SHARED_DATA to the folder that holds it")
    return folder


@pytest.fixture
def load(monkeypatch):
    """Give a function that imports a script of benchmarks/ as running it would."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))

    def by_name(name: str):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return by_name
