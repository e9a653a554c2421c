"""Fixtures of the tests of features."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def peers():
    """The module ``peer_files.py``: feature files laid out as CLAM, TRIDENT, STAMP and others write them."""
    spec = importlib.util.spec_from_file_location("peer_files", Path(__file__).with_name("peer_files.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
