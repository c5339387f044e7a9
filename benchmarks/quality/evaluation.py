"""Exact match without decoding, and what can be said of a score from so many items.

Greedy decoding answers a prompt with exactly the tokens y_1 … y_n, the end of the turn last, if and
only if for each t the most likely token after the prompt and y_1 … y_(t-1) is y_t: the first step that
says another token makes the answer wrong, and until then decoding has seen just these tokens. So one
forward pass over prompt and right answer tells whether greedy decoding gives it. What it does not
credit is the same text in other tokens than the tokenizer's, and bfloat16 may break a near tie
otherwise in a batch of another shape, as it may between any two servers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

from benchmarks.quality.model import Batch, Subject

TOKENS = 1 << 16
"""Of one forward pass, padding included; fewer on the CPU."""


@torch.no_grad()
def hits(subject: Subject, exam: Batch, gains: Sequence[float] = (1.0,)) -> torch.Tensor:
    """Return which answers come out exactly, for each gain of what is worn: bool [gains, rows]."""
    budget = TOKENS if subject.device.type == "cuda" else TOKENS // 16
    lengths = exam.lengths.cpu()
    order = lengths.argsort(descending=True, stable=True)
    of_row = order.repeat_interleave(len(gains))
    of_gain = torch.arange(len(gains)).repeat(len(order))
    scales = torch.tensor(gains, dtype=torch.float32)
    found = torch.zeros(len(gains), len(order), dtype=torch.bool)
    first = 0
    while first < len(of_row):
        longest = int(lengths[of_row[first]])
        chosen = slice(first, first + max(1, budget // longest))
        index = of_row[chosen].to(subject.device)
        said = subject.answers(exam.take(index, longest), scales[of_gain[chosen]])
        wrong = (said.logits.argmax(dim=-1) != said.wanted).float()
        misses = torch.zeros(len(index), device=subject.device).index_add_(0, said.row, wrong)
        found[of_gain[chosen], of_row[chosen]] = (misses == 0).cpu()
        first = chosen.stop
    return found


def packed(bits: torch.Tensor) -> str:
    """Return a row of bools as text, to be kept; `unpacked` undoes it."""
    return "".join("01"[bit] for bit in bits.int().tolist())


def unpacked(text: str) -> list[int]:
    """Return the bits as 0 and 1."""
    return [int(character) for character in text]


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share (Wilson, 1927): no shares below 0 or above 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
