"""What autocast asks of an operator that is not one of PyTorch's own."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocasting(device: str) -> bool:
    """Whether autocast is on. Not every device type knows it: the meta device does not."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def plainly(device: str) -> AbstractContextManager[Any]:
    """What is left in its own dtype under autocast is computed in it."""
    return torch.autocast(device, enabled=False) if autocasting(device) else nullcontext()
