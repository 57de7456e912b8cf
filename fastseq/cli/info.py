"""`fastseq info`: versions, devices, and for every operation which implementation would run and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

import fastseq
from fastseq import Choice, functional
from fastseq.cli.show import print_json, show_table
from fastseq.stopwatch import device_name, provenance

__all__ = ["info"]

T, B, I, H = 64, 32, 256, 256  # noqa: E741  (the letters of the field: time, batch, input, hidden)
N, D = 4, 64  # heads and their width


def recurrent(kind: type[nn.Module], *shape: int, **options: str) -> Callable[[torch.device], Choice]:
    """Ask a layer or a cell about an input of this shape."""

    def ask(device: torch.device) -> Choice:
        return fastseq.explain(kind(I, H, device=device, **options), torch.zeros(*shape, I, device=device))

    return ask


def attention(beyond: bool) -> Callable[[torch.device], Choice]:
    """Ask the function; ``beyond``: with a mask, a bias, or anything else of which torch's operators promise less."""

    def ask(device: torch.device) -> Choice:
        heads = torch.zeros(B, N, T, D, device=device)
        return functional.choose_attention(heads, heads, beyond)

    return ask


def multihead_attention(device: torch.device) -> Choice:
    """Ask the module, which returns weights unless told not to."""
    x = torch.zeros(T, B, N * D, device=device)
    return fastseq.explain(fastseq.MultiheadAttention(N * D, N, device=device), x, x, x)


def encoder_layer(device: torch.device) -> Choice:
    x = torch.zeros(T, B, N * D, device=device)
    return fastseq.explain(fastseq.TransformerEncoderLayer(N * D, N, device=device), x)


OPERATIONS: dict[str, Callable[[torch.device], Choice]] = {
    "lstm": recurrent(fastseq.LSTM, T, B),
    "gru": recurrent(fastseq.GRU, T, B),
    "rnn_tanh": recurrent(fastseq.RNN, T, B),
    "rnn_relu": recurrent(fastseq.RNN, T, B, nonlinearity="relu"),
    "lstm_cell": recurrent(fastseq.LSTMCell, B),
    "gru_cell": recurrent(fastseq.GRUCell, B),
    "rnn_cell": recurrent(fastseq.RNNCell, B),
    "attention": attention(beyond=False),
    "attention, masked": attention(beyond=True),
    "mha": multihead_attention,
    "encoder": encoder_layer,
}


def info(*, as_json: bool) -> None:
    """Print versions, devices and the choice for every operation on every device."""
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None  # is_available() has just said so
        devices += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    choices = [explained(name, device) for device in devices for name in OPERATIONS]
    facts = provenance(devices[-1])
    if as_json:
        names = {str(device): device_name(device) for device in devices}
        print_json({**facts, "devices": names, "operations": [asdict(choice) for choice in choices]})
        return

    facts["triton"] = facts["triton"] or "absent"
    versions = [[name, str(fact)] for name, fact in facts.items() if fact is not None and name != "device"]
    versions += [[f"device {device}", device_name(device)] for device in devices]
    show_table("fastseq", ["", ""], versions, words=2)
    rows = [
        [
            choice.device, choice.operation, choice.implementation, choice.reason,
            "; ".join(f"{name}: {why}" for name, why in choice.passed_over.items()),
        ]
        for choice in choices
    ]  # fmt: skip
    show_table(
        f"What would run (fp32, T = {T}, B = {B}, I = {I}, H = {H}; {N} heads of width {D})",
        ["device", "operation", "runs", "because", "not"], rows, words=5,
    )  # fmt: skip


@dataclass(frozen=True)
class Explained:
    """Which implementation an operation would run on a device, why, and why not the others."""

    operation: str
    device: str
    implementation: str
    reason: str
    passed_over: dict[str, str]


def explained(name: str, device: torch.device) -> Explained:
    """Ask for one operation on one device."""
    choice = OPERATIONS[name](device)
    return Explained(name, str(device), choice.name, choice.reason, dict(choice.others))
