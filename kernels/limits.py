"""What of a device decides which tiles a kernel gets."""

import functools
from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """What of a device decides: the compiler behind it, and how much room there is."""

    backend: str  # "cuda" or "hip"
    shared: int  # bytes of shared memory that one program may have
    sms: int  # multiprocessors: so many large programs are resident at a time, and no more


LIMITS = {
    "sm_80": Limits("cuda", 166_912, 108),
    "sm_90": Limits("cuda", 232_448, 132),
    "sm_100": Limits("cuda", 232_448, 148),
    "gfx942": Limits("hip", 65_536, 304),
}


@functools.cache
def limits(device: torch.device) -> Limits:
    """The limits of a device; under the interpreter those of a Hopper GPU on which programs run one at a time."""
    if device.type == "cpu":
        return LIMITS["sm_90"]._replace(sms=1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Limits("hip", properties.shared_memory_per_block, properties.multi_processor_count)
    return Limits("cuda", properties.shared_memory_per_block_optin, properties.multi_processor_count)
