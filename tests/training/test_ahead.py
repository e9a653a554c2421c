"""Batches made ahead, in place or in a thread."""

from __future__ import annotations

import math
import threading
import time

import pytest

import morphome.training.ahead as ahead_module
from morphome.training.ahead import ahead


@pytest.mark.parametrize("worth", [0.0, math.inf])
def test_batches_come_in_order_whoever_makes_them(worth, monkeypatch):
    monkeypatch.setattr(ahead_module, "WORTH_A_THREAD", worth)
    makers = []

    def make(k):
        makers.append(threading.current_thread() is threading.main_thread())
        if k == 7:
            raise ValueError("broken")
        return k

    for n in (0, 1, 2, 5):
        assert list(ahead(make, range(n))) == list(range(n))
    assert all(makers) == (worth > 0)
    found = []
    with pytest.raises(ValueError, match="broken"):
        for k in ahead(make, range(9)):
            found.append(k)
    assert found == list(range(7))
    before = threading.active_count()
    for k in ahead(make, range(6)):
        if k == 3:
            break
    assert threading.active_count() == before


def test_slow_batches_are_made_while_the_last_is_used(monkeypatch):
    monkeypatch.setattr(ahead_module, "WORTH_A_THREAD", 0.01)
    start = time.perf_counter()
    for _ in ahead(lambda k: time.sleep(0.03), range(10)):
        time.sleep(0.03)
    assert time.perf_counter() - start < 0.5  # 0.6 one after the other
