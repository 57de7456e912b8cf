"""Writing token after token with any model that gives the next token's logits: greedily, by chance, or by beams."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = -1e9  # the score of a beam that is not there: far below any other, and differences still show in float32


@torch.no_grad()
def generate(
    step: Callable[[Tensor], Tensor],
    prompt: Tensor,
    *,
    max_new_tokens: int,
    end: int | None = None,
    pad: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    reorder: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """The prompt and what follows it: the likeliest token each time, a drawn one, or the best of several beams.

    Beams are searched as by transformers' ``generate`` with ``early_stopping=True``: of the ``2 * beams`` likeliest
    continuations those that end and are among the best ``beams`` are put aside, scored by log-probability over
    ``length ** length_penalty``, the length being that of the new tokens, end included; the best others go on. A row
    is done when ``beams`` were put aside, or at ``max_new_tokens``; its best is returned.

    Args:
        step: takes the tokens ``[B, t]`` that it has not seen yet, first the prompt, then one at a time, and returns
            logits ``[B, V]`` of the token that follows; it keeps what it needs of those before.
        prompt: int64 ``[B, t]``, t at least 1.
        max_new_tokens: at least 1; fewer follow if every row ends before.
        end: the token that ends a row; None for none.
        pad: what follows the end, ``end`` itself if None.
        temperature: divides the logits before a token is drawn; None for the likeliest.
        top_k: draw from so many likeliest.
        top_p: draw from the fewest likeliest that together have this probability (Holtzman et al. 2020).
        beams: how many continuations of a row compete; not with a temperature.
        length_penalty: above 0 favours long ones.
        generator: of the draws; torch's own if None.
        reorder: needed for beams: makes what ``step`` keeps that of these rows, int64 ``[B * beams]``, in this order
            and a row any number of times; the first call makes ``B * beams`` rows of B.

    Returns:
        int64 ``[B, t + n]``, n at most ``max_new_tokens``.

    Raises:
        ValueError: an argument is out of its range or does not go with another.

    Example:
        >>> import torch
        >>> from fastseq.models import generate
        >>> def step(tokens):
        ...     return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 5, 5).float()
        >>> generate(step, torch.tensor([[0], [2]]), max_new_tokens=6, end=4, pad=0)
        tensor([[0, 1, 2, 3, 4],
                [2, 3, 4, 0, 0]])
    """
    if prompt.dim() != 2 or not prompt.shape[1]:
        raise ValueError(f"prompt: expected [B, t] with t at least 1, got {list(prompt.shape)}")
    for name, count in (("max_new_tokens", max_new_tokens), ("beams", beams)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    if temperature is None and (top_k is not None or top_p is not None):
        raise ValueError("temperature: expected a number with top_k and top_p, got None")
    pad = pad if pad is not None else end if end is not None else 0
    if beams > 1:
        if temperature is not None:
            raise ValueError(f"temperature: expected None with beams, got {temperature}")
        if reorder is None:
            raise ValueError("reorder: expected a function with beams, got None")
        return _by_beams(step, reorder, prompt, max_new_tokens, end, pad, beams, length_penalty)

    tokens, new = prompt, prompt
    ended = torch.zeros(prompt.shape[0], 1, dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        logits = step(new)
        if temperature is None:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator)
        new = new.masked_fill(ended, pad)
        tokens = torch.cat([tokens, new], 1)
        if end is not None:
            ended = ended | (new == end)
            if ended.all():
                break
    return tokens


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """What a token is drawn from: the softmax of logits ``[..., V]`` over those that remain, in float32 at least.

    The temperature comes first, then ``top_k``, then ``top_p`` of what is left, as in transformers. Equals of the
    k-th likeliest remain.

    Raises:
        ValueError: the temperature or ``top_p`` is not positive, ``top_p`` exceeds 1, or ``top_k`` is below 1.

    Example:
        >>> import torch
        >>> from fastseq.models import probabilities
        >>> probabilities(torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), top_p=0.7)
        tensor([0.6667, 0.3333, 0.0000, 0.0000])
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
        likeliest, index = logits.softmax(-1).sort(descending=True)
        likelier = likeliest.cumsum(-1) - likeliest  # the probability of all that are likelier
        beyond = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, likelier >= top_p)
        logits = logits.masked_fill(beyond, -torch.inf)
    return logits.softmax(-1)


def _by_beams(
    step: Callable[[Tensor], Tensor],
    reorder: Callable[[Tensor], object],
    prompt: Tensor,
    max_new_tokens: int,
    end: int | None,
    pad: int,
    beams: int,
    length_penalty: float,
) -> Tensor:
    B, t = prompt.shape
    device = prompt.device
    first = torch.arange(B, device=device)[:, None] * beams  # of each row's beams
    among_best = torch.arange(2 * beams, device=device) < beams

    running = prompt[:, None].expand(B, beams, t)
    score = torch.full((B, beams), _NEVER, device=device)
    score[:, 0] = 0.0  # they are all the same yet: one goes on
    aside = torch.full((B, beams, t + max_new_tokens), pad, device=device)
    aside_score = torch.full((B, beams), _NEVER, device=device)
    aside_length = torch.zeros(B, beams, dtype=torch.int64, device=device)  # 0: none

    logits = step(prompt)
    rows = torch.arange(B, device=device).repeat_interleave(beams)
    reorder(rows)
    logits = logits[rows]
    for length in range(1, max_new_tokens + 1):
        V = logits.shape[-1]
        onward = score[..., None] + F.log_softmax(logits.float(), -1).view(B, beams, V)
        best, index = onward.flatten(1).topk(2 * beams)
        origin, token = index // V, index % V
        grown = torch.cat([_taken(running, origin), token[..., None]], 2)
        last = length == max_new_tokens
        ended = torch.full_like(token, last, dtype=torch.bool) if end is None or last else token == end

        done = (aside_length > 0).all(1, keepdim=True)
        put = ended & among_best & ~done
        filled = F.pad(grown, (0, max_new_tokens - length), value=pad)
        put_score = torch.where(put, best / length**length_penalty, _NEVER)
        aside_score, kept = torch.cat([aside_score, put_score], 1).topk(beams)
        aside = _taken(torch.cat([aside, filled], 1), kept)
        aside_length = torch.cat([aside_length, put * length], 1).gather(1, kept)
        if last or bool((aside_length > 0).all()):
            break

        score, kept = torch.where(ended, best + _NEVER, best).topk(beams)
        running = _taken(grown, kept)
        reorder((first + origin.gather(1, kept)).flatten())
        logits = step(running[:, :, -1].reshape(B * beams, 1))
    return aside[:, 0, : t + int(aside_length[:, 0].max())]


def _taken(tokens: Tensor, index: Tensor) -> Tensor:
    """Of tokens ``[B, n, T]`` in each row those of index ``[B, m]``."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
