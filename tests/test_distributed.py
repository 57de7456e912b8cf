"""Two processes: gradients under DDP and FSDP2 are those of torch alone on the whole batch."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import fastseq

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

WORLD, T, B, I, H = 2, 6, 4, 3, 5  # noqa: E741  (the field's letter)
CASES: dict[str, tuple[str, dict[str, Tensor]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "lstm-reset": ("LSTM", {"reset": torch.arange(T * B).view(T, B) % 5 == 0}),
    "gru-lengths": ("GRU", {"lengths": torch.tensor([6, 1, 4, 0])}),
    "transformer": ("Transformer", {}),
    "transformer-padding": ("Transformer", {"padding": torch.arange(T)[:, None] >= torch.tensor([6, 1, 4, 3])}),
    "rnn-both": ("RNN", {"reset": torch.arange(T * B).view(T, B) % 5 == 0, "lengths": torch.tensor([6, 1, 4, 3])}),
}


class Model(nn.Module):
    """Two recurrent layers and a head; torch.nn's, to be swapped."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.core = getattr(nn, kind)(I, H, num_layers=2)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor, **keywords: Tensor) -> Tensor:
        return self.head(self.core(x, **keywords)[0]).square().sum((0, 2)).mean()


def stepwise(model: Model, x: Tensor, reset: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    """The same loss by torch.nn's module, a step at a time, with the masks applied by hand."""
    pair, outputs = isinstance(model.core, nn.LSTM), []
    state = [torch.zeros(2, B, H, dtype=x.dtype) for _ in range(1 + pair)]
    for t in range(T):
        if reset is not None:
            state = [s.masked_fill(reset[t, :, None], 0) for s in state]
        y, after = model.core(x[t : t + 1], tuple(state) if pair else state[0])
        alive = torch.ones(B, dtype=torch.bool) if lengths is None else t < lengths
        state = [
            torch.where(alive[:, None], new, old) for new, old in zip(after if pair else (after,), state, strict=True)
        ]
        outputs.append(y * alive[:, None])
    return model.head(torch.cat(outputs)).square().sum((0, 2)).mean()


class Attentive(nn.Module):
    """Two encoder layers and a head; torch.nn's, to be swapped."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
        self.up = nn.Linear(I, 4)
        self.core = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        padding = None if padding is None else padding.t()
        return self.head(self.core(self.up(x), src_key_padding_mask=padding)).square().sum((0, 2)).mean()


def problem(name: str) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The same in every process."""
    torch.manual_seed(0)
    kind, keywords = CASES[name]
    model = Attentive() if kind == "Transformer" else Model(kind)
    return model.double(), torch.randn(T, B, I, dtype=torch.double), keywords


def alone(name: str) -> dict[str, Tensor]:
    """The gradients by torch.nn, on the whole batch, in one process."""
    model, x, keywords = problem(name)
    loss = model(x, **keywords) if isinstance(model, Attentive) else stepwise(model, x, **keywords)
    loss.backward()
    return {key: p.grad for key, p in model.named_parameters()}


def part_of(rank: int, x: Tensor, keywords: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's rows of the batch, which comes last in every mask."""
    rows = slice(rank * B // WORLD, (rank + 1) * B // WORLD)
    return x[:, rows], {name: mask[..., rows] for name, mask in keywords.items()}


def ddp(rank: int, name: str) -> dict[str, Tensor]:
    model, x, keywords = problem(name)
    fastseq.swap(model)
    wrapped = DistributedDataParallel(model)
    x, keywords = part_of(rank, x, keywords)
    for _ in range(2):  # the second time over the buckets that the first has sorted
        model.zero_grad()
        wrapped(x, **keywords).backward()
    return {key: p.grad for key, p in model.named_parameters()}


def fsdp(rank: int, name: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, x, keywords = problem(name)
    fastseq.swap(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.core, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Sharding changes the class of a module, as swapping does; neither may undo the other.
    assert isinstance(model.core, FSDPModule)
    assert any(isinstance(model.core, kind) for kind in (fastseq.nn.REPLACEMENTS[t] for t in STACKS))
    weight = next(model.core.parameters())
    assert weight.to_local().shape[0] < len(weight)
    x, keywords = part_of(rank, x, keywords)
    for _ in range(2):
        model.zero_grad()
        model(x, **keywords).backward()
    return {key: p.grad.full_tensor() for key, p in model.named_parameters()}


STACKS = (nn.RNN, nn.LSTM, nn.GRU, nn.TransformerEncoder)
METHODS = {"ddp": ddp, "fsdp": fsdp}


def process(rank: int, method: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        found = {name: METHODS[method](rank, name) for name in CASES}
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(method: str, folder: Path) -> list[dict[str, Any]]:
    """Every case in one pair of processes: starting them takes longer than all their work."""
    context: Any = torch.multiprocessing.start_processes(
        process, args=(method, str(folder)), nprocs=WORLD, join=False, start_method="spawn"
    )
    for _ in range(2):
        if context.join(timeout=150):  # raises what a process raised
            return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    for worker in context.processes:
        worker.kill()
    raise TimeoutError(f"{method}: two processes took more than five minutes")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_find_the_gradients_of_one(method: str, tmp_path: Path) -> None:
    found = run(method, tmp_path)
    for name in CASES:
        expected = alone(name)
        for rank in range(WORLD):
            assert_close(found[rank][name], expected)
