"""Laws of Transformer-XL: the paper's formula with all matrices, its memory, and how far it reaches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.models import TransformerXL, TransformerXLConfig

from .support.budget import assert_within_budget

B, T, WORDS = 2, 5, 23
SMALL: dict[str, Any] = {"vocab_size": WORDS, "d_model": 12, "n_head": 3, "d_head": 5, "d_inner": 17, "n_layer": 2}
SMALL |= {"mem_len": 8, "dropout": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "short memory": {"mem_len": 3},
    "no memory": {"mem_len": 0},
    "same length": {"same_length": True, "mem_len": 6},
    "clamped": {"clamp_len": 4},
    "all": {"same_length": True, "clamp_len": 2, "mem_len": 4, "n_layer": 3},
}


def model_of(**config: Any) -> TransformerXL:
    model = TransformerXL(TransformerXLConfig(**{**SMALL, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def oracle(model: Any, tokens: Tensor, mems: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """The paper's pseudocode with all matrices: padding and viewing for the shift, masks from mem_len (appendix B)."""
    config = model.config
    N, D, Q = config.n_head, config.d_head, tokens.shape[1]
    x = model.word.weight[tokens] * config.d_model**0.5
    mems = [x[:, :0]] * config.n_layer if mems is None else mems
    M = mems[0].shape[1]
    K = M + Q
    distance = torch.arange(K - 1, -1, -1, dtype=x.dtype)
    if config.clamp_len > 0:
        distance = distance.clamp(max=config.clamp_len)
    angle = torch.outer(distance, 1 / 10000 ** (torch.arange(0.0, config.d_model, 2.0, dtype=x.dtype) / config.d_model))
    positions = torch.cat([angle.sin(), angle.cos()], -1)
    hidden = torch.ones(Q, K).triu(1 + M)
    if config.same_length:
        beyond = K - config.mem_len
        hidden = hidden + torch.ones(Q, K).tril(-(Q - beyond if beyond > 0 else Q))
    kept = []
    for layer, mem in zip(model.layers, mems, strict=True):
        kept.append(torch.cat([mem, x], 1)[:, max(0, K - config.mem_len) :].detach())
        attention, context = layer.attention, torch.cat([mem, x], 1)
        q, k, v = (context @ attention.in_proj_weight.T).unflatten(-1, (3, N, D)).unbind(2)
        q = q[:, -Q:]
        r = (positions @ attention.r_proj.weight.T).view(K, N, D)
        content = torch.einsum("bind,bjnd->bnij", q + attention.u, k)
        of_distance = torch.einsum("bind,jnd->bnij", q + attention.w, r)
        padded = F.pad(of_distance, (1, 0)).view(*of_distance.shape[:2], K + 1, Q)
        scores = (content + padded[:, :, 1:].reshape(of_distance.shape)) / D**0.5
        w = scores.masked_fill(hidden > 0, -torch.inf).softmax(-1)
        out = torch.einsum("bnij,bjnd->bind", w, v).flatten(2) @ attention.out_proj.weight.T
        x = layer.norm1(x + out)
        x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
    return x @ model.word.weight.T + model.bias, kept


def through(model: Any, run: Any, segments: list[Tensor]) -> list[Tensor]:
    """Logits of all segments, the last memory, and the gradients of what each segment says about the next token."""
    memory, logits = None, []
    for segment in segments:
        out, memory = run(model, segment, memory)
        logits.append(out)
    loss = sum(F.cross_entropy(out[:, :-1].flatten(0, 1), s[:, 1:].flatten()) for out, s in zip(logits, segments))  # noqa: B905
    return [*logits, *memory, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("config", CONFIGS)
def test_five_segments_are_the_papers_formula(config: str) -> None:
    model = model_of(**CONFIGS[config])
    # Four times, all in one: on the few numbers of u alone torch's own error is often small by luck.
    times = [list(torch.randint(WORDS, (B, 5 * T)).split([T, T, 3, 2 * T - 3, T], 1)) for _ in range(4)]

    def four(model: Any, run: Any) -> list[Tensor]:
        return [torch.stack(each) for each in zip(*(through(model, run, segments) for segments in times), strict=True)]

    got, peer = (four(model, run) for run in (lambda m, s, memory: m(s, memory), oracle))
    exact = four(copy.deepcopy(model).double(), oracle)
    for number, three in enumerate(zip(got, exact, peer, strict=True)):
        assert_within_budget(*three, f"result {number}")


@pytest.mark.parametrize("layers", [1, 4])
def test_segments_compute_what_they_compute_all_at_once(layers: int) -> None:
    """As long as the memory holds all there was: states of the past are what they were."""
    model, tokens = model_of(n_layer=layers, mem_len=5 * T), torch.randint(WORDS, (B, 5 * T))
    whole, _ = model(tokens)
    memory, parts = None, []
    for segment in tokens.split(T, 1):
        logits, memory = model(segment, memory)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 20, [7, 13], [3, 9, 1, 7]])
def test_with_the_same_length_it_does_not_matter_how_a_text_is_cut(sizes: list[int]) -> None:
    model, tokens = model_of(same_length=True, mem_len=4, n_layer=3), torch.randint(WORDS, (B, 20))
    whole, _ = model(tokens)
    memory, parts = None, []
    for segment in tokens.split(sizes, 1):
        logits, memory = model(segment, memory)
        assert memory[0].shape[1] <= 4
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5)


def test_one_layer_learns_from_the_memory_what_it_learns_from_the_text() -> None:
    """But for the words in the memory: its gradient stops there, and nowhere else in one layer."""
    model, tokens = model_of(n_layer=1, mem_len=T), torch.arange(2 * T)[None] % WORDS
    _, memory = model(tokens[:, :T])
    assert not any(each.requires_grad for each in memory)
    parts, whole = model.encode(tokens[:, T:], memory)[0], model.encode(tokens)[0][:, T:]
    direction = torch.randn_like(whole)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(out, parameters, direction, allow_unused=True) for out in (parts, whole)]
    for name, got, expected in zip(names, *gradients, strict=True):
        if name == "word.weight":
            assert not got[:T].any()
            assert expected[:T].any()
            got, expected = got[T:], expected[T:]
        if expected is not None:
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layers", "same_length"), [(1, False), (3, False), (2, True)])
def test_it_reaches_as_far_as_layers_and_memory(layers: int, same_length: bool) -> None:
    """Token by token, so that every token has the memory and itself to see: n layers of M see n * M tokens back."""
    M, length, changed = 3, 16, 2
    model = model_of(n_layer=layers, mem_len=M, same_length=same_length)
    tokens = torch.randint(WORDS, (1, length))
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % WORDS
    outs = []
    for text in (tokens, other):
        memory, parts = None, []
        for token in text.split(1, 1):
            logits, memory = model(token, memory)
            parts.append(logits)
        outs.append(torch.cat(parts, 1))
    differs = (outs[0] != outs[1]).any(-1)[0]
    reach = layers * (M - 1 if same_length else M)
    place = torch.arange(length)
    assert torch.equal(differs, (place >= changed) & (place <= changed + reach))


def test_nothing_is_kept_on_the_module() -> None:
    model, tokens = model_of(), torch.randint(WORDS, (B, T))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, _ = model(tokens)
    second, _ = model(tokens)
    assert torch.equal(first, second)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("adaptive", [False, True])
def test_loss_is_that_of_the_logits(adaptive: bool) -> None:
    model = model_of(adaptive=adaptive, cutoffs=[5, 12], div_val=2.0)
    tokens, targets = torch.randint(WORDS, (2, B, T))
    logits, memory = model(tokens)
    if adaptive:
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(B, T))
    loss, kept = model.loss(tokens, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert all(torch.equal(a, b) for a, b in zip(kept, memory, strict=True))


@pytest.mark.parametrize("options", [{}, {"beams": 3}])
def test_generates_from_its_memory_what_it_would_from_the_whole_text(options: dict[str, Any]) -> None:
    model, prompt = model_of(mem_len=40), torch.randint(WORDS, (B, T))
    got = model.generate(prompt, max_new_tokens=8, **options)
    assert torch.equal(got[:, :T], prompt)
    if not options:
        for t in range(T, T + 8):
            assert torch.equal(got[:, t], model(got[:, :t]).logits[:, -1].argmax(-1))
    else:  # likelier than the greedy text

        def score(tokens: Tensor) -> Tensor:
            logs = model(tokens[:, :-1]).logits.log_softmax(-1)
            return logs.gather(2, tokens[:, 1:, None])[:, T - 1 :].sum((1, 2))

        assert (score(got) >= score(model.generate(prompt, max_new_tokens=8)) - 1e-4).all()


def test_a_memory_goes_on_where_it_ended() -> None:
    model, text = model_of(mem_len=40), torch.randint(WORDS, (B, 3 * T))
    _, memory = model(text[:, : 2 * T])
    got = model.generate(text[:, 2 * T :], max_new_tokens=4, memory=memory)
    assert torch.equal(got[:, T:], model.generate(text, max_new_tokens=4)[:, 3 * T :])


@pytest.mark.parametrize("adaptive", [False, True])
def test_folders_are_read_again(tmp_path: Path, adaptive: bool) -> None:
    model = model_of(adaptive=adaptive, cutoffs=[7], same_length=True)
    model.save_pretrained(tmp_path)
    again = TransformerXL.from_pretrained(tmp_path)
    assert again.config == model.config
    tokens = torch.randint(WORDS, (B, T))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_names_are_those_that_were_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_of(n_layer=1).save_pretrained(tmp_path, safetensors=False)
    attention = ("qkv_net.weight", "r_net.weight", "o_net.weight", "r_w_bias", "r_r_bias")
    names = {f"transformer.layers.0.dec_attn.{name}" for name in (*attention, "layer_norm.weight", "layer_norm.bias")}
    for kind in ("weight", "bias"):
        names |= {f"transformer.layers.0.pos_ff.{name}.{kind}" for name in ("CoreNet.0", "CoreNet.3", "layer_norm")}
    names |= {"transformer.word_emb.emb_layers.0.weight", "crit.out_layers.0.bias"}
    assert torch.load(tmp_path / "pytorch_model.bin", weights_only=True).keys() == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_embed": 7}, "d_embed: expected d_model=12, got 7"),
        ({"same_length": True, "mem_len": 0}, "mem_len: expected at least 1 with same_length, got 0"),
    ],
)
def test_what_is_not_there_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**change)


def test_memory_of_another_model_is_refused() -> None:
    _, memory = model_of(n_layer=3)(torch.randint(WORDS, (B, T)))
    with pytest.raises(ValueError, match=r"memory: expected 2 of \[2, M, 12\], got"):
        model_of()(torch.randint(WORDS, (B, T)), memory)


def test_it_learns_what_only_a_memory_can_tell() -> None:
    """The second half of a text is its first half again, and the segments are the halves."""
    torch.manual_seed(0)
    words, length = 8, 6
    sizes: dict[str, Any] = {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "n_layer": 2, "mem_len": length}
    model = TransformerXL(TransformerXLConfig(words, **sizes, dropout=0.0, init_std=0.2))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)

    def second_half(first: Tensor, memory: list[Tensor] | None) -> Tensor:
        start = torch.zeros_like(first[:, :1])
        return model.loss(torch.cat([start, first[:, :-1]], 1), first, memory)[0]

    for _ in range(80):
        first = torch.randint(1, words, (32, length))
        _, memory = model(first)
        loss = second_half(first, memory)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first = torch.randint(1, words, (64, length))
    _, memory = model(first)
    assert second_half(first, memory) < 0.5  # log 7 = 1.95 for who has not seen it
    assert second_half(first, None) > 1.5


def test_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    """The memory is what the caller keeps: it goes into the checkpoint like the weights."""
    segments = torch.randint(WORDS, (B, 4 * T + 1))

    def new() -> tuple[Any, Any, Any]:
        model = TransformerXL(TransformerXLConfig(**SMALL | {"dropout": 0.1, "adaptive": True, "cutoffs": (9,)}))
        return model, torch.optim.Adam(model.parameters(), 1e-2), None

    def step(model: Any, optimizer: Any, memory: Any, number: int) -> Any:
        torch.manual_seed(number)
        place = number * T
        optimizer.zero_grad()
        loss, memory = model.loss(segments[:, place : place + T], segments[:, place + 1 : place + T + 1], memory)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        return memory

    model, optimizer, memory = new()
    for number in range(4):
        if number == 2:
            torch.save([model.state_dict(), optimizer.state_dict(), memory], tmp_path / "checkpoint")
        memory = step(model, optimizer, memory, number)
    again, its_optimizer, _ = new()
    weights, state, its_memory = torch.load(tmp_path / "checkpoint")
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    for number in (2, 3):
        its_memory = step(again, its_optimizer, its_memory, number)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(memory, its_memory, strict=True))


def test_compiles_as_one_graph() -> None:
    model, tokens = model_of(n_layer=1, same_length=True), torch.randint(WORDS, (B, T))
    _, memory = model(tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, memory), model(tokens, memory))


def test_device_and_dtype_are_those_asked_for() -> None:
    model = TransformerXL(TransformerXLConfig(**SMALL), device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    model = TransformerXL(TransformerXLConfig(**SMALL), dtype=torch.bfloat16)
    assert model(torch.randint(WORDS, (B, T))).logits.dtype == torch.bfloat16
