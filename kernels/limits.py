"""What of a device decides which tiles a kernel gets."""

import functools
from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """What of a device decides: the compiler behind it, and the shared memory one program may have, in bytes."""

    backend: str  # "cuda" or "hip"
    shared: int


LIMITS = {
    "sm_80": Limits("cuda", 166_912),
    "sm_90": Limits("cuda", 232_448),
    "sm_100": Limits("cuda", 232_448),
    "gfx942": Limits("hip", 65_536),
}


@functools.cache
def limits(device: torch.device) -> Limits:
    """The limits of a device; under the interpreter, which has none, those of a Hopper GPU."""
    if device.type == "cpu":
        return LIMITS["sm_90"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Limits("hip", properties.shared_memory_per_block)
    return Limits("cuda", properties.shared_memory_per_block_optin)
