"""The error budget of every numeric test: twice torch's own error at the same dtype, plus a rounding floor."""

import torch
from torch import Tensor


def assert_within_budget(got: Tensor, exact: Tensor, peer: Tensor, name: str, slack: float = 2.0) -> None:
    """Hold ``got`` to ``slack`` times the error of ``peer`` (torch at the same dtype) against ``exact`` (float64).

    The floor is one unit of rounding of the largest exact value: a peer that is exact by luck leaves room for it.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == peer.dtype, f"{name}: dtype {got.dtype}, expected {peer.dtype}"
    if exact.numel() == 0:
        return
    exact, peer_error = exact.double().cpu(), (peer.double().cpu() - exact.double().cpu()).abs().max()
    floor = torch.finfo(peer.dtype).eps * exact.abs().max()
    error = (got.double().cpu() - exact).abs().max()
    budget = slack * (peer_error + floor)
    assert error <= budget, f"{name}: off by {error:.2e}, budget {budget:.2e} (torch {peer_error:.2e})"
