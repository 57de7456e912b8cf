"""Which persistent kernels the offline tables show: a few sizes as they are planned, and each kind of cell."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from fastseq.kernels.limits import Limits
from fastseq.kernels.recurrent.persistent import configurations_for
from fastseq.kernels.recurrent.plan import plan

STOCK = list(itertools.product(("lstm", "gru"), (torch.bfloat16, torch.float32)))
# cell, type, hidden size, rows of the batch, with every option (and in both directions)
SIZES = [
    *((cell, dtype, H, 16, False) for (cell, dtype), H in itertools.product(STOCK, (256, 700, 1024))),
    *((cell, torch.bfloat16, 512, 64, False) for cell in ("lstm", "gru")),
    *((cell, dtype, 512, 16, True) for cell, dtype in STOCK),
    *(("rnn_tanh", dtype, H, 16, False) for dtype, H in ((torch.bfloat16, 1024), (torch.float32, 512))),
    *((cell, torch.bfloat16, 512, 16, True) for cell in ("peephole_lstm", "slstm", "mgu")),
]


def configurations(limits: Limits) -> Iterator[dict[str, Any]]:
    """Forward and backward of each of ``SIZES`` that a device of these limits runs in a grid."""
    for cell, dtype, H, B, everything in SIZES:
        how = plan(cell, H, H, dtype, True, limits, B, 2 if everything else 1)
        if how.regime == "persistent":
            yield from configurations_for(cell, H, dtype, True, how, everything)
