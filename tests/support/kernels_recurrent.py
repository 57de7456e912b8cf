"""Layers and cells of random numbers, run by the reference and by the kernels, with every gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastseq.kernels.recurrent import cell as cell_kernels
from fastseq.kernels.recurrent import sequence as sequence_kernels
from fastseq.kernels.recurrent.steps import STEPS
from fastseq.reference import recurrent as reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# fp32 products are exact under the interpreter whatever it is told, and the tiles for TF32 are the larger family.
ALLOW_TF32 = not ON_GPU

Tensors = dict[str, Tensor]


@dataclass
class Layer:
    """The arguments of ``reference.layer`` and the gradients of its outputs."""

    cell: str
    tensors: dict[str, Tensor | None]
    reset: Tensor | None
    lengths: Tensor | None
    gradients: list[Tensor]


def layer(
    cell: str, T: int, B: int, H: int, dtype: torch.dtype, *, P: int | None = None, D: int = 1, masked: bool = False
) -> Layer:
    """A layer whose numbers follow from its sizes alone; ``masked`` gives it resets and lengths, 0 and T among them."""
    step, P, I = STEPS[cell], P or H, 5  # noqa: E741
    generator = torch.Generator().manual_seed(1000 * T + 100 * B + 10 * H + P)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return numbers.to(DEVICE, dtype)

    tensors: dict[str, Tensor | None] = {
        "input": draw(T, B, I),
        "w_ih": draw(D, step.gates * H, I, scale=0.4),
        "w_hh": draw(D, step.gates * H, P, scale=P**-0.5),
        "b_ih": draw(D, step.gates * H, scale=0.4),
        "b_hh": draw(D, step.gates * H, scale=0.4),
        "w_hr": draw(D, P, H, scale=H**-0.5) if P != H else None,
        "h0": draw(D, B, P, scale=0.5),
        "c0": draw(D, B, H, scale=0.5) if step.has_c else None,
    }
    if cell == "rnn_relu":  # far from the kink, where a rounding error would decide about a whole gradient
        tensors["b_ih"] = 4 * tensors["b_ih"].sign()
        tensors["w_hh"] = tensors["w_hh"] / 4
    reset = lengths = None
    if masked:
        reset = (torch.rand(T, B, generator=generator) < 0.3).to(DEVICE)
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[0], lengths[-1] = T, 0
        lengths = lengths.to(DEVICE)
    gradients = [draw(T, B, D * P), draw(D, B, P)]
    if step.has_c:
        gradients += [draw(D, B, H), draw(T, B, D * H)]
    return Layer(cell, tensors, reset, lengths, gradients)


def by_reference(layer: Layer, dtype: torch.dtype) -> Tensors:
    """Outputs and gradients, computed by the reference in this type."""
    leaves = {k: None if t is None else t.to(dtype).requires_grad_() for k, t in layer.tensors.items()}
    outputs = reference.layer(layer.cell, **leaves, reset=layer.reset, lengths=layer.lengths)
    named = {k: t for k, t in zip(("y", "h_n", "c_n", "cells"), outputs, strict=True) if t is not None}
    wanted = {k: t for k, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad(list(named.values()), list(wanted.values()), [g.to(dtype) for g in layer.gradients])
    return {k: t.detach() for k, t in named.items()} | dict(zip(wanted, gradients, strict=True))


@torch.no_grad()
def forward(layer: Layer, save: bool = True) -> tuple[Any, ...]:
    """The kernels' forward, and its input gates."""
    t = layer.tensors
    splits = STEPS[layer.cell].splits
    bias = t["b_ih"] if splits else t["b_ih"] + t["b_hh"]
    directions = range(t["w_ih"].shape[0])
    x = torch.stack([linear(t["input"], t["w_ih"][d], bias[d]) for d in directions], dim=2)
    b_hh = t["b_hh"] if splits else None
    out = sequence_kernels.sequence_forward(
        layer.cell, x, t["w_hh"], b_hh, t["w_hr"], t["h0"], t["c0"], layer.reset, layer.lengths,
        save=save, allow_tf32=ALLOW_TF32,
    )  # fmt: skip
    return *out, x


@torch.no_grad()
def by_kernels(layer: Layer) -> Tensors:
    """Outputs and gradients, computed by the kernels and the matrix products around them."""
    t, step = layer.tensors, STEPS[layer.cell]
    T, B, D = *t["input"].shape[:2], t["w_ih"].shape[0]
    y, h_n, c_n, cells, gates, _ = forward(layer)
    dtype = y.dtype
    got = {"y": y.reshape(T, B, -1), "h_n": h_n}
    dc_n = dcells = c_prev = None
    h_prev = states_read(layer, y, t["h0"])
    if step.has_c:
        got |= {"c_n": c_n, "cells": cells.reshape(T, B, -1).to(dtype)}
        dc_n, dcells = layer.gradients[2], layer.gradients[3].reshape(T, B, D, -1).float()
        c_prev = states_read(layer, cells, t["c0"].float())
    dx, dh, dproj, dh0, dc0 = sequence_kernels.sequence_backward(
        layer.cell, layer.gradients[0].reshape(T, B, D, -1), layer.gradients[1], dc_n, dcells, gates, cells,
        h_prev, c_prev, t["w_hh"], t["w_hr"], layer.reset, layer.lengths, allow_tf32=ALLOW_TF32,
    )  # fmt: skip
    assert (dh is dx) == (not step.splits)
    assert (dproj is None) == (t["w_hr"] is None)
    got |= {
        "input": torch.einsum("tbdg,dgi->tbi", dx, t["w_ih"]),
        "w_ih": torch.einsum("tbdg,tbi->dgi", dx, t["input"]),
        "w_hh": torch.einsum("tbdg,tbdp->dgp", dh, h_prev),
        "b_ih": dx.sum((0, 1)),
        "b_hh": dh.sum((0, 1)),
        "h0": dh0,
    }
    if step.has_c:
        got["c0"] = dc0
    if dproj is not None:
        unprojected = (gates[..., 3, :].float() * cells.tanh()).to(dtype)
        got["w_hr"] = torch.einsum("tbdp,tbdh->dph", dproj, unprojected)
    return got


def states_read(layer: Layer, states: Tensor, initial: Tensor) -> Tensor:
    """The state that each step read, from the states ``[T, B, D, ...]`` that the steps left."""
    T, _, D = states.shape[:3]
    read = torch.empty_like(states)
    for d in range(D):
        state = initial[d].to(states.dtype)
        for t in range(T) if d == 0 else reversed(range(T)):
            read[t, :, d] = state if layer.reset is None else state.masked_fill(layer.reset[t, :, None], 0)
            alive = True if layer.lengths is None else (t < layer.lengths)[:, None]
            state = states[t, :, d] if alive is True else torch.where(alive, states[t, :, d], state)
    return read


def cell_by_reference(cell: str, tensors: dict[str, Tensor | None], gradients: list[Tensor], dtype: Any) -> Tensors:
    leaves = {k: None if t is None else t.to(dtype).requires_grad_() for k, t in tensors.items()}
    outputs = [t for t in reference.single(cell, **leaves) if t is not None]
    wanted = {k: t for k, t in leaves.items() if t is not None}
    into = torch.autograd.grad(outputs, list(wanted.values()), [g.to(dtype) for g in gradients])
    named = {f"{k}_new": t.detach() for k, t in zip("hc", outputs, strict=False)}
    return named | dict(zip(wanted, into, strict=True))


@torch.no_grad()
def cell_by_kernels(cell: str, tensors: dict[str, Tensor | None], gradients: list[Tensor]) -> Tensors:
    t = tensors
    h, c, gates = cell_kernels.cell_forward(
        cell, t["input"], t["h"], t["c"], t["w_ih"], t["w_hh"], t["b_ih"], t["b_hh"],
        save=True, allow_tf32=ALLOW_TF32,
    )  # fmt: skip
    dc_new = gradients[1] if c is not None else None
    dx_gates, dh_gates, dx, dh, dc = cell_kernels.cell_backward(
        cell, gradients[0], dc_new, gates, t["h"], t["c"], c, t["w_ih"], t["w_hh"], allow_tf32=ALLOW_TF32
    )
    got = {"h_new": h, "c_new": c, "input": dx, "h": dh, "c": dc}
    got |= {"w_ih": dx_gates.T @ t["input"], "w_hh": dh_gates.T @ t["h"]}
    if t["b_ih"] is not None:
        got |= {"b_ih": dx_gates.sum(0), "b_hh": dh_gates.sum(0)}
    return {k: v for k, v in got.items() if v is not None}
