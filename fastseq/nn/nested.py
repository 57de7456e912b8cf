"""Nested tensors, sequences of unequal lengths in one tensor, as a padded tensor and back; both differentiate."""

import torch
from torch import Tensor


def padded(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences ``[B, T, E]`` filled up with zeros, and where that was done: bool ``[B, T]``."""
    full = torch.nested.to_padded_tensor(sequences, 0.0)
    lengths = torch.tensor([row.shape[0] for row in sequences.unbind()], device=full.device)
    return full, torch.arange(full.shape[1], device=full.device) >= lengths[:, None]


def nested(full: Tensor, like: Tensor) -> Tensor:
    """The sequences of a padded tensor, without the padding, as long as those of ``like`` and in its layout."""
    lengths = [row.shape[0] for row in like.unbind()]
    if like.layout == torch.jagged:
        # With the offsets of `like` itself, the only ones that torch takes to be as long.
        rows = torch.cat([row[:length] for row, length in zip(full.unbind(), lengths, strict=True)])
        return torch.nested.nested_tensor_from_jagged(rows, like.offsets())  # type: ignore[attr-defined]
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(full.unbind(), lengths, strict=True)])
