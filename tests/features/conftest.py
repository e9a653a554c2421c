"""The maker of small slides, shared with the tests of slides."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def synthetic():
    """The module ``synthetic``: paints and writes small slides, holds small settings."""
    spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).parents[1] / "slides" / "synthetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def painted(synthetic):
    """One painted image, uint8 (760, 1000, 3)."""
    return synthetic.paint()
