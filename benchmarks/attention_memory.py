"""Peak memory of attention on a CPU, each case in a fresh process: ``python benchmarks/attention_memory.py``.

A figure is how far the process's peak rises above what it held with its inputs in place, forward and backward. The
peer of every case is plain causal attention by ``torch.nn.functional.scaled_dot_product_attention``.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import stopwatch
from fastseq.ops import blockwise
from fastseq.ops.attention import TENSORS

PEER = "torch: causal"
CASES = (
    PEER, "fastseq: causal", "fastseq: causal and padding", "torch: causal and padding, one mask",
    "fastseq: window of 256", "fastseq: causal, dropout", "fastseq: causal, softcap", "fastseq: bias of keys, learned",
    "fastseq: ALiBi", "fastseq: T5, learned", "fastseq: Transformer-XL", "fastseq: XLNet, segments and order",
)  # fmt: skip


def attend(
    x: list[Tensor], dout: Tensor, learned: str = "", terms: dict[str, Tensor] | None = None, **chosen: Any
) -> None:
    """Forward and backward as the operator calls them; of bias and distance, ``learned`` gets a gradient."""
    options = {
        "scale": 1 / math.sqrt(x[0].shape[3]), "left": -1, "right": -1, "lower_right": False, "softcap": 0.0,
        "dropout_p": 0.0, "max_q": 0, "max_k": 0, "weights": "", "allow_tf32": False, "distance_zero": 0,
        "position_zero": 0,
    } | chosen  # fmt: skip
    named = dict(zip(("query", "key", "value"), x, strict=True)) | (terms or {}) | {"seed": torch.tensor([1])}
    given = [named.get(name) for name in TENSORS]
    with torch.no_grad():
        out, lse, _ = blockwise.attention_forward(*given, **options)
        gradients = {f"{name}_gradient": name == learned for name in ("bias", "distance")}
        blockwise.attention_backward(dout, None, None, *given, out, lse, **options, **gradients)


def by_torch(x: list[Tensor], dout: Tensor, make_mask: Callable[[], Tensor] | None = None) -> None:
    leaves = [t.requires_grad_() for t in x]
    mask = None if make_mask is None else make_mask()
    F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=mask is None).backward(dout)


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(case: str, length: int, heads: int, width: int) -> int:
    """KiB that a case needs beyond its inputs."""
    few = [torch.randn(1, 2, 256, width) for _ in range(4)]  # what a first call sets up is not the case's
    by_torch(few[:3], few[3])
    attend([t.detach() for t in few[:3]], few[3], right=0, softcap=5.0)
    *x, dout = (torch.randn(1, length, heads, width).transpose(1, 2) for _ in range(4))
    padding = (torch.arange(length) < length - length // 8)[None, None, None]
    bias = torch.randn(1, heads, 1, length)
    alibi, t5 = (torch.randn(1, heads, entries) for entries in (length, 257))
    positions = {"position_query": torch.randn_like(dout), "position_key": torch.randn(1, heads, length, width)}
    both = torch.arange(length, dtype=torch.int32)[None]
    segments = {"segment": torch.randn(1, heads, length, 2), "segment_q": both // 700, "segment_k": both // 700}
    ranks = {"rank_q": both[None], "rank_k": both}
    before = peak_kib()
    calls: dict[str, Callable[[], None]] = {
        "torch: causal": lambda: by_torch(x, dout),
        "torch: causal and padding, one mask": lambda: by_torch(
            x, dout, lambda: padding & torch.ones(length, length, dtype=torch.bool).tril()
        ),
        "fastseq: causal": lambda: attend(x, dout, right=0),
        "fastseq: causal and padding": lambda: attend(x, dout, terms={"mask": padding}, right=0),
        "fastseq: window of 256": lambda: attend(x, dout, left=256, right=0),
        "fastseq: causal, dropout": lambda: attend(x, dout, right=0, dropout_p=0.1),
        "fastseq: causal, softcap": lambda: attend(x, dout, right=0, softcap=30.0),
        "fastseq: bias of keys, learned": lambda: attend(x, dout, "bias", {"bias": bias}, right=0),
        "fastseq: ALiBi": lambda: attend(x, dout, terms={"distance": alibi}, distance_zero=length - 1, right=0),
        "fastseq: T5, learned": lambda: attend(x, dout, "distance", {"distance": t5}, distance_zero=128),
        "fastseq: Transformer-XL": lambda: attend(x, dout, terms=positions, position_zero=length - 1, right=0),
        "fastseq: XLNet, segments and order": lambda: attend(
            x, dout, terms=positions | segments | ranks, position_zero=length - 1
        ),
    }
    calls[case]()
    return peak_kib() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default: its own)")
    parser.add_argument("--output", metavar="FOLDER", help="of the JSON; default benchmarks/results/<device>")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # what the fresh process is to run
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("length", "heads", "width")}
    if options.case:
        print(run(options.case, **sizes))
        return
    rows: list[dict[str, Any]] = []
    same = [f"--{name}={value}" for name, value in (sizes | {"threads": options.threads}).items()]
    print(f"{'case, length ' + str(options.length):<40}{'peak MiB':>10}  beside {PEER}")
    for case in CASES:
        command = [sys.executable, __file__, *same, "--case", case]
        kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(
            {"case": case, "peak_mib": kib / 1024, "ratio": kib / (1024 * rows[0]["peak_mib"]) if rows else 1.0}
        )
        print(f"{case:<40}{kib / 1024:>10.1f}  {rows[-1]['ratio']:.2f}", flush=True)
    provenance = stopwatch.provenance("cpu") | {"threads": options.threads}
    results = Path(__file__).parent / "results" / measure.slug(str(provenance["device"]))
    folder = Path(options.output or results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"attention-memory-{options.length}.json"
    what = "peak memory of attention, forward and backward, beyond its inputs"
    path.write_text(json.dumps({"what": what, "provenance": provenance, "sizes": sizes, "rows": rows}, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
