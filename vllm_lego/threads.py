"""How threads share a core and Python's lock with vLLM's."""

from __future__ import annotations

import logging
import os
import sys
import threading

import torch

logger = logging.getLogger("vllm.lego")  # below vLLM's own logger, to share its handlers

_NICENESS = 10
_LOCK_INTERVAL_S = 0.0005


def hand_over_soon() -> None:
    """Let no thread of this process keep Python's lock for long from one that waits for it.

    At Python's 5 ms the engine's loop, which asks for the lock several times a step, waits longer for a
    thread that merges than for the model, and a request waits so long for each thread that it asks.
    """
    sys.setswitchinterval(min(_LOCK_INTERVAL_S, sys.getswitchinterval()))


def yield_to_the_engine() -> None:
    """Give a thread that merges or reads a lower scheduling priority than the engine's threads.

    And no helpers: PyTorch would give each such thread one for every core, to copy an adapter or look
    for NaN in it, which keep the cores busy while they wait for the next such work.
    """
    # For this thread, and for those that compute their first tensor later. vLLM's have done so by now, or
    # share the cores with the engine as ours do.
    torch.set_num_threads(1)
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    except OSError as error:  # a container may forbid it; then the kernel shares fairly
        logger.info("a staging thread keeps its priority: %s", error)
