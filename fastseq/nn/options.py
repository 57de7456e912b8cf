"""The options of every recurrent layer that torch.nn lacks, by keyword and off unless asked for."""

from typing import Any, cast

import torch
from torch import Tensor

from .tracing import Traced


class Options(Traced, torch.nn.RNNBase):
    """Variational dropout, weight drop, zoneout, learned initial states and a forget gate's bias, by keyword."""

    # Off, for a module that was swapped in and never constructed; whole, for torch.compile makes symbols of floats.
    recurrent_dropout: float = 0
    weight_drop: float = 0
    zoneout: tuple[float, float] = (0, 0)
    forget_bias: float | None = None

    _states = 1  # h and the cells
    _start: tuple[float, ...] = ()  # where a learned initial state begins; zeros if empty
    _forget: tuple[str, int] | None = None  # the bias that the forget gate's stands in, and at which of its blocks
    _plain = True  # nothing that torch.nn lacks

    def __init__(
        self,
        *args: Any,
        recurrent_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        learn_initial_state: bool = False,
        forget_bias: float | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*args, **keywords)
        kind = type(self).__name__
        if not isinstance(zoneout, tuple | list):
            zoneout = (zoneout, zoneout if self._states > 1 else 0.0)
        rates = {"recurrent_dropout": recurrent_dropout, "weight_drop": weight_drop}
        rates |= {f"zoneout[{i}]": rate for i, rate in enumerate(zoneout)}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"{name}: expected a probability from 0 to 1, got {rate}")
        if len(zoneout) != 2 or (zoneout[1] and self._states == 1):
            held = "h and one for the cells" if self._states > 1 else f"h alone, as {kind} has no cell"
            raise ValueError(f"zoneout: expected a rate for {held}, got {zoneout}")
        if self.proj_size and (recurrent_dropout or any(zoneout)):
            raise ValueError("proj_size: goes with neither recurrent_dropout nor zoneout")
        if forget_bias is not None and self._forget is None:
            raise ValueError(f"forget_bias: {kind} has no forget gate")
        if forget_bias is not None and not self.bias:
            raise ValueError("forget_bias: expected bias=True, got bias=False")
        given = {
            "recurrent_dropout": (float(recurrent_dropout), 0.0),
            "weight_drop": (float(weight_drop), 0.0),
            "zoneout": ((float(zoneout[0]), float(zoneout[1])), (0.0, 0.0)),
            "forget_bias": (forget_bias, None),
        }
        for name, (value, off) in given.items():
            if value != off:
                setattr(self, name, value)
        if learn_initial_state:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            widths = [self.proj_size or self.hidden_size, *[self.hidden_size] * (self._states - 1)]
            like = cast(Tensor, self._flat_weights[0])
            self._modules["initial_state"] = torch.nn.ParameterList(like.new_empty(rows, width) for width in widths)
        self._start_from()
        if self._extras():
            self._plain = False

    @property
    def initial_state(self) -> torch.nn.ParameterList | None:
        """The learned initial states ``[L*D, H]``, h first; None on a module without."""
        return cast("torch.nn.ParameterList | None", self._modules.get("initial_state"))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._start_from()

    @torch.no_grad()
    def _start_from(self) -> None:
        """The values that are not drawn."""
        if self.initial_state is not None:
            for index, state in enumerate(self.initial_state):
                state.fill_(self._start[index] if self._start else 0.0)
        if self.forget_bias is not None and self._forget is not None:
            held, block = self._forget
            rows = slice(block * self.hidden_size, (block + 1) * self.hidden_size)
            for name, parameter in self._parameters.items():
                if parameter is not None and name.startswith(f"{held}_l"):
                    parameter[rows] = self.forget_bias
                elif parameter is not None and held == "bias_ih" and name.startswith("bias_hh_l"):
                    parameter[rows] = 0.0  # the two are added

    def _extras(self) -> tuple[str, ...]:
        used = {
            "recurrent_dropout": self.recurrent_dropout > 0,
            "weight_drop": self.weight_drop > 0,
            "zoneout": max(self.zoneout) > 0,
            "learn_initial_state": self.initial_state is not None,
            "forget_bias": self.forget_bias is not None,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    def extra_repr(self) -> str:
        shown = {**vars(self), "learn_initial_state": True}
        return ", ".join([super().extra_repr(), *(f"{name}={shown[name]}" for name in self._extras())])

    def _weights(self) -> list[Tensor]:
        """All weights in torch.nn's order, the recurrent ones with what weight drop leaves of them."""
        drop = self.weight_drop if self.training else 0
        names = self._flat_weights_names
        weights: list[Tensor] = [getattr(self, name) for name in names]
        if not drop:
            return weights
        pairs = zip(names, weights, strict=True)
        return [torch.nn.functional.dropout(w, drop) if n.startswith("weight_hh") else w for n, w in pairs]

    def _loop_options(self) -> dict[str, Any]:
        """What the loop over time is told beyond what torch.nn's is, now."""
        options: dict[str, Any] = {}
        if self.recurrent_dropout and self.training:
            options["recurrent_dropout"] = self.recurrent_dropout
        if max(self.zoneout) > 0:
            options["zoneout"] = self.zoneout
        return options
