"""Results that do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU, let the calling thread compute alone while the context is open.

    A matrix product shared between threads may sum in another order for another number of them.
    Nor do a merge's many small products gain from threads, which wait for each other longer than
    they work. Other threads that compute meanwhile keep theirs.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
