"""The recurrent cells as steps of a kernel: forward and backward of one step, pure arithmetic on tiles.

A step knows nothing of pointers, masks or time; the loops in ``sequence.py``, ``pointwise.py`` and ``cell.py``
know no cell by name and take the step as a compile-time argument. Tuples of fp32 tiles pass between the two:

``forward(x, h, state) -> saved, state``
    x, h    the G input gates and the G recurrent gates, biases included
    state   (h,) or (h, c): what the step before left
    saved   the S values that backward needs, in the order in which they are stored

``backward(saved, kept, dstate) -> dx, dh, dstate``
    kept    what backward needs beside ``saved``: (h before the step,) if ``reads_h``, (c before, c after) if ``has_c``
    dstate  gradient of the state after the step; returned: of the state before it, without what flows back
            through the recurrent product
    dx, dh  gradients of the G input gates and of the G recurrent gates (one and the same unless ``splits``)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..jit import sigmoid, tanh


@triton.jit
def rnn_tanh_forward(x, h, state):
    y = tanh(x[0] + h[0])
    return (y,), (y,)


@triton.jit
def rnn_tanh_backward(saved, kept, dstate):
    dgate = (dstate[0] * (1.0 - saved[0] * saved[0]),)
    return dgate, dgate, (tl.zeros_like(dstate[0]),)


@triton.jit
def rnn_relu_forward(x, h, state):
    y = x[0] + h[0]
    y = tl.where(y < 0.0, 0.0, y)  # not maximum(): a NaN stays one
    return (y,), (y,)


@triton.jit
def rnn_relu_backward(saved, kept, dstate):
    dgate = (tl.where(saved[0] > 0.0, dstate[0], 0.0),)
    return dgate, dgate, (tl.zeros_like(dstate[0]),)


@triton.jit
def lstm_forward(x, h, state):
    i = sigmoid(x[0] + h[0])
    f = sigmoid(x[1] + h[1])
    g = tanh(x[2] + h[2])
    o = sigmoid(x[3] + h[3])
    c = f * state[1] + i * g
    return (i, f, g, o), (o * tanh(c), c)


@triton.jit
def lstm_backward(saved, kept, dstate):
    i, f, g, o = saved[0], saved[1], saved[2], saved[3]
    tanh_c = tanh(kept[1])
    dc = dstate[1] + dstate[0] * o * (1.0 - tanh_c * tanh_c)
    di = dc * g * i * (1.0 - i)
    df = dc * kept[0] * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dstate[0] * tanh_c * o * (1.0 - o)
    dgates = (di, df, dg, do)
    return dgates, dgates, (tl.zeros_like(dc), dc * f)


@triton.jit
def gru_forward(x, h, state):
    r = sigmoid(x[0] + h[0])
    z = sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    return (r, z, n, h[2]), ((1.0 - z) * n + z * state[0],)


@triton.jit
def gru_backward(saved, kept, dstate):
    r, z, n, h_n = saved[0], saved[1], saved[2], saved[3]
    dy = dstate[0]
    dn = dy * (1.0 - z) * (1.0 - n * n)
    dr = dn * h_n * r * (1.0 - r)
    dz = dy * (kept[0] - n) * z * (1.0 - z)
    return (dr, dz, dn), (dr, dz, dn * r), (dy * z,)


class Step(NamedTuple):
    """A cell as the kernels know it."""

    gates: int  # G, gate pre-activations per hidden unit
    saved: int  # S, values kept for backward per hidden unit
    has_c: bool  # carries a second state, c
    reads_h: bool  # reads h elsewhere than in the recurrent product
    splits: bool  # the recurrent gates' gradients differ from the input gates'
    forward: triton.JITFunction
    backward: triton.JITFunction


STEPS = {
    "rnn_tanh": Step(1, 1, False, False, False, rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": Step(1, 1, False, False, False, rnn_relu_forward, rnn_relu_backward),
    "lstm": Step(4, 4, True, False, False, lstm_forward, lstm_backward),
    "gru": Step(3, 4, False, True, True, gru_forward, gru_backward),
}
