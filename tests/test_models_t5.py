"""T5, versions 1.0 and 1.1, against transformers' on the same weights; and its attention against the formula."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.models import T5, T5Config

from .support.budget import assert_within_budget

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Widths that differ from one another, and lengths beyond the distance where the buckets saturate.
SIZES: dict[str, Any] = {
    "vocab_size": 61, "d_model": 24, "d_kv": 7, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
}  # fmt: skip
TOLERANCE = 1e-5
S, T = 19, 17


def theirs_of(version: str, **changes: Any) -> Any:
    """A model of transformers, no parameter at a value that could hide an error."""
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES | VERSIONS[version] | changes))
    if version == "1.1":  # as the published ones: a head of its own
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            if "relative_attention_bias" in name:
                parameter.normal_()
        if version == "1.0":  # a tied head of such weights says again and again what was said last
            model.shared.weight.mul_(0.2)
            model.decoder.final_layer_norm.weight.mul_(25.0)
    return model.eval()


def pair_of(version: str, folder: Path, **changes: Any) -> tuple[T5, Any]:
    theirs = theirs_of(version, **changes)
    theirs.save_pretrained(folder)
    return T5.from_pretrained(folder), theirs


def mask_of(length: int, rows: list[tuple[int, int]]) -> Tensor:
    """True from the first of a row's tokens to before its second number."""
    where = torch.arange(length)
    return torch.stack([(where >= start) & (where < end) for start, end in rows])


def inputs() -> dict[str, Tensor]:
    """Padding on the right and on the left, in the encoder and in the decoder."""
    return {
        "input_ids": torch.randint(2, 61, (4, S)),
        "decoder_input_ids": torch.randint(2, 61, (4, T)),
        "attention_mask": mask_of(S, [(0, S), (0, 11), (6, S), (2, 5)]),
        "decoder_attention_mask": mask_of(T, [(0, T), (0, 9), (4, T), (0, 1)]),
    }


def assert_near(got: Tensor, expected: Tensor, name: str) -> None:
    error, largest = (got - expected).abs().max(), max(1.0, float(expected.abs().max()))
    assert error <= TOLERANCE * largest, f"{name}: off by {error:.1e} of {largest:.1e}"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_and_hidden_states_are_theirs(version: str, padded: bool, tmp_path: Path) -> None:
    ours, theirs = pair_of(version, tmp_path)
    given = inputs()
    if not padded:
        given = {name: tensor for name, tensor in given.items() if "mask" not in name}
    whole = torch.ones(4, max(S, T), dtype=torch.bool)
    real = given.get("attention_mask", whole[:, :S]), given.get("decoder_attention_mask", whole[:, :T])

    states: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    for layer in (*ours.encoder.layers, *ours.decoder.layers):
        layer.register_forward_hook(lambda _, __, out: states["ours"].append(out))
    for block in (*theirs.encoder.block, *theirs.decoder.block):
        block.register_forward_hook(lambda _, __, out: states["theirs"].append(out[0]))
    with torch.no_grad():
        logits, expected = ours(**given), theirs(**given)
        memory = ours.encode(given["input_ids"], given.get("attention_mask"))
    assert logits.shape == (4, T, 61)
    assert_near(logits[real[1]], expected.logits[real[1]], "logits")
    assert_near(memory[real[0]], expected.encoder_last_hidden_state[real[0]], "encoder")
    del states["ours"][5:]  # those of the encoder alone
    assert len(states["ours"]) == len(states["theirs"]) == 5
    for number, (got, wanted) in enumerate(zip(states["ours"], states["theirs"], strict=True)):
        seen = real[0] if number < 2 else real[1]
        assert_near(got[seen], wanted[seen], f"layer {number}")


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_of_all_parameters_are_theirs(version: str, tmp_path: Path) -> None:
    ours, theirs = pair_of(version, tmp_path / "weights")
    given = inputs()
    weight = torch.randn(4, T, 61) * given["decoder_attention_mask"][..., None]
    (ours(**given) * weight).sum().backward()
    (theirs(**given).logits * weight).sum().backward()

    # Written as if they were weights, the gradients have their names.
    carrier = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter, of_ours in zip(carrier.parameters(), ours.parameters(), strict=True):
            assert of_ours.grad is not None
            parameter.copy_(of_ours.grad)
    carrier.save_pretrained(tmp_path / "gradients")
    got = load_file(tmp_path / "gradients" / "model.safetensors")
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        error = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert error <= TOLERANCE, f"{name}: off by {error:.1e} of its largest entry"


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_they_read_what_we_write(version: str, safe: bool, tmp_path: Path) -> None:
    ours = T5(T5Config(**SIZES | VERSIONS[version])).eval()
    ours.save_pretrained(tmp_path, safetensors=safe)
    theirs, given = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path), inputs()
    seen = given["decoder_attention_mask"]
    with torch.no_grad():
        assert_near(ours(**given)[seen], theirs(**given).logits[seen], "logits")
    again = T5.from_pretrained(tmp_path)
    assert again.config == ours.config
    for (name, got), expected in zip(again.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


def ending_of(ours: T5, given: dict[str, Tensor], at: int) -> int:
    """A token that the model does write, so that rows end at different lengths."""
    written = ours.generate(**given, max_new_tokens=12, end=None)
    return int(written[0, at])


@pytest.mark.parametrize("at", [2, 5])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_generated_tokens_are_theirs(version: str, beams: int, at: int, tmp_path: Path) -> None:
    ours, theirs = pair_of(version, tmp_path, num_decoder_layers=2)  # transformers' own cache fails at other depths
    given = {name: tensor for name, tensor in inputs().items() if not name.startswith("decoder")}
    end = ending_of(ours, given, at)
    more = {"num_beams": beams, "early_stopping": True} if beams > 1 else {}
    pad = 60  # their beams take 0 for none, and pad with the end
    expected = theirs.generate(**given, max_new_tokens=14, do_sample=False, eos_token_id=end, pad_token_id=pad, **more)
    got = ours.generate(**given, max_new_tokens=14, end=end, pad=pad, beams=beams)
    assert got.tolist() == expected.tolist()
    assert len({tuple(row) for row in got.tolist()}) > 1, "every row the same shows nothing"


@pytest.mark.parametrize("version", VERSIONS)
def test_decoding_by_cache_is_the_whole_computation(version: str, tmp_path: Path) -> None:
    ours, theirs = pair_of(version, tmp_path)
    given = inputs()
    seen = given["decoder_attention_mask"] = mask_of(T, [(0, T), (3, T), (4, T), (12, T)])
    with torch.no_grad():
        whole = ours(**given)
        memory, cache = ours.encode(given["input_ids"], given["attention_mask"]), ours.new_cache(T)
        steps, start = [], 0
        for count in (1, 1, 5, 1, 9):  # also several tokens at a time
            end = start + count
            tokens, mask = given["decoder_input_ids"][:, start:end], seen[:, :end]
            steps.append(ours.decode(tokens, memory, given["attention_mask"], mask, cache))
            start = end
    logits = torch.cat(steps, 1)
    assert_near(logits[seen], whole[seen], "steps")
    assert_near(logits[seen], theirs(**given).logits.detach()[seen], "theirs")


def test_head_that_the_weights_untie_is_read(tmp_path: Path) -> None:
    """transformers 5 writes tie_word_embeddings=true for every T5; that the outputs are not scaled says 1.1."""
    ours, theirs = pair_of("1.1", tmp_path)
    assert ours.lm_head is not None
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    assert not torch.equal(ours.lm_head.weight, ours.shared.weight)
    tied = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES | VERSIONS["1.1"]))
    tied.save_pretrained(tmp_path / "tied")
    assert T5.from_pretrained(tmp_path / "tied").lm_head is None
    changed, _ = pair_of("1.0", tmp_path / "one")
    weights = load_file(tmp_path / "one" / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected lm_head.weight to be shared.weight"):
        changed._take(weights | {"lm_head.weight": weights["shared.weight"] + 1}, (), ())


def test_oldest_folders_are_read(tmp_path: Path) -> None:
    """As the first T5 were published: every copy of the embeddings, a table that nothing reads, a short config."""
    theirs, given = theirs_of("1.0"), inputs()
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.randn(8, 3)}
    torch.save(theirs.state_dict() | unread, tmp_path / "pytorch_model.bin")
    said = SIZES | {"model_type": "t5", "architectures": ["T5WithLMHeadModel"], "n_positions": 512}
    said |= {"is_encoder_decoder": True, "task_specific_params": {"translation": {"prefix": "translate: "}}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    ours, seen = T5.from_pretrained(tmp_path), given["decoder_attention_mask"]
    with torch.no_grad():
        assert_near(ours(**given)[seen], theirs(**given).logits[seen], "logits")
    (tmp_path / "config.json").write_text(json.dumps(said | {"parallel_layers": True}))
    with pytest.raises(ValueError, match="parallel_layers: expected a key of T5Config"):
        T5.from_pretrained(tmp_path)


def test_what_is_not_a_t5_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="feed_forward_proj: expected"):
        T5(T5Config(**SIZES, feed_forward_proj="sharp-relu"))
    with pytest.raises(ValueError, match="feed_forward_proj"):
        T5(T5Config(**SIZES, feed_forward_proj="gated-cosine"))
    model, given = T5(T5Config(**SIZES)), inputs()
    with pytest.raises(ValueError, match=r"key_padding_mask: expected torch.bool \[4, 19\], got torch.bool \[4, 18\]"):
        model(given["input_ids"], given["decoder_input_ids"], given["attention_mask"][:, 1:])


def test_labels_are_shifted_as_theirs() -> None:
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100]])
    expected = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES))._shift_right(labels)
    assert torch.equal(T5(T5Config(**SIZES)).shifted(labels), expected)


def test_initial_weights_have_the_widths_of_theirs() -> None:
    sizes = SIZES | {"d_model": 64, "d_kv": 48, "d_ff": 256, "relative_attention_num_buckets": 64}
    ours = T5(T5Config(**sizes | VERSIONS["1.1"]))
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes | VERSIONS["1.1"]))
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        rule, names = ours._rule(name)
        for part, each in zip(rule.write(tensor, len(names), ours.config), names, strict=True):
            assert part.std() == pytest.approx(float(expected[each].std()), rel=0.3), name


# Learning: digits in order.


class Training:
    """All that a run has: what a checkpoint must hold."""

    def __init__(self, version: str, seed: int, dropout: float = 0.0) -> None:
        torch.manual_seed(seed)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": 13, "decoder_start_token_id": 2}
        config = T5Config(**SIZES | sizes | VERSIONS[version], dropout_rate=dropout)
        config.num_layers = config.num_decoder_layers = 1
        self.model = T5(config)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.003)

    def step(self) -> float:
        ids, mask, labels = problems(32)
        logits = self.model(ids, self.model.shifted(labels), mask)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in self.model.parameters())
        self.optimizer.step()
        return loss.item()


def problems(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """One to five digits, each once, padded, and the same in order with an end, after which nothing is asked."""
    length = torch.randint(1, 6, (batch, 1))
    mask = torch.arange(5) < length
    digits = torch.rand(batch, 10).argsort(1)[:, :5] + 3
    ordered = digits.masked_fill(~mask, 99).sort(1).values.masked_fill(~mask, -100)
    labels = torch.cat([ordered, torch.full((batch, 1), -100)], 1).scatter(1, length, 1)
    return digits.masked_fill(~mask, 0), mask, labels


@pytest.mark.parametrize("version", VERSIONS)
def test_it_learns_to_put_digits_in_order(version: str) -> None:
    run = Training(version, 0)
    losses = [run.step() for _ in range(150)]
    assert sum(losses[-10:]) < sum(losses[:10]) / 5
    ids, mask, labels = problems(64)
    run.model.eval()
    for beams in (1, 3):
        written = run.model.generate(ids, mask, max_new_tokens=6, beams=beams)[:, 1:]
        written = torch.nn.functional.pad(written, (0, 6 - written.shape[1]))
        right = (written == labels.clamp(min=0)).all(1).float().mean()
        assert right > 0.9, beams


def test_resumed_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    run = Training("1.1", 1, dropout=0.1)
    for _ in range(3):
        run.step()
    states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(states | {"random": torch.get_rng_state()}, tmp_path / "checkpoint.pt")
    straight = [run.step() for _ in range(3)]
    resumed, saved = Training("1.1", 2, dropout=0.1), torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    assert [resumed.step() for _ in range(3)] == straight
    for (name, got), expected in zip(resumed.model.state_dict().items(), run.model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name


# The attention alone.


def formula(
    module: fastseq.T5Attention, x: Tensor, memory: Tensor | None, table: Tensor | None, seen: Tensor
) -> Tensor:
    """softmax(q k + bias) v with a whole matrix of scores; the table is given per pair of positions."""
    source = x if memory is None else memory
    q, k, v = (
        (t @ w.T).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        for t, w in zip((x, source, source), module.in_proj_weight.chunk(3), strict=True)
    )
    scores = q @ k.mT + (0 if table is None else table)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ module.out_proj.weight.T


@pytest.mark.parametrize("kind", ["encoder", "decoder", "memory"])
def test_attention_is_the_formula(kind: str) -> None:
    exact = fastseq.T5Attention(12, num_heads=3, head_dim=5, dtype=torch.float64)
    table = torch.randn(8, 3, dtype=torch.float64)
    x, memory = (torch.randn(2, length, 12, dtype=torch.float64) for length in (33, 21))
    padding = torch.zeros(2, 21 if kind == "memory" else 33, dtype=torch.bool)
    padding[1, -7:] = True
    seen = ~padding[:, None, None]
    if kind == "decoder":
        seen = seen & torch.ones(33, 33, dtype=torch.bool).tril()
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    apart = torch.arange(33) - torch.arange(33)[:, None]
    bucket = theirs(apart, bidirectional=kind == "encoder", num_buckets=8, max_distance=20)
    given = memory if kind == "memory" else None

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        module = copy.deepcopy(exact).to(dtype)
        own = table.to(dtype, copy=True).requires_grad_()
        inputs = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (x, given)]
        if ours:
            bias = fastseq.bias.T5(own, bidirectional=kind == "encoder", max_distance=20)
            out = module(
                *inputs, bias=None if kind == "memory" else bias, key_padding_mask=padding, causal=kind == "decoder"
            )
        else:
            out = formula(module, *inputs, None if kind == "memory" else own[bucket].permute(2, 0, 1), seen)
        out.sin().sum().backward()
        leaves = [*(t for t in inputs if t is not None), *module.parameters(), *([] if kind == "memory" else [own])]
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    results = zip(run(torch.float32, True), run(torch.float64, False), run(torch.float32, False), strict=True)
    for number, (got, wanted, peer) in enumerate(results):
        assert_within_budget(got, wanted, peer, f"result {number}")


def test_cache_of_the_attention_grows_and_stays() -> None:
    attention = fastseq.T5Attention(16, num_heads=4)
    table = torch.randn(8, 4)
    bias = fastseq.bias.T5(table, bidirectional=False, max_distance=10)
    x, memory = torch.randn(2, 14, 16), torch.randn(2, 6, 16)
    growing, filled = fastseq.KVCache(max_length=14), fastseq.KVCache()
    with torch.no_grad():
        whole, across = attention(x, bias=bias, causal=True), attention(x, memory)
        own = [attention(part, bias=bias, cache=growing) for part in x.split([1, 1, 6, 5, 1], 1)]
        its = [attention(part, memory, cache=filled) for part in x.split(7, 1)]
    torch.testing.assert_close(torch.cat(own, 1), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat(its, 1), across, atol=1e-6, rtol=1e-5)
    assert (growing.length, filled.length) == (14, 6)


def test_dropout_is_for_training() -> None:
    attention, x = fastseq.T5Attention(16, num_heads=4, dropout=0.5), torch.randn(2, 9, 16)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_explanation_names_what_runs() -> None:
    attention, x = fastseq.T5Attention(16, num_heads=4), torch.zeros(1, 3, 16)
    table = torch.zeros(8, 4)
    assert fastseq.explain(attention, x).name == fastseq.explain(attention, x, x, causal=True).name == "torch"
    with fastseq.use("reference"):
        assert fastseq.explain(attention, x, bias=fastseq.bias.T5(table)).name == "reference"


def test_lengths_of_zero() -> None:
    model, ids = T5(T5Config(**SIZES)).eval(), torch.randint(2, 61, (2, 7))
    assert model(ids[:, :0], ids).shape == (2, 7, 61)
    assert model(ids, ids[:, :0]).shape == (2, 0, 61)
    assert model(ids[:0], ids[:0]).shape == (0, 7, 61)


def test_bfloat16_is_no_worse_than_theirs(tmp_path: Path) -> None:
    ours, theirs = pair_of("1.1", tmp_path)
    given = inputs()
    seen = given["decoder_attention_mask"]
    half = T5.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        got, exact, peer = half(**given), ours.double()(**given), theirs.bfloat16()(**given).logits
    assert_within_budget(got[seen], exact[seen], peer[seen], "logits")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.float()(**given).dtype == torch.bfloat16


def test_errors_of_the_attention_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim=16, got 3"):
        fastseq.T5Attention(16, num_heads=3)
    attention, x = fastseq.T5Attention(16, num_heads=4), torch.randn(2, 9, 16)
    with pytest.raises(ValueError, match=r"x: expected \[B, T, 16\] of one batch, got \[2, 9, 8\]"):
        attention(x[..., :8])
    with pytest.raises(ValueError, match=r"memory: expected \[B, T, 16\] of one batch, got \[1, 9, 16\]"):
        attention(x, x[:1])
    with pytest.raises(ValueError, match=r"key_padding_mask: expected torch.bool \[2, 9\], got torch.float32"):
        attention(x, key_padding_mask=torch.zeros(2, 9))
