"""Fixtures of the tests of slides."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def jpeg_tiff():
    """The module ``tests/slides/jpeg_tiff.py``: writes small tiled JPEG TIFF files of every kind."""
    path = Path(__file__).with_name("jpeg_tiff.py")
    spec = importlib.util.spec_from_file_location("jpeg_tiff", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
