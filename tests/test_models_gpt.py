"""Laws of GPT-2: transformers' numbers from the same folder, with caches and padding, and the same texts written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import models

from .support.budget import assert_within_budget
from .support.models import assert_same, assert_same_gradients, characters, edit_config, outputs_of, randomise, trained

transformers = pytest.importorskip("transformers", minversion="5.15")

B, T, WORDS, LONGEST, END, PAD = 3, 9, 41, 32, 7, 40
SMALL = {"vocab_size": WORDS, "n_positions": LONGEST, "n_embd": 24, "n_layer": 3, "n_head": 4}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"n_embd": 48, "n_head": 2, "n_layer": 1, "n_inner": 50},
    "other": {"activation_function": "relu", "layer_norm_epsilon": 1e-3, "n_head": 6},
}


def theirs_and_ours(folder: Path, name: str = "GPT2LMHeadModel", safe: bool = True, **config: Any) -> tuple[Any, Any]:
    """A random model of transformers, and ours read from the folder that it was saved in."""
    said = {**SMALL, **STILL, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": PAD, **config}
    theirs = randomise(getattr(transformers, name)(transformers.GPT2Config(**said)).eval())
    if safe:
        theirs.save_pretrained(folder)
    else:
        theirs.config.save_pretrained(folder)
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    return theirs, getattr(models, name).from_pretrained(folder)


def texts(left: bool = True) -> tuple[Tensor, Tensor]:
    """Texts of different lengths, and where they are."""
    mask = torch.ones(B, T, dtype=torch.int64)
    for row, length in enumerate((T, 5, 7)):
        mask[row, slice(0, T - length) if left else slice(length, T)] = 0
    return torch.randint(WORDS - 1, (B, T)).masked_fill(mask == 0, PAD), mask


@pytest.mark.parametrize("name", ["GPT2Model", "GPT2LMHeadModel"])
@pytest.mark.parametrize("config", CONFIGS)
def test_states_logits_and_gradients_are_theirs(tmp_path: Path, name: str, config: str) -> None:
    theirs, ours = theirs_and_ours(tmp_path, name, **CONFIGS[config])
    base, ours_base = (getattr(model, "transformer", model) for model in (theirs, ours))
    tokens, left = texts()
    _, right = texts(left=False)
    counted = (left.cumsum(1) - 1).clamp(min=0)
    cases = [{}, {"attention_mask": right}, {"attention_mask": left, "position_ids": counted}]
    for given in cases:
        theirs.zero_grad()
        ours.zero_grad()
        expected, states = outputs_of([*base.h, base.ln_f], lambda given=given: theirs(tokens, **given))
        got, our_states = outputs_of(
            [*ours_base.encoder.layers, ours_base.encoder.norm], lambda given=given: ours(tokens, **given)
        )
        meant = given.get("attention_mask", torch.ones_like(tokens)) == 1  # at padding there is nothing to compare
        for i, (one, other) in enumerate(zip(our_states, states, strict=True)):
            assert_same(one[meant], other[meant], f"states after layer {i}")
        expected = (expected.logits if name == "GPT2LMHeadModel" else expected.last_hidden_state)[meant]
        assert_same(got[meant], expected, "result")
        direction = torch.randn_like(expected)
        got[meant].backward(direction)
        expected.backward(direction)
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", ["GPT2Model", "GPT2LMHeadModel"])
@pytest.mark.parametrize("safe", [True, False])
def test_folders_are_read_both_ways(tmp_path: Path, name: str, safe: bool) -> None:
    theirs, ours = theirs_and_ours(tmp_path, name, safe)
    ours.save_pretrained(tmp_path / "back", safetensors=safe)
    returned, report = getattr(transformers, name).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    for (key, got), (_, expected) in zip(returned.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(got, expected), key
    again = type(ours).from_pretrained(tmp_path / "back")
    assert again.config == ours.config
    for key, got in again.state_dict().items():
        assert torch.equal(got, ours.state_dict()[key]), key


def test_a_model_with_a_head_and_one_without_read_each_other(tmp_path: Path) -> None:
    _, headed = theirs_and_ours(tmp_path)
    base = models.GPT2Model.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    tokens, _ = texts()
    assert torch.equal(models.GPT2LMHeadModel.from_pretrained(tmp_path / "base")(tokens), headed(tokens))


def test_files_as_published_are_read(tmp_path: Path) -> None:
    """Names without the head's prefix, the causal mask among the weights, and a configuration of 2019."""
    theirs, _ = theirs_and_ours(tmp_path, "GPT2Model", safe=False)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    for i in range(3):
        weights[f"h.{i}.attn.bias"] = torch.ones(LONGEST, LONGEST).tril()[None, None]
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    edit_config(
        tmp_path, n_ctx=LONGEST, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
        summary_type="cls_index", task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    )  # fmt: skip
    tokens, _ = texts()
    logits = theirs(tokens).last_hidden_state @ theirs.wte.weight.T
    assert_same(models.GPT2LMHeadModel.from_pretrained(tmp_path)(tokens), logits, "logits")


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * T, [4, 1, 4], [T - 1, 1]])
def test_caches_give_what_theirs_give(tmp_path: Path, sizes: list[int]) -> None:
    theirs, ours = theirs_and_ours(tmp_path)
    tokens, mask = texts()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, past, held = ours.transformer.new_cache(T), transformers.DynamicCache(config=theirs.config), 0
    whole = ours(tokens, mask, positions)
    for size in sizes:
        part = slice(held, held + size)
        held += size
        given = (tokens[:, part], mask[:, :held], positions[:, part])
        got = ours(*given, cache=cache)
        expected = theirs(given[0], attention_mask=given[1], position_ids=given[2], past_key_values=past).logits
        meant = mask[:, part] == 1
        assert_same(got[meant], expected[meant], f"logits to {held}")
        assert_same(got[meant], whole[:, part][meant], f"logits to {held} at once")


# ------------------------------------------------------------------------------------------------------ texts


def continued(theirs: Any, tokens: Tensor, mask: Tensor | None, new: int, **options: Any) -> Tensor:
    """What transformers writes."""
    mask = torch.ones_like(tokens) if mask is None else mask
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "max_new_tokens": new, **options}
    return theirs.generate(tokens, attention_mask=mask, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_texts_are_theirs(tmp_path: Path, seed: int, padded: bool) -> None:
    torch.manual_seed(seed)
    theirs, ours = theirs_and_ours(tmp_path)
    tokens, mask = texts()
    mask = mask if padded else None
    got = ours.generate(tokens, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(got, continued(theirs, tokens, mask, 20))
    end = int(got[0, T + 4])  # a token that surely comes
    got = ours.generate(tokens, attention_mask=mask, max_new_tokens=20, end=end, pad=PAD)
    assert torch.equal(got, continued(theirs, tokens, mask, 20, eos_token_id=end))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5, -1.0])
def test_beams_are_theirs(tmp_path: Path, seed: int, length_penalty: float) -> None:
    torch.manual_seed(seed)
    theirs, ours = theirs_and_ours(tmp_path)
    tokens, mask = texts()
    mask = mask if seed % 2 else None
    written = ours.generate(tokens, attention_mask=mask, max_new_tokens=12, beams=4)
    assert torch.equal(written, continued(theirs, tokens, mask, 12, num_beams=4, early_stopping=True))
    for at in (2, 6):
        end = int(written[0, T + at])
        got = ours.generate(
            tokens, attention_mask=mask, max_new_tokens=12, beams=4, end=end, pad=PAD, length_penalty=length_penalty
        )
        expected = continued(
            theirs, tokens, mask, 12,
            num_beams=4, early_stopping=True, eos_token_id=end, length_penalty=length_penalty,
        )  # fmt: skip
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.5, "top_k": 9, "top_p": 0.8}]
)
def test_tokens_are_drawn_from_their_distribution(options: dict[str, Any]) -> None:
    logits = torch.randn(64, WORDS) * 3
    warpers = transformers.LogitsProcessorList()
    for key, warper in (
        ("temperature", transformers.TemperatureLogitsWarper),
        ("top_k", transformers.TopKLogitsWarper),
        ("top_p", transformers.TopPLogitsWarper),
    ):
        if key in options:
            warpers.append(warper(options[key]))
    expected = warpers(None, logits.clone()).softmax(-1)
    got = models.probabilities(logits, **options)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_drawn_texts_are_theirs(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(tmp_path)
    tokens, mask = texts()
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(5)
    got = ours.generate(tokens, attention_mask=mask, max_new_tokens=20, **options)
    torch.manual_seed(5)
    assert torch.equal(got, continued(theirs, tokens, mask, 20, do_sample=True, **options))


def test_what_others_in_the_batch_say_does_not_matter(tmp_path: Path) -> None:
    _, ours = theirs_and_ours(tmp_path)
    tokens, mask = texts()
    for options in ({}, {"beams": 3}):
        together = ours.generate(tokens, attention_mask=mask, max_new_tokens=10, **options)
        for row in range(B):
            alone = ours.generate(tokens[row : row + 1, mask[row] == 1], max_new_tokens=10, **options)
            assert torch.equal(together[row, T:], alone[0, -10:])


# ------------------------------------------------------------------------------------------------ as a module


@pytest.mark.parametrize("of", list(STILL))
def test_dropout_is_where_theirs_is(tmp_path: Path, of: str) -> None:
    """All or nothing is dropped, which is no matter of chance."""
    theirs, ours = theirs_and_ours(tmp_path, **{of: 1.0})
    tokens, _ = texts()
    still = ours(tokens)
    got = ours.train()(tokens)
    assert_same(got, theirs.train()(tokens).logits, of)
    assert (got - still).abs().max() > 1e-2
    assert torch.equal(ours.eval()(tokens), still)
    for layer in ours.train().transformer.encoder.layers:  # where torch's layers have one more
        assert torch.equal(layer.dropout(still), still)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_theirs_at_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs, ours = theirs_and_ours(tmp_path)
    tokens, _ = texts()
    with torch.no_grad():
        exact, peer = theirs.double()(tokens).logits, theirs.to(dtype)(tokens).logits
        got = type(ours).from_pretrained(tmp_path, dtype=dtype)(tokens)
    assert_within_budget(got, exact, peer, "logits")


def test_learns_to_spell_and_resumes_to_the_bit() -> None:
    (lines,) = characters(32, "LICENSE")
    config = models.GPT2Config(vocab_size=128, n_positions=32, n_embd=48, n_layer=2, n_head=4, initializer_range=0.1)

    def loss(model: Any) -> Tensor:
        batch = lines[torch.randint(len(lines), (16,))]
        return torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    # Who guesses without having read loses 3.1, the entropy of the characters.
    assert trained(lambda: models.GPT2LMHeadModel(config), loss) < 2.7


def test_compiles_as_one_graph() -> None:
    model = randomise(models.GPT2LMHeadModel(models.GPT2Config(**SMALL))).eval()
    tokens, _ = texts()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(tokens), model(tokens), "compiled")


def test_device_and_dtype_are_those_asked_for(tmp_path: Path) -> None:
    model = models.GPT2LMHeadModel(models.GPT2Config(**SMALL), device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    models.GPT2LMHeadModel(models.GPT2Config(**SMALL)).save_pretrained(tmp_path)
    model = models.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert model(torch.tensor([[1, 2]])).dtype == torch.float64
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, beams=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("activation_function", "quick_gelu"),
    ],
)
def test_other_mathematics_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    models.GPT2Model(models.GPT2Config(**SMALL)).save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"{key}: expected .*, got {value!r}"):
        models.GPT2Model.from_pretrained(tmp_path)


def test_what_cannot_be_written_is_refused() -> None:
    model = models.GPT2LMHeadModel(models.GPT2Config(**SMALL)).eval()
    tokens, right = texts(left=False)
    with pytest.raises(ValueError, match="input_ids: expected at most n_positions=32 tokens, got 33"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match="max_new_tokens: expected at most 24 with this n_positions, got 25"):
        model.generate(tokens, max_new_tokens=LONGEST - T + 2)
    with pytest.raises(ValueError, match="attention_mask: expected padding on the left"):
        model.generate(tokens, attention_mask=right, max_new_tokens=1)
