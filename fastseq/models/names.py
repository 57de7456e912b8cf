"""Names of parameters, ours and theirs: the rules by which a file of weights is read and written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A parameter, or a module with all of its parameters, by our name and by theirs.

    Names are words with dots between; ``{}`` stands for a number, which is the same in both. What follows a name is
    the same in both as well, so that one rule serves a module's weight and bias.

    Args:
        ours: the name in our ``state_dict``.
        theirs: the name in the file; several are joined along dimension 0, in equal parts.
        transposed: their matrices are applied from the right, ``x @ weight``.
        head_width: in theirs heads and the head width are two dimensions, ``[E, N, D]``, and in ours they are one;
            this is the configuration's name for the width.

    Example:
        >>> from fastseq.models import Rule
        >>> rule = Rule("layers.{}.linear1", "h.{}.mlp.c_fc", transposed=True)
        >>> rule.named("layers.7.linear1.weight")
        ['h.7.mlp.c_fc.weight']
    """

    ours: str
    theirs: str | tuple[str, ...]
    transposed: bool = False
    head_width: str | None = None

    def named(self, name: str) -> list[str] | None:
        """What theirs are called that make up ours of this name; None if the rule is about others."""
        fit = _fit(self.ours, name)
        if fit is None:
            return None
        numbers, rest = fit
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        return [template.format(*numbers) + rest for template in theirs]

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours, made of theirs."""
        if self.head_width is not None:
            parts = [part.flatten(1) if part.dim() == 3 else part for part in parts]
        if self.transposed:
            parts = [part.t() for part in parts]
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]

    def write(self, tensor: Tensor, count: int, config: Any) -> list[Tensor]:
        """Theirs, ``count`` of them, made of ours."""
        parts = list(tensor.chunk(count))
        if self.transposed:
            parts = [part.t() for part in parts]
        if self.head_width is not None:
            width = getattr(config, self.head_width)
            parts = [part.unflatten(1, (-1, width)) if part.dim() == 2 else part for part in parts]
        return [part.contiguous() for part in parts]


def _fit(template: str, name: str) -> tuple[list[str], str] | None:
    """The numbers where the template has ``{}``, and what follows it; None if the name does not begin with it."""
    wanted, words = template.split("."), name.split(".")
    if len(words) < len(wanted):
        return None
    numbers = []
    for want, word in zip(wanted, words, strict=False):
        if want == "{}" and word.isdigit():
            numbers.append(word)
        elif want != word:
            return None
    return numbers, "".join(f".{word}" for word in words[len(wanted) :])


def within(templates: Sequence[str], name: str) -> bool:
    """Whether the name begins with one of the templates, word by word."""
    return any(_fit(template, name) is not None for template in templates)


def under(prefix: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a model that is part of another, where its names, ours and theirs, begin with the prefix."""
    return tuple(
        replace(
            rule,
            ours=prefix + rule.ours,
            theirs=prefix + rule.theirs
            if isinstance(rule.theirs, str)
            else tuple(prefix + theirs for theirs in rule.theirs),
        )
        for rule in rules
    )
