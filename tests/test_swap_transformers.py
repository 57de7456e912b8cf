"""Laws of swap on models that transformers built: the same numbers before, after, and as before once restored."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq.models import permutation

from .support.models import assert_same, randomise

transformers = pytest.importorskip("transformers", minversion="5.15")

B, T, WORDS = 2, 9, 41
TOKENS: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **TOKENS,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, attn_pdrop=0.0, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def t5(kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        d_model=24, d_kv=6, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=6, **TOKENS,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def mt5() -> Any:
    return t5("MT5")


def xlnet(**options: Any) -> Any:
    config = transformers.XLNetConfig(
        d_model=24, n_layer=2, n_head=4, d_inner=37, dropout=0.0, **options, **TOKENS
    )  # fmt: skip
    return transformers.XLNetLMHeadModel(config)


def conformer() -> Any:
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, hidden_dropout=0.0,
        attention_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, conv_dim=(8, 8), conv_stride=(3, 2),
        conv_kernel=(5, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=3, mask_time_prob=0.0, vocab_size=WORDS, max_source_positions=4,
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerForCTC(config)


def words(*shape: int) -> Tensor:
    return torch.randint(3, WORDS, shape or (B, T))


def texts() -> dict[str, Tensor]:
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": words(), "attention_mask": mask}


def of_both() -> dict[str, Tensor]:
    return {**texts(), "decoder_input_ids": words(B, 5)}


def guessing() -> dict[str, Any]:
    """Two streams with memories, texts and an order, and weights asked for."""
    order, targets = permutation(B, T, 3)
    hidden = (order[:, None] > order[:, :, None]) | torch.eye(T, dtype=torch.bool)
    return {
        "input_ids": words(),
        "perm_mask": hidden.float(),
        "target_mapping": nn.functional.one_hot(targets, T).float(),
        "token_type_ids": torch.randint(3, (B, T)),
        "mems": [torch.randn(4, B, 24) for _ in range(2)],
        "use_mems": True,
    }


CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "bert": (bert, texts),
    "gpt2": (gpt2, texts),
    "t5": (t5, of_both),
    "mt5": (mt5, of_both),
    "xlnet": (xlnet, texts),
    "xlnet with two streams": (xlnet, guessing),
    "xlnet one way": (lambda: xlnet(attn_type="uni", same_length=True), lambda: {"input_ids": words()}),
    "conformer": (conformer, lambda: {"input_values": torch.randn(B, 120)}),
}


def build(case: str, implementation: str = "eager") -> tuple[Any, dict[str, Any]]:
    model, inputs = CASES[case]
    torch.manual_seed(0)
    built = randomise(model()).eval()
    if not case.startswith("xlnet"):
        built.set_attn_implementation(implementation)
    return built, inputs()


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    return [leaf for part in tree for leaf in tensors(part)] if hasattr(tree, "__iter__") else []


def results(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """The logits that are not padding's, and the gradients that they send."""
    model.zero_grad()
    output = model(**copy.deepcopy(given))
    shown = given.get("attention_mask")
    logits = output.logits if shown is None or output.logits.shape[:2] != shown.shape else output.logits[shown.bool()]
    torch.manual_seed(3)
    logits.backward(torch.randn_like(logits))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def implementations(model: Any) -> set[str]:
    return {m.config._attn_implementation for m in model.modules() if isinstance(m, transformers.PreTrainedModel)}


@pytest.mark.parametrize("before", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_swap_changes_no_number_and_restore_changes_nothing(case: str, before: str) -> None:
    model, given = build(case, before)
    if case.startswith("xlnet") and before == "sdpa":
        pytest.skip("XLNet has one attention only")
    kinds = [type(m) for m in model.modules()]
    state = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    text, configuration = repr(model), model.config.to_dict()
    expected, was = results(model, given), implementations(model)

    report = fastseq.swap(model)
    assert report
    assert not report.kept, report
    got = results(model, given)
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        # A key's bias moves all scores of a row alike: its gradient is zero, but for rounding.
        zero = name.endswith(("key.bias", "linear_k.bias"))
        largest = expected["logits" if zero or name == "logits" else name].abs().max()
        assert (got[name] - b).abs().max() <= 1e-5 * largest, f"{name} of {case}"
    assert repr(model) == text
    assert model.config.to_dict() == configuration
    assert all(id(p) == state[name][0] for name, p in model.named_parameters())

    again = fastseq.restore(model)
    assert len(again) == len(report)
    assert [(row.name, row.after, row.before) for row in again.swapped] == list(report.swapped)
    assert [type(m) for m in model.modules()] == kinds
    assert implementations(model) == was
    assert all(torch.equal(a, expected[name]) for name, a in results(model, given).items())
    assert not any("fastseq" in name for m in model.modules() for name in vars(m))


@pytest.mark.parametrize("case", CASES)
def test_weights_and_states_are_served(case: str) -> None:
    model, given = build(case)
    options = {"output_attentions": True, "output_hidden_states": True}
    expected = model(**copy.deepcopy(given), **options)
    fastseq.swap(model)
    got = model(**copy.deepcopy(given), **options)
    assert got.keys() == expected.keys()
    shown = given.get("attention_mask", torch.ones(B, T)).bool()
    for key in expected:
        for a, b in zip(tensors(got[key]), tensors(expected[key]), strict=True):
            if a.dim() == 4 and a.shape[2] == T and key != "past_key_values":  # the weights of padding mean nothing
                a, b = a.transpose(1, 2)[shown], b.transpose(1, 2)[shown]
            elif a.shape[:2] == shown.shape and a.shape[1] == T:
                a, b = a[shown], b[shown]
            elif key == "past_key_values":
                continue
            assert_same(a, b, f"{key} of {case}")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("case", ["gpt2", "t5", "xlnet"])
def test_generates_token_for_token(case: str, cache: str | None) -> None:
    model, _ = build(case)
    if case == "xlnet" and cache:
        pytest.skip("it has memories, not caches")
    prompt = words(B, 4)
    options: dict[str, Any] = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    options |= {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(prompt, **options)
    fastseq.swap(model)
    assert torch.equal(model.generate(prompt, **options), expected)


def test_report_says_what_was_done() -> None:
    model = nn.ModuleDict({"text": bert(), "sound": nn.LSTM(2, 3), "other": t5(), "order": xlnet()})
    report = fastseq.swap(model)
    rows = {row.name: row for row in report.swapped}
    assert rows["text"][1:] == ('attention "sdpa"', 'attention "fastseq"')
    assert rows["sound"].after is fastseq.LSTM
    assert rows["other.encoder.block.0.layer.0.SelfAttention"].after.__module__ == "fastseq.huggingface.t5"
    assert rows["order.transformer.layer.1.rel_attn"].before.__module__ == "transformers.models.xlnet.modeling_xlnet"
    lines = str(report).splitlines()
    assert any(line.split() == ["text", "attention", '"sdpa"', "->", "attention", '"fastseq"'] for line in lines)
    assert lines[-1] == f"{len(report)} swapped, 0 kept"
    twice = fastseq.swap(model)
    assert not twice
    assert {row.reason for row in twice.kept} == {"already fastseq's", "its attention is already fastseq's"}


def test_what_cannot_be_turned_is_kept_with_a_reason() -> None:
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_local_experts=2, num_experts_per_tok=1, vocab_size=WORDS, pad_token_id=0,
    )  # fmt: skip
    (kept,) = fastseq.swap(transformers.GptOssModel(config)).kept
    assert "attention sinks" in kept.reason
    (kept,) = fastseq.swap(transformers.ReformerModel(reformer())).kept
    assert "lets no attention be chosen" in kept.reason
    built = transformers.BertModel(bert().config)
    built.set_attn_implementation("fastseq")
    (kept,) = fastseq.restore(built).kept
    assert "was not set to fastseq's by a swap" in kept.reason


def reformer() -> Any:
    return transformers.ReformerConfig(
        vocab_size=WORDS, hidden_size=16, attention_head_size=8, num_attention_heads=2, num_hidden_layers=1,
        attn_layers=["local"], axial_pos_embds_dim=[8, 8], axial_pos_shape=[4, 4],
    )  # fmt: skip


def test_old_transformers_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.14.2")
    (kept,) = fastseq.swap(model).kept
    assert "transformers >= 5.15" in kept.reason


@pytest.mark.parametrize("case", ["bert", "t5", "xlnet with two streams"])
def test_copies_and_pickles_stay_swapped_and_can_be_restored(case: str) -> None:
    model, given = build(case)
    expected = model(**copy.deepcopy(given)).logits
    fastseq.swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for each in copies:
        assert_same(each(**copy.deepcopy(given)).logits, expected, "logits")
        assert fastseq.restore(each)
        assert torch.equal(each(**copy.deepcopy(given)).logits, expected)


def test_t5_chosen_otherwise_after_a_swap_works() -> None:
    """The bias is an object only as long as the attention is fastseq's."""
    model, given = build("t5")
    expected = model(**given).logits
    fastseq.swap(model)
    model.set_attn_implementation("eager")
    assert torch.equal(model(**given).logits, expected)


def test_t5_makes_no_tensor_as_large_as_the_scores() -> None:
    model, _ = build("t5")
    fastseq.swap(model)
    seen: list[Any] = []
    for attention in model.modules():
        if type(attention).__name__ == "T5Attention":
            attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model(**of_both())
    assert len(seen) == 6
    assert {type(each) for each in seen} == {fastseq.bias.T5, float}


def test_t5_learns_with_checkpoints() -> None:
    model, given = build("t5")
    fastseq.swap(model)
    expected = results(model.train(), given)
    model.activation_checkpointing_enable()
    for name, got in results(model, given).items():
        torch.testing.assert_close(got, expected[name])


def test_transformers_is_imported_for_its_models_only() -> None:
    code = (
        "import sys, torch, fastseq; fastseq.swap(torch.nn.LSTM(2, 3)); fastseq.restore(torch.nn.LSTM(2, 3));"
        "print(any(name.split('.')[0] == 'transformers' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
