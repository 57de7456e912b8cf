"""The recurrent cells as steps of the PyTorch loop: forward and backward of one, in place, on views made once.

Letters: B batch, H hidden, G gates, S saved values per hidden unit, C steps in a chunk, N independent steps.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

Views = tuple[Tensor, ...]


class Step:
    """One cell. ``STEPS`` lists them; the loops below know no cell by name.

    Forward: ``product`` ``[C, B, G, H]`` holds the pre-activations, ``spare`` ``[C, B, H]`` is the cell's own.
    Backward: ``factors`` ``[C, B, G, H]`` turn the gradient that arrives at a step into the gradient of its
    recurrent gates; ``via`` and ``keep`` ``[C, B, H]`` are two more that a cell with c, or one that keeps h, may
    want. At a padded step the loop sets factors and via to 0 and keep to 1; at a reset, keep to 0.
    """

    gates: ClassVar[int]
    saved: ClassVar[int]
    has_c: ClassVar[bool] = False
    keeps_h: ClassVar[bool] = False  # h_prev enters h directly too, times keep
    splits: ClassVar[bool] = False  # the gradients of input gates and recurrent gates differ

    def inputs(self, x: Tensor, bias: Tensor | None) -> Iterator[Views]:
        """For each step of x ``[C, B, G*H]``: what the product is added to, then what else the step reads."""
        return zip(x.unbind(), strict=True)

    def views(self, product: Tensor, spare: Tensor) -> list[Views]:
        """For each step of the buffers, the views that ``forward`` works on."""
        raise NotImplementedError

    def forward(self, views: Views, input: Views, h: Tensor, c: Tensor, h_new: Tensor, c_new: Tensor) -> None:
        """One step, in place: from pre-activations to the new state."""
        raise NotImplementedError

    def save(self, product: Tensor, spare: Tensor, h: Tensor, gates: Tensor) -> None:
        """Store what the backward pass needs, into gates ``[C, B, S, H]``."""
        gates.copy_(product)

    def activate(self, x: Tensor, h: Tensor) -> Tensor:
        """The saved values ``[N, S, H]`` of independent steps, from input and recurrent gates ``[N, G, H]``."""
        raise NotImplementedError

    def derive(self, factors: Tensor, via: Tensor, keep: Tensor, gates: Tensor, h: Tensor, c: Views) -> None:
        """Fill the factors of a chunk from gates ``[C, B, S, H]``, the h read, and (c read, c written)."""
        raise NotImplementedError

    def backward_views(self, factors: Tensor, via: Tensor, keep: Tensor) -> list[Views]:
        """For each step of the buffers, the views that ``backward`` works on."""
        return [(f,) for f in factors.unbind()]

    def backward(self, views: Views, dh: Tensor, dc: Tensor) -> None:
        """One step: factors become gate gradients, in place, and dc that of the cell before. dh, dc ``[B, 1, H]``."""
        views[0].mul_(dh)

    def input_gradient(self, dgates: Tensor, via: Tensor, dh: Tensor, dx: Tensor) -> None:
        """Only if ``splits``: the gradient of the input gates ``[C, B, G, H]``, from that of h ``[C, B, H]``."""
        raise NotImplementedError


class RNN(Step):
    gates, saved = 1, 1

    def views(self, product: Tensor, spare: Tensor) -> list[Views]:
        return [(p,) for p in product[:, :, 0].unbind()]

    def save(self, product: Tensor, spare: Tensor, h: Tensor, gates: Tensor) -> None:
        gates.copy_(h.unsqueeze(2))


class TanhRNN(RNN):
    def forward(self, views: Views, input: Views, h: Tensor, c: Tensor, h_new: Tensor, c_new: Tensor) -> None:
        torch.tanh(views[0], out=h_new)

    def activate(self, x: Tensor, h: Tensor) -> Tensor:
        return (x + h).tanh_()

    def derive(self, factors: Tensor, via: Tensor, keep: Tensor, gates: Tensor, h: Tensor, c: Views) -> None:
        torch.mul(gates, gates, out=factors)
        factors.neg_().add_(1)


class ReluRNN(RNN):
    def forward(self, views: Views, input: Views, h: Tensor, c: Tensor, h_new: Tensor, c_new: Tensor) -> None:
        torch.clamp_min(views[0], 0, out=h_new)

    def activate(self, x: Tensor, h: Tensor) -> Tensor:
        return (x + h).relu_()

    def derive(self, factors: Tensor, via: Tensor, keep: Tensor, gates: Tensor, h: Tensor, c: Views) -> None:
        torch.gt(gates, 0, out=factors)


class LSTM(Step):
    """Saves i, f, g, o. Its keep is f, the way of the gradient from cell to cell; via: from h to c."""

    gates, saved, has_c = 4, 4, True

    def views(self, product: Tensor, spare: Tensor) -> list[Views]:
        i, f, g, o = (gate.unbind() for gate in product.unbind(2))
        return list(zip(product[:, :, :2].flatten(2).unbind(), i, f, g, o, spare.unbind(), strict=True))

    def forward(self, views: Views, input: Views, h: Tensor, c: Tensor, h_new: Tensor, c_new: Tensor) -> None:
        i_and_f, i, f, g, o, tanh_c = views
        i_and_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=c_new)
        c_new.addcmul_(i, g)
        torch.tanh(c_new, out=tanh_c)
        torch.mul(o, tanh_c, out=h_new)

    def activate(self, x: Tensor, h: Tensor) -> Tensor:
        gates = x + h
        gates[:, :2].sigmoid_()
        gates[:, 2].tanh_()
        gates[:, 3].sigmoid_()
        return gates

    def derive(self, factors: Tensor, via: Tensor, keep: Tensor, gates: Tensor, h: Tensor, c: Views) -> None:
        before, after = c
        i, f, g, o = gates.unbind(2)
        di, df, dg, do = factors.unbind(2)
        torch.sub(gates.new_ones(()), gates, out=factors)
        factors.mul_(gates)
        di.mul_(g)
        df.mul_(before)
        torch.mul(i, g, out=dg)
        torch.addcmul(i, dg, g, value=-1, out=dg)
        tanh_c = after.tanh()
        do.mul_(tanh_c)
        torch.mul(o, tanh_c, out=via)
        torch.addcmul(o, via, tanh_c, value=-1, out=via)
        keep.copy_(f)

    def backward_views(self, factors: Tensor, via: Tensor, keep: Tensor) -> list[Views]:
        parts = factors[:, :, :3], factors[:, :, 3:], via.unsqueeze(2), keep.unsqueeze(2)
        return list(zip(*(part.unbind() for part in parts), strict=True))

    def backward(self, views: Views, dh: Tensor, dc: Tensor) -> None:
        difg, do, via, keep = views
        dc.addcmul_(dh, via)
        difg.mul_(dc)
        do.mul_(dh)
        dc.mul_(keep)


class GRU(Step):
    """Saves r, z, n and the recurrent gate of n. Its keep is z; via: from h to the input gate of n."""

    gates, saved, keeps_h, splits = 3, 4, True, True

    def inputs(self, x: Tensor, bias: Tensor | None) -> Iterator[Views]:
        x_rz, x_n = x.tensor_split((x.shape[-1] // 3 * 2,), dim=-1)
        if bias is None:
            bias = x.new_zeros(x.shape[-1])
        return zip([bias] * len(x), x_rz.unbind(), x_n.unbind(), strict=True)

    def views(self, product: Tensor, spare: Tensor) -> list[Views]:
        r, z, h_n = (gate.unbind() for gate in product.unbind(2))
        r_and_z = product[:, :, :2].flatten(2).unbind()
        return list(zip(r_and_z, r, z, h_n, spare.unbind(), strict=True))

    def forward(self, views: Views, input: Views, h: Tensor, c: Tensor, h_new: Tensor, c_new: Tensor) -> None:
        r_and_z, r, z, h_n, n = views
        _, x_rz, x_n = input
        r_and_z.add_(x_rz).sigmoid_()
        torch.addcmul(x_n, r, h_n, out=n)
        n.tanh_()
        torch.lerp(n, h, z, out=h_new)

    def save(self, product: Tensor, spare: Tensor, h: Tensor, gates: Tensor) -> None:
        gates[:, :, :2].copy_(product[:, :, :2])
        gates[:, :, 2].copy_(spare)
        gates[:, :, 3].copy_(product[:, :, 2])

    def activate(self, x: Tensor, h: Tensor) -> Tensor:
        r_and_z = (x[:, :2] + h[:, :2]).sigmoid_()
        n = torch.addcmul(x[:, 2:], r_and_z[:, :1], h[:, 2:]).tanh_()
        return torch.cat((r_and_z, n, h[:, 2:]), dim=1)

    def derive(self, factors: Tensor, via: Tensor, keep: Tensor, gates: Tensor, h: Tensor, c: Views) -> None:
        r, z, n, h_n = gates.unbind(2)
        dr, dz, dn = factors.unbind(2)
        torch.sub(gates.new_ones(()), gates[:, :, :2], out=factors[:, :, :2])
        torch.mul(n, dz, out=via)
        torch.addcmul(dz, via, n, value=-1, out=via)  # (1 - z) (1 - n²)
        torch.mul(via, r, out=dn)
        dr.mul_(dn).mul_(h_n)
        dz.mul_(z).mul_(h - n)
        keep.copy_(z)

    def backward_views(self, factors: Tensor, via: Tensor, keep: Tensor) -> list[Views]:
        return list(zip(factors.unbind(), strict=True))

    def input_gradient(self, dgates: Tensor, via: Tensor, dh: Tensor, dx: Tensor) -> None:
        dx[:, :, :2].copy_(dgates[:, :, :2])
        dx[:, :, 2].copy_(via.mul_(dh))


STEPS: dict[str, Step] = {"rnn_tanh": TanhRNN(), "rnn_relu": ReluRNN(), "lstm": LSTM(), "gru": GRU()}
