"""``torch.nn``'s recurrent modules with the one line that computes replaced.

Constructor, parameters, initialisation, repr, packing and checks are inherited; what is new is by keyword.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from .. import dynamo, functional
from ..implementation import Choice, chosen, transformed
from .options import Options
from .tracing import Traced

_STOCK = frozenset({"auto", "torch"})
_SEQUENCES: dict[str, Any] = {
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
    "LSTM": torch.lstm,
    "GRU": torch.gru,
}
_CELLS: dict[str, Any] = {
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
}


def _stock(tensor: Tensor) -> bool:
    """Whether PyTorch's own module does the job as it is; costs well under a microsecond."""
    return not (torch.compiler.is_compiling() or tensor.is_cuda or transformed()) and chosen() in _STOCK


def _check_pair(hx: Any) -> None:
    """The errors of torch.lstm and torch.lstm_cell for states that are not a pair."""
    if isinstance(hx, Tensor):
        raise TypeError("hx: expected a tuple (h, c), got a Tensor")
    if isinstance(hx, tuple | list) and len(hx) != 2:
        raise RuntimeError(f"hx: expected a tuple (h, c), got {len(hx)} tensors")


class Sequence(Options):
    """What all recurrent layers share: the call."""

    _biased = True  # has torch.nn's two biases, unless told not to

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dynamo.trace(cls)

    def _kind(self) -> str:
        return self.mode.lower()

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        return_cells: bool = False,
        recompute: bool = False,
    ) -> Any:
        if reset is None and lengths is None and not return_cells and not recompute and self._plain:
            if type(input) is Tensor and _stock(input):
                result = self._stock_call(input, hx)
                return super().forward(input, hx) if result is None else result
            if not isinstance(input, Proxy) and _stock(self._flat_weights[0]):  # type: ignore[arg-type]
                return super().forward(input, hx)
        keywords: dict[str, Any] = {
            "reset": reset,
            "lengths": lengths,
            "return_cells": return_cells,
            "recompute": recompute,
        }
        if isinstance(input, Proxy):
            return self._leaf(input, hx, **keywords)
        packed = isinstance(input, PackedSequence)
        y, *rest = self._packed(input, hx, **keywords) if packed else self._padded(input, hx, **keywords)
        final, cells = tuple(rest[: self._states]), tuple(rest[self._states :])
        state = final if self._states > 1 else final[0]
        return (y, state, cells if len(cells) > 1 else cells[0]) if return_cells else (y, state)

    def _stock_call(self, input: Tensor, hx: Any) -> Any:
        """PyTorch's operator without torch.nn's bookkeeping; None when its checks should look at the arguments."""
        names, stored = self._flat_weights_names, self._parameters
        if input.dim() != 3 or input.shape[2] != self.input_size or self.proj_size:
            return None
        try:
            weights: Any = [stored[name] for name in names]
        except KeyError:  # parametrised: computed on access
            return None
        size = (
            self.num_layers * (2 if self.bidirectional else 1),
            input.shape[0 if self.batch_first else 1],
            self.hidden_size,
        )
        if hx is None:
            hx = torch.zeros(size, dtype=input.dtype, device=input.device)
            hx = (hx, hx) if self._states == 2 else hx
        elif self._states == 2:
            if type(hx) is not tuple or len(hx) != 2 or hx[0].shape != size or hx[1].shape != size:
                return None
        elif hx.shape != size:
            return None
        if input.dtype != weights[0].dtype and not torch._C._is_any_autocast_enabled():
            return None
        if self._states == 1:
            found = functional.trained(
                self.mode.lower(), input, hx, weights, self.bias, self.num_layers, self.dropout, self.training,
                self.bidirectional, self.batch_first,
            )  # fmt: skip
            if found is not None:
                return found
        y, *state = _SEQUENCES[self.mode](
            input, hx, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first,
        )  # fmt: skip
        return y, tuple(state) if self._states == 2 else state[0]

    def _padded(
        self, input: Tensor, hx: Any, *, reset: Tensor | None, lengths: Tensor | None, **keywords: Any
    ) -> list[Tensor]:
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        states = self._split(hx, as_given=batched)
        for state in states:
            if state.dim() != input.dim():
                raise RuntimeError(
                    f"hx: expected {input.dim()}-D with a {input.dim()}-D input, got a {state.dim()}-D tensor"
                )
        batch, time = (0, 1) if self.batch_first else (1, 0)
        if not batched:  # it gets a batch of one, where the module expects it
            functional.check_reset(reset, (input.shape[0],), "[T]", input.device)
            functional.check_lengths(lengths, (), "[]", input.shape[0])
            input = input.unsqueeze(batch)
            states = tuple(state.unsqueeze(1) for state in states)
            reset = None if reset is None else reset.unsqueeze(batch)
            lengths = None if lengths is None else lengths.unsqueeze(0)
        states = self._checked(input, states, None)
        if input.shape[time] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        outputs = list(self._call(input, states, batch_first=batch == 0, reset=reset, lengths=lengths, **keywords))
        if not batched:
            states_at = range(1, 1 + self._states)
            outputs = [o.squeeze(1 if i in states_at else batch) for i, o in enumerate(outputs)]
        return outputs

    def _packed(
        self, input: PackedSequence, hx: Any, *, reset: Tensor | None, lengths: Tensor | None, **keywords: Any
    ) -> list[Any]:
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence brings its own; got lengths besides")
        data, batch_sizes, order, back = input
        states = self._split(hx, as_given=True)
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        states = self._checked(data, states, batch_sizes)
        if reset is not None:
            T, B = len(batch_sizes), int(batch_sizes[0])
            shape, letters = ((B, T), "[B, T]") if self.batch_first else ((T, B), "[T, B]")
            functional.check_reset(reset, shape, letters, data.device)
            reset = reset.transpose(0, 1) if self.batch_first else reset
            reset = reset if order is None else reset.index_select(1, order)
        outputs = self._call(
            data, states, batch_first=False, batch_sizes=batch_sizes, reset=reset, lengths=None, **keywords
        )
        final = [s if back is None else s.index_select(1, back) for s in outputs[1 : 1 + self._states]]
        y, *cells = (PackedSequence(o, batch_sizes, order, back) for o in (outputs[0], *outputs[1 + self._states :]))
        return [y, *final, *cells]

    def _split(self, hx: Any, as_given: bool) -> tuple[Tensor, ...]:
        """The states in hx, which must be a pair where torch.nn.LSTM hands it on as it is."""
        if hx is None or self._states == 1:
            return () if hx is None else (hx,)
        pair = (hx[0], hx[1])
        if as_given and not (isinstance(hx, Tensor) and hx.dim() < 4):
            _check_pair(hx)
        return pair

    def _checked(self, input: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
        """The initial states, zeros if none were given, after torch.nn's own checks of type, size and device."""
        if not states:
            size = self.get_expected_hidden_size(input, batch_sizes)
            if self.initial_state is not None:
                states = tuple(state[:, None].expand(-1, size[1], -1) for state in self.initial_state)
            else:
                sizes = [size, *[(*size[:2], self.hidden_size)] * (self._states - 1)]
                states = tuple(input.new_zeros(size) for size in sizes)
        casting = torch._C._is_any_autocast_enabled()
        if self._states == 2 and batch_sizes is not None and not casting:
            # torch.nn.LSTM does not check packed input itself: its operator does, with errors of other types.
            dtype = self._flat_weights[0].dtype  # type: ignore[union-attr]
            if input.dtype != dtype:
                raise RuntimeError(f"input: expected {dtype} as the weights, got {input.dtype}")
            for state in states:
                if state.dim() < 3:
                    raise IndexError(f"hx: expected 3-D, got a {state.dim()}-D tensor")
        self.check_forward_args(input, states if self._states > 1 else states[0], batch_sizes)  # type: ignore[arg-type]
        device = getattr(self, self._flat_weights_names[0]).device
        if input.device != device:
            raise RuntimeError(f"input: expected device {device} as the weights, got {input.device}")
        for state in states:
            if state.device != input.device:
                raise RuntimeError(f"hx: expected device {input.device} as the input, got {state.device}")
            if state.dtype != input.dtype and not casting:
                raise RuntimeError(f"hx: expected {input.dtype} as the input, got {state.dtype}")
        return states

    def _call(self, input: Tensor, states: tuple[Tensor, ...], *, batch_first: bool, **keywords: Any) -> Any:
        return functional.sequence(
            self._kind(), input, states, self._weights(), self.bias and self._biased, self.num_layers, self.dropout,
            self.training, self.bidirectional, batch_first, **self._loop_options(), **keywords,
        )  # fmt: skip

    def _explain(
        self,
        input: Any,
        hx: Any = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        return_cells: bool = False,
        recompute: bool = False,
    ) -> Choice:
        if isinstance(input, PackedSequence):
            data, steps, rows = input.data, len(input.batch_sizes), input.batch_sizes.tolist()[0]
        else:
            time = 1 if self.batch_first and input.dim() == 3 else 0
            data, steps, rows = input, input.shape[time], input.shape[1 - time] if input.dim() == 3 else 1
        weights = [getattr(self, name) for name in self._flat_weights_names]
        further = return_cells or recompute or not self._plain
        masked = reset is not None or lengths is not None
        way = functional.engine(
            self._kind(), data, hx if isinstance(hx, tuple) else () if hx is None else (hx,), weights,
            rows if masked or (data is input and input.dim() == 3) else 0, steps,
            reset=reset is not None, lengths=lengths is not None or (masked and data is not input), beyond=further,
        )  # fmt: skip
        choice = functional.choose_sequence(self._kind(), data, weights, steps, masked or further, way)
        directions = 2 if self.bidirectional else 1
        return functional.explained(choice, self._kind(), data, weights[1], rows, directions)


class RNN(Sequence, torch.nn.RNN):
    """Elman network, a drop-in ``torch.nn.RNN`` (Elman 1990) with resets, lengths and a choice of implementation.

    Constructor, parameters and results as ``torch.nn.RNN``. The call takes, by keyword only:

    - ``reset``: bool ``[T, B]`` (``[B, T]`` when ``batch_first``, ``[T]`` unbatched): where true, the state is
      zero before the step reads it, in each direction's own order.
    - ``lengths``: integers ``[B]`` on any device: steps past a row's end output zeros and leave its state as it is.
    - ``return_cells``: a third result, every step's state of the last layer: here the output itself.
    - ``recompute``: keep no gates for the gradient; less memory for one more matrix product.

    ``torch.vmap`` over inputs, and gradients per sample, are one call with more rows; over weights (an ensemble) it
    is a call for each set of them.

    And the constructor, by keyword only, with probabilities from 0 to 1, the first two in training only:

    - ``recurrent_dropout``: of h where it enters the recurrent product, one mask for all steps (Gal & Ghahramani 2016).
    - ``weight_drop``: of the recurrent weights, drawn once per call (Merity et al. 2018).
    - ``zoneout``: that a value of a state stays as it was; in evaluation, how much of it does (Krueger et al. 2017).
      One number, or one for h and one for the cells.
    - ``learn_initial_state``: the states to start from are parameters, ``initial_state`` ``[L*D, H]`` each.
    - ``forget_bias``: what the bias of the forget gate starts from (Gers et al. 2000), in a cell that has one.

    Raises:
        As ``torch.nn.RNN``; TypeError or ValueError for a wrong ``reset`` or ``lengths``, ValueError for an option out
        of range or that the cell cannot have; ``fastseq.Unsupported``.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.RNN(4, 8, nonlinearity="relu")
        >>> y, h = rnn(torch.randn(5, 2, 4), lengths=torch.tensor([5, 3]))
    """


class LSTM(Sequence, torch.nn.LSTM):
    """Long short-term memory, a drop-in ``torch.nn.LSTM`` (Hochreiter & Schmidhuber 1997) with more by keyword.

    Constructor (``proj_size`` too), parameters and results as ``torch.nn.LSTM``. Constructor and call take the keywords
    of :class:`RNN`; ``return_cells`` gives every c_t of the last layer, shaped like the output with H in place of P.

    Raises:
        As ``torch.nn.LSTM``; TypeError or ValueError for a wrong ``reset`` or ``lengths``; ``fastseq.Unsupported``.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.LSTM(4, 8, num_layers=2, batch_first=True)
        >>> episode_start = torch.tensor([[False, False, True, False, False]]).expand(2, 5)
        >>> y, (h, c), cells = rnn(torch.randn(2, 5, 4), reset=episode_start, return_cells=True)
    """

    _states = 2
    _forget = ("bias_ih", 1)


class GRU(Sequence, torch.nn.GRU):
    """Gated recurrent unit, a drop-in ``torch.nn.GRU`` (Cho et al. 2014) with more by keyword.

    Constructor, parameters and results as ``torch.nn.GRU``; the keywords of both are those of :class:`RNN`.

    Raises:
        As ``torch.nn.GRU``; TypeError or ValueError for a wrong ``reset`` or ``lengths``; ``fastseq.Unsupported``.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.GRU(4, 8, bidirectional=True)
        >>> y, h = rnn(torch.randn(5, 2, 4), lengths=torch.tensor([5, 3]))
    """


class _Cell(Traced, torch.nn.RNNCellBase):
    """What RNNCell, LSTMCell and GRUCell share: the call."""

    _states = 1

    def _kind(self) -> str:
        raise NotImplementedError

    def _weights(self) -> Any:
        stored = self._parameters
        try:  # four lookups in a dict, where attribute access would cost as much as the rest of the call
            return stored["weight_ih"], stored["weight_hh"], stored["bias_ih"], stored["bias_hh"]
        except KeyError:  # parametrised: computed on access
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def forward(self, input: Tensor, hx: Any = None, *, reset: Tensor | None = None) -> Any:
        if isinstance(input, Proxy):
            return self._leaf(input, hx, reset=reset)
        weights, kind, pair = self._weights(), self._kind(), self._states == 2
        if kind not in _CELLS:
            return super().forward(input, hx)  # raises as torch.nn does
        if reset is None and _stock(weights[0]):
            # PyTorch's operator without torch.nn's bookkeeping, unless its checks should look at the arguments.
            if input.dim() == 2:
                if hx is None:
                    hx = torch.zeros(input.shape[0], self.hidden_size, dtype=input.dtype, device=input.device)
                    return _CELLS[kind](input, (hx, hx) if pair else hx, *weights)
                if (type(hx) is tuple and len(hx) == 2 and hx[0].dim() == hx[1].dim() == 2) if pair else hx.dim() == 2:
                    return _CELLS[kind](input, hx, *weights)
            return super().forward(input, hx)
        if pair and hx is not None and input.dim() == 2:
            _check_pair(hx)
        new = self._step(input, () if hx is None else (hx[0], hx[1]) if pair else (hx,), reset)
        return (new[0], new[1]) if pair else new[0]

    def _step(self, input: Tensor, states: tuple[Tensor, ...], reset: Tensor | None) -> tuple[Tensor, ...]:
        """A step by another implementation than torch.nn's module; states is empty for zeros."""
        kind, weights = self._kind(), self._weights()
        for name, value in (("input", input), *(("hidden", state) for state in states)):
            if value.dim() not in (1, 2):
                raise ValueError(f"{name}: expected 1D or 2D, got {value.dim()}D")
        batched = input.dim() == 2
        if not batched:
            functional.check_reset(reset, (), "[]", input.device)
            input, states = input[None], tuple(state[None] for state in states)
            reset = None if reset is None else reset[None]
        if input.shape[1] != self.input_size:
            raise RuntimeError(f"input: expected [B, {self.input_size}], got {list(input.shape)}")
        if not states:
            states = (input.new_zeros(input.shape[0], self.hidden_size),) * (2 if kind == "lstm" else 1)
        for state in states:
            if state.shape != (input.shape[0], self.hidden_size):
                raise RuntimeError(f"hx: expected {[input.shape[0], self.hidden_size]}, got {list(state.shape)}")
        new = functional.single(kind, input, states, weights, reset)
        return new if batched else tuple(state[0] for state in new)

    def _explain(self, input: Tensor, hx: Any = None, *, reset: Tensor | None = None) -> Choice:
        return functional.choose_single(self._kind(), input, self.weight_hh)


class RNNCell(_Cell, torch.nn.RNNCell):
    """One step of an Elman network, a drop-in ``torch.nn.RNNCell`` with a reset and a choice of implementation.

    Constructor, parameters and results as ``torch.nn.RNNCell``: input ``[B, I]`` or ``[I]``, hx ``[B, H]`` or
    ``[H]``. ``reset``, by keyword: bool ``[B]``; where true, the state is zero before the step reads it.

    Raises:
        As ``torch.nn.RNNCell``; TypeError or ValueError for a wrong ``reset``; ``fastseq.Unsupported``.

    Example:
        >>> import torch, fastseq
        >>> h = fastseq.RNNCell(4, 8)(torch.randn(2, 4), torch.zeros(2, 8))
    """

    def _kind(self) -> str:
        return f"rnn_{self.nonlinearity}"


class GRUCell(_Cell, torch.nn.GRUCell):
    """One step of a gated recurrent unit, a drop-in ``torch.nn.GRUCell``.

    Constructor, parameters and results as ``torch.nn.GRUCell``; ``reset``, shapes and errors as :class:`RNNCell`.

    Example:
        >>> import torch, fastseq
        >>> h = fastseq.GRUCell(4, 8)(torch.randn(2, 4), torch.zeros(2, 8), reset=torch.tensor([True, False]))
    """

    def _kind(self) -> str:
        return "gru"


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """One step of a long short-term memory, a drop-in ``torch.nn.LSTMCell``.

    Constructor, parameters and results as ``torch.nn.LSTMCell``; ``reset``, shapes and errors as :class:`RNNCell`.

    Example:
        >>> import torch, fastseq
        >>> h, c = fastseq.LSTMCell(4, 8)(torch.randn(2, 4), (torch.zeros(2, 8), torch.zeros(2, 8)))
    """

    _states = 2

    def _kind(self) -> str:
        return "lstm"
