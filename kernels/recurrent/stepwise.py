"""A sequence step by step: for every step a library matrix product and one fused pointwise kernel.

For the sizes whose recurrent weight does not fit in one program, and for projections. The loop over time is the
host's: it allocates before the first step, asks the device nothing and takes no decision that depends on data,
so a CUDA graph can hold it.
"""

import torch
import triton
from torch import Tensor

from ..jit import OPTIONS
from .pointwise import (
    constants,
    grid,
    project_backward_kernel,
    project_forward_kernel,
    projection_constants,
    step_backward_kernel,
    step_forward_kernel,
    tile,
)
from .steps import STEPS


def starting_resets(reset: Tensor | None, lengths: Tensor | None, T: int, D: int) -> Tensor | None:
    """Where the first step of each direction starts from zeros: ``[D, B, 1]``."""
    if reset is None:
        return None
    first = torch.stack((reset[0], reset[T - 1])[:D])
    if lengths is not None:
        first = first & torch.stack((lengths > 0, lengths > T - 1)[:D])
    return first.unsqueeze(-1)


def stepwise_forward(
    cell: str, x: Tensor, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None, h0: Tensor, c0: Tensor | None,
    params: Tensor | None, scale: Tensor | None, stay: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``sequence_forward``, step by step."""
    step = STEPS[cell]
    T, B, D, _ = x.shape
    H, P = x.shape[3] // step.gates, w_hh.shape[2]
    like = {"dtype": x.dtype, "device": x.device}
    y = torch.empty(T, B, D, P, **like)
    cells = torch.empty(T, B, D, step.cells * H, dtype=torch.float32, device=x.device) if step.cells else None
    gates = torch.empty(T, B, D, step.saved, H, **like) if save else None
    product = torch.empty(D, B, step.gates * H, **like)
    hidden = torch.empty(D, B, H, **like) if w_hr is not None else None  # what a projection reads
    projected = torch.empty(D, B, P, **like) if w_hr is not None else None

    first = starting_resets(reset, lengths, T, D)
    h, c = (s if s is None or first is None else s.masked_fill(first, 0) for s in (h0, c0))
    exact = step.reads_h or scale is not None or stay is not None
    h_exact = h.to(torch.float32, copy=True) if exact else None
    h = h.clone() if scale is None else h * scale
    c = None if c is None else c.to(torch.float32, copy=True)

    for s in range(T):
        torch.bmm(h, w_hh.transpose(1, 2), out=product)
        step_forward_kernel[grid(B, D, H, step.whole)](
            x_ptr=x, product_ptr=product, bias_ptr=b_hh, params_ptr=params, scale_ptr=scale, stay_ptr=stay,
            h_ptr=h if hidden is None else hidden, h_exact_ptr=h_exact, c_ptr=c, reset_ptr=reset,
            lengths_ptr=lengths, y_ptr=y if hidden is None else None, cells_ptr=cells, gates_ptr=gates,
            s=s, T=T, B=B,
            **constants(step, step.forward, D, H), ONLY_GATES=False, num_warps=tile(H, step.whole)[2], **OPTIONS,
        )  # fmt: skip
        if w_hr is not None:
            torch.bmm(hidden, w_hr.transpose(1, 2), out=projected)
            project_forward_kernel[grid(B, D, P)](
                projected_ptr=projected, reset_ptr=reset, lengths_ptr=lengths, h_ptr=h, y_ptr=y, s=s, T=T, B=B,
                **projection_constants(D, P), **OPTIONS,
            )  # fmt: skip
    h_n = h if scale is None else h_exact.to(x.dtype)
    return y, h_n, None if c is None else c.to(x.dtype), cells, gates


def stepwise_backward(
    cell: str, dy: Tensor, dh_n: Tensor, dc_n: Tensor | None, dcells: Tensor | None, gates: Tensor,
    after: Tensor | None, h_prev: Tensor, c_prev: Tensor | None, w_hh: Tensor, w_hr: Tensor | None,
    params: Tensor | None, scale: Tensor | None, stay: Tensor | None, reset: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``sequence_backward``, step by step."""
    step = STEPS[cell]
    T, B, D, P = dy.shape
    H = gates.shape[4]
    like = {"dtype": dy.dtype, "device": dy.device}
    dx = torch.empty(T, B, D, step.gates * H, **like)
    dh = torch.empty_like(dx) if step.splits else None
    dproj = torch.empty_like(dy) if w_hr is not None else None
    operand = torch.empty(D, B, step.gates * H, **like)
    product = torch.zeros_like(dh_n)
    direct = dh_n.to(torch.float32, copy=True)
    dc = None if dc_n is None else dc_n.to(torch.float32, copy=True)
    dprojected = torch.empty_like(dh_n) if w_hr is not None else None
    dhidden = torch.empty(D, B, H, **like) if w_hr is not None else product
    dparams = None
    if params is not None:
        blocks = triton.cdiv(B, tile(H, step.whole)[0])
        dparams = torch.zeros(blocks, *params.shape, dtype=torch.float32, device=dy.device)

    for s in reversed(range(T)):
        if w_hr is not None:
            project_backward_kernel[grid(B, D, P)](
                dy_ptr=dy, product_ptr=product, direct_ptr=direct, lengths_ptr=lengths,
                dprojected_ptr=dprojected, dproj_ptr=dproj, s=s, T=T, B=B,
                **projection_constants(D, P), **OPTIONS,
            )  # fmt: skip
            torch.bmm(dprojected, w_hr, out=dhidden)
        step_backward_kernel[grid(B, D, H, step.whole)](
            dy_ptr=None if w_hr is not None else dy, product_ptr=dhidden,
            direct_ptr=None if w_hr is not None else direct, dc_ptr=dc, dcells_ptr=dcells,
            gates_ptr=gates, cells_ptr=after, h_prev_ptr=h_prev if step.reads_h else None, c_prev_ptr=c_prev,
            params_ptr=params, scale_ptr=scale, stay_ptr=stay, reset_ptr=reset, lengths_ptr=lengths,
            operand_ptr=operand, dx_ptr=dx, dh_ptr=dh, dparams_ptr=dparams, s=s, T=T, B=B,
            **constants(step, step.backward, D, H), num_warps=tile(H, step.whole)[2], **OPTIONS,
        )  # fmt: skip
        torch.bmm(operand, w_hh, out=product)
    through = product if scale is None else product.float() * scale
    dh0 = (direct + through).to(dy.dtype)
    dc0 = None if dc is None else dc.to(dy.dtype)
    if dparams is not None:
        dparams = dparams.sum(0).to(params.dtype)
    return dx, dx if dh is None else dh, dproj, dh0, dc0, dparams
