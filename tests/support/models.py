"""Our models beside those of transformers: the same weights, by way of a folder, and the same numbers."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALLOWED = 1e-5  # of the largest entry, which counts as at least 1 where the scale is that of normalised states


def randomise(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Noise on every parameter: biases are no longer 0, norms no longer 1, and attention has something to choose."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def assert_same(got: Tensor, expected: Tensor, name: str) -> None:
    """Equal to 1e-5 in states and logits, relative to the largest where that is above 1."""
    assert got.shape == expected.shape, f"{name}: {list(got.shape)}, expected {list(expected.shape)}"
    error, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    assert error <= ALLOWED * max(1.0, largest), f"{name}: off by {error:.1e}, the largest is {largest:.1e}"


def assert_same_gradients(ours: Any, theirs: torch.nn.Module) -> None:
    """Every parameter's gradient equal to 1e-5 of its own largest entry: theirs is put together as weights are.

    The bias of the keys, whose exact gradient is 0, is part of one parameter with that of queries and values.
    """
    their = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        rule, names = ours._rule(name)
        expected = rule.read([their.pop(each) for each in names])
        error, largest = (parameter.grad - expected).abs().max().item(), expected.abs().max().item()
        assert error <= ALLOWED * largest, f"gradient of {name}: off by {error:.1e}, the largest is {largest:.1e}"
    assert not their, f"gradients of theirs that ours do not have: {list(their)}"


def outputs_of(modules: Iterable[torch.nn.Module], call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What the call returns, and what each module returned within it."""
    seen: list[Tensor] = []

    def listen(module: torch.nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(listen) for module in modules]
    try:
        return call(), seen
    finally:
        for handle in handles:
            handle.remove()


def edit_config(folder: Path, **changes: Any) -> None:
    """Say otherwise in config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def characters(length: int, *files: str) -> list[Tensor]:
    """Stretches ``[N, length]`` of each text, a file of this project, its characters by number: those of ASCII."""
    texts = [torch.tensor(list((Path(__file__).parents[2] / file).read_bytes())) for file in files]
    return [text[: len(text) // length * length].view(-1, length).clamp(max=127) for text in texts]


def trained(build: Callable[[], torch.nn.Module], loss: Callable[[Any], Tensor], steps: int = 60) -> float:
    """The mean loss of the last ten steps; half way, a copy from a checkpoint goes the same way, to the bit."""

    def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
            optimizer.step()
            losses.append(value.item())
        return losses

    def started() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = build().train()
        return model, torch.optim.Adam(model.parameters(), lr=3e-3)

    model, optimizer = started()
    run(model, optimizer, steps // 2)
    weights, moments, chance = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    losses = run(model, optimizer, steps - steps // 2)
    resumed, optimizer = started()
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(chance)
    assert run(resumed, optimizer, steps - steps // 2) == losses
    for one, other in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    return sum(losses[-10:]) / 10
