"""Recurrent layers that torch.nn has no class for: any cell, of which only the step is its own."""

from typing import Any

import torch
from torch import Tensor

from ..reference.recurrent import CELLS
from .recurrent import Sequence


class Recurrent(Sequence):
    """A layer of any cell: constructor, call and results as those of ``torch.nn.RNNBase``'s children.

    ``cell`` names the step. Parameters are ``weight_ih_l0``, ``weight_hh_l0``, ``bias_ih_l0``, ``bias_hh_l0`` and the
    cell's own, with the same suffixes. The state is h, or the tuple (h, cells) of a cell that has more.
    """

    cell: str
    _plain = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._states = 1 + CELLS[cls.cell].cells

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        # torch.nn checks the arguments and names the parameters of a cell with one gate; then they get their size.
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, **options,
        )  # fmt: skip

    def _init_flat_weights(self) -> None:
        if self.mode == "RNN_TANH":
            self.mode = self.cell
            if not (self.bias or self._biased):
                raise ValueError(f"bias: {type(self).__name__} shifts what it has normalised; got bias=False")
            self._build()
        super()._init_flat_weights()

    def _build(self) -> None:
        cell, H = CELLS[self.cell], self.hidden_size
        one_gate, self._parameters = self._parameters, {}
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            if not self._biased:
                del names[2:]
            shapes = {name: (cell.gates * H, *one_gate[name].shape[1:]) for name in names}  # type: ignore[union-attr]
            shapes |= {own + suffix: (rows * H,) for own, (rows, _) in cell.parameters.items()}
            names[:] = shapes
            for name, shape in shapes.items():
                like = one_gate[f"weight_ih{suffix}"]
                self.register_parameter(name, torch.nn.Parameter(like.new_empty(shape)))  # type: ignore[union-attr]
        self._flat_weights_names = [name for names in self._all_weights for name in names]

    @torch.no_grad()
    def _start_from(self) -> None:
        for own, (_, value) in CELLS[self.cell].parameters.items():
            for name, parameter in self._parameters.items():
                if value is not None and parameter is not None and name.rsplit("_l", 1)[0] == own:
                    parameter.fill_(value)
        super()._start_from()

    def flatten_parameters(self) -> None:
        """Nothing to flatten: cuDNN knows none of these cells."""

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        for index, state in enumerate(hidden if isinstance(hidden, tuple) else (hidden,)):
            self.check_hidden_size(state, expected, f"Expected hx[{index}] size {{}}, got {{}}")

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return self  # torch.nn has nothing to take its place

    def _kind(self) -> str:
        return self.cell

    def _split(self, hx: Any, as_given: bool) -> tuple[Tensor, ...]:
        if hx is None:
            return ()
        states = hx if isinstance(hx, tuple | list) else (hx,)
        if len(states) != self._states or (self._states == 1) != isinstance(hx, Tensor):
            wanted = "a tensor h" if self._states == 1 else f"a tuple of {self._states} tensors (h and the cells)"
            got = f"{len(hx)} tensors" if isinstance(hx, tuple | list) else f"a {type(hx).__name__}"
            raise TypeError(f"hx: expected {wanted}, got {got}")
        return tuple(states)

    def _loop_options(self) -> dict[str, Any]:
        return {**super()._loop_options(), "own": len(CELLS[self.cell].parameters)}

    def _call(self, input: Tensor, states: tuple[Tensor, ...], *, batch_first: bool, **keywords: Any) -> Any:
        if len(states) > 2:
            states = states[0], torch.cat(states[1:], dim=-1)
        y, *rest = super()._call(input, states, batch_first=batch_first, **keywords)
        if self._states <= 2:
            return y, *rest
        C, D = self._states - 1, 2 if self.bidirectional else 1
        every = [
            cell.flatten(-2) for cells in rest[2:] for cell in cells.unflatten(-1, (D, C, self.hidden_size)).unbind(-2)
        ]
        return y, rest[0], *rest[1].chunk(C, dim=-1), *every


class PeepholeLSTM(Recurrent):
    """LSTM whose gates see the cell (Gers & Schmidhuber 2000), with everything :class:`fastseq.LSTM` takes.

    Constructor as ``torch.nn.LSTM`` without ``proj_size``; one more parameter, ``peephole_l0`` ``[3*H]``: what of the
    cell the input, forget and output gates see. Input ``[T, B, I]`` (``[B, T, I]`` when ``batch_first``, ``[T, I]``
    unbatched, or packed), state (h, c), each ``[L*D, B, H]``. Keywords of constructor and call as :class:`fastseq.RNN`.

    Raises:
        As ``torch.nn.LSTM``; ValueError for an option out of range; ``fastseq.Unsupported``.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.PeepholeLSTM(4, 8, bidirectional=True)
        >>> y, (h, c) = rnn(torch.randn(5, 2, 4), lengths=torch.tensor([5, 3]))
    """

    cell = "peephole_lstm"
    _forget = ("bias_ih", 1)


class LayerNormLSTM(Recurrent):
    """LSTM that normalises both products and the cell over the layer (Ba, Kiros & Hinton 2016).

    Shapes, keywords and errors as :class:`PeepholeLSTM`. In place of the two biases stand ``gain_x_l0``,
    ``gain_h_l0`` and ``bias_l0``, ``[4*H]`` each, and ``gain_c_l0``, ``bias_c_l0`` ``[H]``; ``bias=False`` is a
    ValueError.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.LayerNormLSTM(4, 8, num_layers=2, zoneout=(0.05, 0.5), forget_bias=1.0)
        >>> y, (h, c) = rnn(torch.randn(5, 2, 4))
    """

    cell = "layer_norm_lstm"
    _biased = False
    _forget = ("bias", 1)


class LayerNormGRU(Recurrent):
    """GRU that normalises both products over the layer (Ba, Kiros & Hinton 2016).

    Shapes, keywords and errors as :class:`PeepholeLSTM`, with the state h alone and no ``forget_bias``. In place of the
    two biases stand ``gain_x_l0``, ``gain_h_l0``, ``bias_l0`` and ``bias_h_l0``, ``[3*H]`` each; ``bias=False`` is a
    ValueError.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.LayerNormGRU(4, 8, recurrent_dropout=0.2)
        >>> y, h = rnn(torch.randn(5, 2, 4))
    """

    cell = "layer_norm_gru"
    _biased = False


class MGU(Recurrent):
    """Minimal gated unit (Zhou et al. 2016), a GRU with one gate, which applies after the product as torch's does.

    Shapes, keywords and errors as :class:`LayerNormGRU`, with ``torch.nn.GRU``'s parameters for 2 gates: f, then n.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.MGU(4, 8, batch_first=True)
        >>> y, h = rnn(torch.randn(2, 5, 4))
    """

    cell = "mgu"


class SLSTM(Recurrent):
    """LSTM with exponential gates and a normaliser, sLSTM of xLSTM (Beck et al. 2024), one head.

    Shapes, keywords and errors as :class:`PeepholeLSTM`, with ``torch.nn.LSTM``'s parameters. The state is (h, c, n,
    m): c and the normaliser n are kept in units of exp(m), and n = 0 means no past. Learned initial states start
    from n = 1. ``return_cells`` gives the three as a tuple.

    Example:
        >>> import torch, fastseq
        >>> rnn = fastseq.SLSTM(4, 8)
        >>> y, (h, c, n, m) = rnn(torch.randn(5, 2, 4))
    """

    cell = "slstm"
    _start = (0.0, 0.0, 1.0, 0.0)
    _forget = ("bias_ih", 1)
