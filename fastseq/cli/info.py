"""`fastseq info`: versions, devices, and for every operation which implementation would run and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

import fastseq
from fastseq.cli.show import print_json, show_table
from fastseq.stopwatch import device_name, provenance

__all__ = ["info"]

T, B, I, H = 64, 32, 256, 256  # noqa: E741  (the letters of the field: time, batch, input, hidden)


@dataclass(frozen=True)
class Operation:
    """A fastseq module and the shape it is asked about."""

    kind: type[torch.nn.Module]
    shape: tuple[int, ...]
    options: tuple[tuple[str, str], ...] = ()


OPERATIONS = {
    "lstm": Operation(fastseq.LSTM, (T, B, I)),
    "gru": Operation(fastseq.GRU, (T, B, I)),
    "rnn_tanh": Operation(fastseq.RNN, (T, B, I)),
    "rnn_relu": Operation(fastseq.RNN, (T, B, I), (("nonlinearity", "relu"),)),
    "lstm_cell": Operation(fastseq.LSTMCell, (B, I)),
    "gru_cell": Operation(fastseq.GRUCell, (B, I)),
    "rnn_cell": Operation(fastseq.RNNCell, (B, I)),
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
        f"What would run (fp32, T = {T}, B = {B}, I = {I}, H = {H})",
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
    operation = OPERATIONS[name]
    module = operation.kind(I, H, device=device, **dict(operation.options))
    choice = fastseq.explain(module, torch.zeros(operation.shape, device=device))
    return Explained(name, str(device), choice.name, choice.reason, dict(choice.others))
