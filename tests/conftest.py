"""Fixtures that every room's tests share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

# Before numpy or torch start their thread pools: several test processes on few cores slow one another down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first (they start Snakemake), so that the processes end together."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


@pytest.fixture(scope="session")
def loaded_by() -> Callable[..., set[str]]:
    """Names of all modules that a fresh interpreter has loaded after importing the modules given."""

    def loaded(*modules: str) -> set[str]:
        code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    return loaded


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real public data that may stand beside the checkout; the test is skipped without it."""
    folder = Path(os.environ.get("MORPHOME_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").exists():
        pytest.skip(f"real data not present ({folder})")
    return folder


@pytest.fixture(scope="session")
def synthetic():
    """The module ``tests/slides/synthetic.py``: paints and writes small slides, holds small settings."""
    spec = importlib.util.spec_from_file_location("synthetic", ROOT / "tests" / "slides" / "synthetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def painted(synthetic):
    """One painted image, uint8 (760, 1000, 3)."""
    return synthetic.paint()


@pytest.fixture(scope="session")
def timm():
    """The module timm, imported after what its import needs beside a torch without CUDA."""
    from morphome.vision import ensure_torchvision

    ensure_torchvision()
    import timm

    return timm
