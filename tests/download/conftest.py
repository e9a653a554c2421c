"""The stand-in of the GDC, loaded by its path, as test folders are no packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def gdc() -> ModuleType:
    """The module ``gdc_server.py``: the server and the builders of its records."""
    spec = importlib.util.spec_from_file_location("gdc_server", Path(__file__).with_name("gdc_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
