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
    scale: Tensor | None = None
    stay: Tensor | None = None


def layer(
    cell: str, T: int, B: int, H: int, dtype: torch.dtype,
    *, P: int | None = None, D: int = 1, masked: bool = False, scaled: bool = False, stay: str = "",
) -> Layer:  # fmt: skip
    """A layer whose numbers follow from its sizes alone.

    ``masked`` gives it resets and lengths, 0 and T among them; ``scaled`` variational dropout; ``stay`` zoneout, by
    "masks" or by their "mean".
    """
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
        "c0": draw(D, B, step.cells * H, scale=0.5) if step.cells else None,
        "params": 1 + draw(D, step.params, H, scale=0.3) if step.params else None,
    }
    if cell == "slstm":  # whose n is a sum of what is positive
        tensors["c0"][..., H : 2 * H].abs_().add_(0.5)
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
    if step.cells:
        gradients += [draw(D, B, step.cells * H), draw(T, B, D * step.cells * H)]
    whole = Layer(cell, tensors, reset, lengths, gradients)
    N = 1 + step.cells
    if scaled:
        whole.scale = ((torch.rand(D, B, P, generator=generator) < 0.7) * 1.25).to(DEVICE, dtype)
    if stay == "masks":
        whole.stay = (torch.rand(T, B, D, N, H, generator=generator) < 0.3).to(DEVICE)
    elif stay == "mean":
        whole.stay = torch.linspace(0.1, 0.4, N, device=DEVICE)
    return whole


def by_reference(layer: Layer, dtype: torch.dtype) -> Tensors:
    """Outputs and gradients, computed by the reference in this type."""
    leaves = {k: None if t is None else t.to(dtype).requires_grad_() for k, t in layer.tensors.items()}
    scale = None if layer.scale is None else layer.scale.to(dtype)
    outputs = reference.layer(
        layer.cell, **leaves, scale=scale, stay=layer.stay, reset=layer.reset, lengths=layer.lengths
    )
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
        layer.cell, x, t["w_hh"], b_hh, t["w_hr"], t["h0"], t["c0"], t["params"], layer.scale, layer.stay,
        layer.reset, layer.lengths, save=save, allow_tf32=ALLOW_TF32,
    )  # fmt: skip
    return *out, x


@torch.no_grad()
def by_kernels(layer: Layer) -> Tensors:
    """Outputs and gradients, computed by the kernels and the matrix products around them."""
    t, step = layer.tensors, STEPS[layer.cell]
    T, B, D = *t["input"].shape[:2], t["w_ih"].shape[0]
    y, h_n, c_n, cells, gates, x = forward(layer, save=layer.stay is None)
    dtype = y.dtype
    got = {"y": y.reshape(T, B, -1), "h_n": h_n}
    dc_n = dcells = c_prev = None
    h_prev = states_read(layer, y, t["h0"])
    if step.cells:
        got |= {"c_n": c_n, "cells": cells.reshape(T, B, -1).to(dtype)}
        dc_n, dcells = layer.gradients[2], layer.gradients[3].reshape(T, B, D, -1).float()
        c_prev = states_read(layer, cells, t["c0"].float())
    after = cells
    if layer.stay is not None:  # what a step left is not what the next one reads
        gates, after = gates_again(layer, x, h_prev, c_prev)
    dx, dh, dproj, dh0, dc0, dparams = sequence_kernels.sequence_backward(
        layer.cell, layer.gradients[0].reshape(T, B, D, -1), layer.gradients[1], dc_n, dcells, gates, after,
        h_prev, c_prev, t["w_hh"], t["w_hr"], t["params"], layer.scale, layer.stay, layer.reset, layer.lengths,
        allow_tf32=ALLOW_TF32,
    )  # fmt: skip
    assert (dh is dx) == (not step.splits)
    assert (dproj is None) == (t["w_hr"] is None)
    operand = h_prev if layer.scale is None else h_prev * layer.scale.transpose(0, 1)
    got |= {
        "input": torch.einsum("tbdg,dgi->tbi", dx, t["w_ih"]),
        "w_ih": torch.einsum("tbdg,tbi->dgi", dx, t["input"]),
        "w_hh": torch.einsum("tbdg,tbdp->dgp", dh, operand),
        "b_ih": dx.sum((0, 1)),
        "b_hh": dh.sum((0, 1)),
        "h0": dh0,
    }
    if step.cells:
        got["c0"] = dc0
    if dparams is not None:
        got["params"] = dparams
    if dproj is not None:
        unprojected = (gates[..., 3, :].float() * cells.tanh()).to(dtype)
        got["w_hr"] = torch.einsum("tbdp,tbdh->dph", dproj, unprojected)
    return got


def gates_again(layer: Layer, x: Tensor, h_prev: Tensor, c_prev: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The saved gates and the cells that each step left, from the states it read."""
    t, (T, B) = layer.tensors, h_prev.shape[:2]
    operand = h_prev if layer.scale is None else h_prev * layer.scale.transpose(0, 1)
    h = torch.einsum("tbdp,dgp->tbdg", operand, t["w_hh"]).contiguous()
    if STEPS[layer.cell].splits:
        h = h + t["b_hh"].unsqueeze(0)
    before = None if c_prev is None else c_prev.flatten(0, 1)
    gates, after = sequence_kernels.step_gates(
        layer.cell, x.flatten(0, 1), h.flatten(0, 1), before, t["params"], h_prev.flatten(0, 1)
    )
    return gates.unflatten(0, (T, B)), None if after is None else after.unflatten(0, (T, B))


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
