"""Buffers that nobody has written to yet."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Every ``torch.empty``, ours and torch's own, starts as NaN: what nobody wrote cannot pass for a zero."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
