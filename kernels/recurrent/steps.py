"""The recurrent cells as steps of a kernel: forward and backward of one step, pure arithmetic on tiles.

A step knows nothing of pointers, masks or time; the loops know no cell by name and take the step as a compile-time
argument. Tuples of fp32 tiles ``[BLOCK_H, BLOCK_B]`` pass between the two, hidden units along the first axis:

``forward(x, h, state, params, H) -> saved, state``
    x, h    the G input gates and the G recurrent gates, biases included
    state   (h, *cells): what the step before left, h and C cells
    params  the step's own K parameters, ``[BLOCK_H, 1]``
    H       hidden units of the layer, compile-time; a tile may be padded beyond
    saved   the S values that backward needs, in the order in which they are stored

``backward(saved, kept, dstate, params, H) -> dx, dh, dstate, dparams``
    kept    what backward needs beside ``saved``: (h as read,) if ``reads_h``, the C cells as read, the C cells as left
    dstate  gradient of the state after the step; returned: of the state before it, without what flows back
            through the recurrent product
    dx, dh  gradients of the G input gates and of the G recurrent gates (one and the same unless ``splits``)
    dparams gradients of the parameters, K tiles ``[BLOCK_H, BLOCK_B]``: the loop adds them up

In padded units everything a step reads is 0, and what it makes of that must be finite; a step that reduces over
units (``whole``) leaves them out by ``tl.arange(0, x[0].shape[0])[:, None] < H``.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..jit import sigmoid, tanh


@triton.jit
def rnn_tanh_forward(x, h, state, params, H: tl.constexpr):
    y = tanh(x[0] + h[0])
    return (y,), (y,)


@triton.jit
def rnn_tanh_backward(saved, kept, dstate, params, H: tl.constexpr):
    dgate = (dstate[0] * (1.0 - saved[0] * saved[0]),)
    return dgate, dgate, (tl.zeros_like(dstate[0]),), ()


@triton.jit
def rnn_relu_forward(x, h, state, params, H: tl.constexpr):
    y = x[0] + h[0]
    y = tl.where(y < 0.0, 0.0, y)  # not maximum(): a NaN stays one
    return (y,), (y,)


@triton.jit
def rnn_relu_backward(saved, kept, dstate, params, H: tl.constexpr):
    dgate = (tl.where(saved[0] > 0.0, dstate[0], 0.0),)
    return dgate, dgate, (tl.zeros_like(dstate[0]),), ()


@triton.jit
def lstm_forward(x, h, state, params, H: tl.constexpr):
    i = sigmoid(x[0] + h[0])
    f = sigmoid(x[1] + h[1])
    g = tanh(x[2] + h[2])
    o = sigmoid(x[3] + h[3])
    c = f * state[1] + i * g
    return (i, f, g, o), (o * tanh(c), c)


@triton.jit
def lstm_backward(saved, kept, dstate, params, H: tl.constexpr):
    i, f, g, o = saved[0], saved[1], saved[2], saved[3]
    tanh_c = tanh(kept[1])
    dc = dstate[1] + dstate[0] * o * (1.0 - tanh_c * tanh_c)
    di = dc * g * i * (1.0 - i)
    df = dc * kept[0] * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dstate[0] * tanh_c * o * (1.0 - o)
    dgates = (di, df, dg, do)
    return dgates, dgates, (tl.zeros_like(dc), dc * f), ()


@triton.jit
def gru_forward(x, h, state, params, H: tl.constexpr):
    r = sigmoid(x[0] + h[0])
    z = sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    return (r, z, n, h[2]), ((1.0 - z) * n + z * state[0],)


@triton.jit
def gru_backward(saved, kept, dstate, params, H: tl.constexpr):
    r, z, n, h_n = saved[0], saved[1], saved[2], saved[3]
    dy = dstate[0]
    dn = dy * (1.0 - z) * (1.0 - n * n)
    dr = dn * h_n * r * (1.0 - r)
    dz = dy * (kept[0] - n) * z * (1.0 - z)
    return (dr, dz, dn), (dr, dz, dn * r), (dy * z,), ()


@triton.jit
def peephole_lstm_forward(x, h, state, params, H: tl.constexpr):
    i = sigmoid(x[0] + h[0] + params[0] * state[1])
    f = sigmoid(x[1] + h[1] + params[1] * state[1])
    g = tanh(x[2] + h[2])
    c = f * state[1] + i * g
    o = sigmoid(x[3] + h[3] + params[2] * c)
    return (i, f, g, o), (o * tanh(c), c)


@triton.jit
def peephole_lstm_backward(saved, kept, dstate, params, H: tl.constexpr):
    i, f, g, o = saved[0], saved[1], saved[2], saved[3]
    before, after = kept[0], kept[1]
    tanh_c = tanh(after)
    do = dstate[0] * tanh_c * o * (1.0 - o)
    dc = dstate[1] + dstate[0] * o * (1.0 - tanh_c * tanh_c) + do * params[2]
    di = dc * g * i * (1.0 - i)
    df = dc * before * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    dgates = (di, df, dg, do)
    dbefore = dc * f + di * params[0] + df * params[1]
    return dgates, dgates, (tl.zeros_like(dc), dbefore), (di * before, df * before, do * after)


@triton.jit
def over_units(tile, inside, N):
    """Of the real units, the sum by N, for each row of the batch."""
    return tl.sum(tl.where(inside, tile, 0.0), axis=0)[None, :] / N


@triton.jit
def normalise(tiles, H: tl.constexpr):
    """The tiles with mean 0 and variance 1 over the units of all of them, 0 in padded units; and 1 / deviation."""
    inside = tl.arange(0, tiles[0].shape[0])[:, None] < H
    total = tiles[0]
    for g in tl.static_range(1, len(tiles)):
        total += tiles[g]
    mean = over_units(total, inside, len(tiles) * H)
    rest = total - len(tiles) * mean  # what rounding left of the mean, which a large one would add to every unit
    squares = tl.zeros_like(total)
    for g in tl.static_range(len(tiles)):
        squares += (tiles[g] - mean) * (tiles[g] - mean)
    error = over_units(rest, inside, len(tiles) * H)
    variance = over_units(squares, inside, len(tiles) * H) - error * error
    scale = 1.0 / tl.sqrt(variance + 1e-5)
    normal = ()
    for g in tl.static_range(len(tiles)):
        normal = normal + (tl.where(inside, (tiles[g] - mean - error) * scale, 0.0),)
    return normal, scale


@triton.jit
def normalise_backward(dnormal, normal, scale, H: tl.constexpr):
    """Gradient of the tiles that were normalised; both arguments are 0 in padded units."""
    total = dnormal[0]
    along = dnormal[0] * normal[0]
    for g in tl.static_range(1, len(normal)):
        total += dnormal[g]
        along += dnormal[g] * normal[g]
    mean = tl.sum(total, axis=0)[None, :] / (len(normal) * H)
    slope = tl.sum(along, axis=0)[None, :] / (len(normal) * H)
    d = ()
    for g in tl.static_range(len(normal)):
        d = d + (scale * (dnormal[g] - mean - normal[g] * slope),)
    return d


@triton.jit
def multiply_tiles(tiles, others):
    product = ()
    for n in tl.static_range(len(tiles)):
        product = product + (tiles[n] * others[n],)
    return product


@triton.jit
def tanh_and_slope(x):
    """tanh and its derivative with half the error of 1 - tanh(x)**2: normalising makes small errors large again."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -y, y), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def layer_norm_lstm_gates(x, h, params):
    """From the normalised gates to i, f, g, o."""
    i = sigmoid(x[0] * params[0] + h[0] * params[4] + params[8])
    f = sigmoid(x[1] * params[1] + h[1] * params[5] + params[9])
    g, _ = tanh_and_slope(x[2] * params[2] + h[2] * params[6] + params[10])
    o = sigmoid(x[3] * params[3] + h[3] * params[7] + params[11])
    return i, f, g, o


@triton.jit
def layer_norm_lstm_forward(x, h, state, params, H: tl.constexpr):
    normal_x, _ = normalise(x, H)
    normal_h, _ = normalise(h, H)
    i, f, g, o = layer_norm_lstm_gates(normal_x, normal_h, params)
    c = f * state[1] + i * g
    normal_c, _ = normalise((c,), H)
    y, _ = tanh_and_slope(normal_c[0] * params[12] + params[13])
    return x + h, (o * y, c)


@triton.jit
def layer_norm_lstm_backward(saved, kept, dstate, params, H: tl.constexpr):
    normal_x, scale_x = normalise(saved[:4], H)
    normal_h, scale_h = normalise(saved[4:], H)
    normal_c, scale_c = normalise(kept[1:], H)
    i, f, g, o = layer_norm_lstm_gates(normal_x, normal_h, params)
    tanh_c, slope = tanh_and_slope(normal_c[0] * params[12] + params[13])
    dbias_c = dstate[0] * o * slope
    through = normalise_backward((dbias_c * params[12],), normal_c, scale_c, H)
    dc = dstate[1] + through[0]
    di = dc * g * i * (1.0 - i)
    df = dc * kept[0] * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dstate[0] * tanh_c * o * (1.0 - o)
    dgates = (di, df, dg, do)
    dx = normalise_backward(multiply_tiles(dgates, params[:4]), normal_x, scale_x, H)
    dh = normalise_backward(multiply_tiles(dgates, params[4:8]), normal_h, scale_h, H)
    dgains = multiply_tiles(dgates, normal_x) + multiply_tiles(dgates, normal_h)
    return dx, dh, (tl.zeros_like(dc), dc * f), dgains + dgates + (dbias_c * normal_c[0], dbias_c)


@triton.jit
def layer_norm_gru_gates(x, h, params):
    """From the normalised gates to r, z, n, what r multiplies, and the slope of n."""
    r = sigmoid(x[0] * params[0] + params[6] + h[0] * params[3] + params[9])
    z = sigmoid(x[1] * params[1] + params[7] + h[1] * params[4] + params[10])
    h_n = h[2] * params[5] + params[11]
    n, slope = tanh_and_slope(x[2] * params[2] + params[8] + r * h_n)
    return r, z, n, h_n, slope


@triton.jit
def layer_norm_gru_forward(x, h, state, params, H: tl.constexpr):
    normal_x, _ = normalise(x, H)
    normal_h, _ = normalise(h, H)
    _, z, n, _, _ = layer_norm_gru_gates(normal_x, normal_h, params)
    return x + h, ((1.0 - z) * n + z * state[0],)


@triton.jit
def layer_norm_gru_backward(saved, kept, dstate, params, H: tl.constexpr):
    normal_x, scale_x = normalise(saved[:3], H)
    normal_h, scale_h = normalise(saved[3:], H)
    r, z, n, h_n, slope = layer_norm_gru_gates(normal_x, normal_h, params)
    dy = dstate[0]
    dn = dy * (1.0 - z) * slope
    dr = dn * h_n * r * (1.0 - r)
    dz = dy * (kept[0] - n) * z * (1.0 - z)
    of_x, of_h = (dr, dz, dn), (dr, dz, dn * r)
    dx = normalise_backward(multiply_tiles(of_x, params[:3]), normal_x, scale_x, H)
    dh = normalise_backward(multiply_tiles(of_h, params[3:6]), normal_h, scale_h, H)
    dgains = multiply_tiles(of_x, normal_x) + multiply_tiles(of_h, normal_h)
    return dx, dh, (dy * z,), dgains + of_x + of_h


@triton.jit
def mgu_forward(x, h, state, params, H: tl.constexpr):
    f = sigmoid(x[0] + h[0])
    n = tanh(x[1] + f * h[1])
    return (f, n, h[1]), ((1.0 - f) * state[0] + f * n,)


@triton.jit
def mgu_backward(saved, kept, dstate, params, H: tl.constexpr):
    f, n, h_n = saved[0], saved[1], saved[2]
    dy = dstate[0]
    dn = dy * f * (1.0 - n * n)
    df = (dy * (n - kept[0]) + dn * h_n) * f * (1.0 - f)
    return (df, dn), (df, dn * f), (dy * (1.0 - f),), ()


@triton.jit
def slstm_forward(x, h, state, params, H: tl.constexpr):
    """c and n are in units of exp(m); n = 0 says that there is no past, and m means nothing."""
    enter = x[0] + h[0]
    forget = x[1] + h[1]
    z = tanh(x[2] + h[2])
    o = sigmoid(x[3] + h[3])
    past = tl.minimum(forget, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(forget))) + state[3]
    fresh = state[2] == 0.0
    past_wins = (past > enter) & (fresh == 0)
    m = tl.where(past_wins, past, enter)
    i = tl.exp(enter - m)
    f = tl.where(fresh, 0.0, tl.exp(past - m))
    c = f * state[1] + i * z
    n = f * state[2] + i
    # Where the past won, f is 1: a sign tells it from an f that only rounds to 1.
    return (i, tl.where(past_wins, -f, f), z, o, sigmoid(-forget)), (o * c / n, c, n, m)


@triton.jit
def slstm_backward(saved, kept, dstate, params, H: tl.constexpr):
    i, f, z, o, slope = saved[0], tl.abs(saved[1]), saved[2], saved[3], saved[4]
    c_before, n_before, c = kept[0], kept[1], kept[3]
    n = tl.where(kept[4] == 0.0, 1.0, kept[4])  # in padded units
    dh = dstate[0] / n
    dc = dstate[1] + dh * o
    dn = dstate[2] - dh * o * c / n
    denter = (dc * z + dn) * i
    dpast = (dc * c_before + dn * n_before) * f
    # Whoever won is m itself: its own exponential is 1, and what flows through m takes the place of its gradient.
    past_wins = saved[1] < 0.0
    dm = dstate[3] - tl.where(past_wins, denter, dpast)
    denter = tl.where(past_wins, denter, dm)
    dpast = tl.where(past_wins, dm, dpast)
    dgates = (denter, dpast * slope, dc * i * (1.0 - z * z), dh * c * o * (1.0 - o))
    return dgates, dgates, (tl.zeros_like(dc), dc * f, dn * f, dpast), ()


class Step(NamedTuple):
    """A cell as the kernels know it."""

    gates: int  # G, gate pre-activations per hidden unit
    saved: int  # S, values kept for backward per hidden unit
    cells: int  # C, states carried beside h
    params: int  # K, the step's own parameters per hidden unit
    reads_h: bool  # reads h elsewhere than in the recurrent product
    splits: bool  # the recurrent gates' gradients differ from the input gates'
    whole: bool  # reduces over the hidden units, so a program must hold all of them
    forward: triton.JITFunction
    backward: triton.JITFunction


STEPS = {
    "rnn_tanh": Step(1, 1, 0, 0, False, False, False, rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": Step(1, 1, 0, 0, False, False, False, rnn_relu_forward, rnn_relu_backward),
    "lstm": Step(4, 4, 1, 0, False, False, False, lstm_forward, lstm_backward),
    "gru": Step(3, 4, 0, 0, True, True, False, gru_forward, gru_backward),
    "peephole_lstm": Step(4, 4, 1, 3, False, False, False, peephole_lstm_forward, peephole_lstm_backward),
    "layer_norm_lstm": Step(4, 8, 1, 14, False, True, True, layer_norm_lstm_forward, layer_norm_lstm_backward),
    "layer_norm_gru": Step(3, 6, 0, 12, True, True, True, layer_norm_gru_forward, layer_norm_gru_backward),
    "mgu": Step(2, 3, 0, 0, True, True, False, mgu_forward, mgu_backward),
    "slstm": Step(4, 5, 3, 0, False, False, False, slstm_forward, slstm_backward),
}
STOCK = ("rnn_tanh", "rnn_relu", "lstm", "gru")  # the cells of torch.nn


def register(name: str, step: Step) -> None:
    """Adds a step of the user's own, under a name that no other cell has."""
    if STEPS.get(name, step) != step:
        raise ValueError(f"{name!r}: there is a kernel for a cell of this name already")
    STEPS[name] = step
