"""Batches made ready while the model works on the one before."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from morphome.models.batch import Batch

#: Seconds that a batch takes to be made from which on the next one is made in a thread.
WORTH_A_THREAD = 0.002


def ahead(make: Callable[[int], Batch], wanted: Iterable[int]) -> Iterator[Batch]:
    """``make`` of each, the next one made in a thread while the last is used, so that no step waits for the disk.

    Small bags out of memory are made in place: handing them over would take longer.
    """
    items = iter(wanted)
    for item in items:
        start = clock.perf_counter()
        made = make(item)
        if clock.perf_counter() - start > WORTH_A_THREAD:
            break
        yield made
    else:
        return
    # Denormal numbers as in the thread of the training, so that it does not matter who makes a batch.
    with ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(True,)) as pool:
        for item in items:
            coming = pool.submit(make, item)
            yield made
            made = coming.result()
        yield made
