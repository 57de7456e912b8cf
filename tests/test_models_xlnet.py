"""Laws of XLNet: transformers' numbers from the same folder, with both streams, memories and segments, and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.models import XLNetConfig, XLNetLMHeadModel, XLNetModel, permutation

from .support.models import assert_same, assert_same_gradients, edit_config, randomise

transformers = pytest.importorskip("transformers", minversion="5.15")

B, T, WORDS = 3, 9, 41
SMALL: dict[str, Any] = {"vocab_size": WORDS, "d_model": 24, "n_layer": 3, "n_head": 4, "d_inner": 37, "dropout": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clamped": {"clamp_len": 3, "ff_activation": "relu"},
    "remembers little": {"mem_len": 5, "layer_norm_eps": 1e-6},
    "remembers the first": {"mem_len": None, "reuse_len": 4, "n_head": 3, "ff_activation": "gelu_new"},
}
ONE_WAY: dict[str, dict[str, Any]] = {
    "uni": {"attn_type": "uni"},
    "uni, same length": {"attn_type": "uni", "same_length": True},
    "uni, clamped": {"attn_type": "uni", "clamp_len": 2, "mem_len": 7},
}


def theirs_and_ours(folder: Path, kind: str = "XLNetLMHeadModel", **config: Any) -> tuple[Any, Any]:
    theirs = getattr(transformers, kind)(transformers.XLNetConfig(**{**SMALL, **config})).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)
    return theirs, {"XLNetLMHeadModel": XLNetLMHeadModel, "XLNetModel": XLNetModel}[kind].from_pretrained(folder)


def words() -> Tensor:
    return torch.randint(WORDS, (B, T))


def padding() -> Tensor:
    mask = torch.ones(B, T)
    mask[0, :3], mask[2, 7:] = 0, 0
    return mask


def mask_of(order: Tensor) -> Tensor:
    """What an order hides, as transformers is told: from a guess its own token as well."""
    return ((order[:, None] > order[:, :, None]) | torch.eye(T, dtype=torch.bool)).float()


def mapping_of(targets: Tensor) -> Tensor:
    return F.one_hot(targets, T).float()


def compare(theirs: Any, ours: Any, given: dict[str, Any], told: Any = None, shown: Any = None) -> Any:
    """Every layer's states of both streams, the logits and all gradients; what both remember is returned.

    ``told`` is what ours is told in other words, ``shown`` which tokens are no padding.
    """
    expected, their_layers = outputs_of_both(theirs.transformer.layer, lambda: theirs(**given))
    got, our_layers = outputs_of_both(ours.transformer.layers, lambda: ours(**(given if told is None else told)))
    for number, (one, other) in enumerate(zip(our_layers, their_layers, strict=True)):
        for stream in (0, 1):
            if other[stream] is not None:
                a, b = one[stream], other[stream].transpose(0, 1)
                rows = shown if shown is not None and a.shape[:2] == shown.shape else torch.ones(a.shape[:2]).bool()
                assert_same(a[rows], b[rows], f"layer {number}, stream {stream}")
    logits = expected.logits
    rows = shown if shown is not None and logits.shape[:2] == shown.shape else torch.ones(logits.shape[:2]).bool()
    assert_same(got.output[rows], logits[rows], "logits")
    for model in (theirs, ours):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    direction = torch.randn_like(logits[rows])
    logits[rows].backward(direction)
    got.output[rows].backward(direction)
    assert_same_gradients(ours, theirs)
    return expected.mems, got.memory


def outputs_of_both(layers: Any, call: Any) -> tuple[Any, list[tuple[Tensor, ...]]]:
    seen: list[tuple[Tensor, ...]] = []
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in layers]
    try:
        return call(), seen
    finally:
        for handle in handles:
            handle.remove()


def assert_same_memory(theirs: Any, ours: Any) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert_same(b, a.transpose(0, 1), "memory")
        assert not b.requires_grad


@pytest.mark.parametrize("config", [*CONFIGS, *ONE_WAY])
def test_three_texts_with_their_memories_are_theirs(tmp_path: Path, config: str) -> None:
    theirs, ours = theirs_and_ours(tmp_path, **{**CONFIGS, **ONE_WAY}[config])
    mems = memory = None
    for types in (None, torch.randint(3, (B, T)), torch.randint(2, (B, T))):
        given = {"input_ids": words(), "token_type_ids": types}
        expected, memory = compare(theirs, ours, {**given, "mems": mems}, {**given, "memory": memory})
        assert_same_memory(expected, memory)
        mems = list(expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_both_streams_with_memories_are_theirs(tmp_path: Path, config: str) -> None:
    """Told by masks, every number is theirs, at padding too."""
    theirs, ours = theirs_and_ours(tmp_path, **CONFIGS[config])
    mems = memory = None
    for _ in range(3):
        order, targets = permutation(B, T, 4)
        given = {"input_ids": words(), "perm_mask": mask_of(order), "target_mapping": mapping_of(targets)}
        given |= {"token_type_ids": torch.randint(2, (B, T)), "attention_mask": padding()}
        expected, memory = compare(theirs, ours, {**given, "mems": mems}, {**given, "memory": memory})
        assert_same_memory(expected, memory)
        mems = list(expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_order_says_what_a_mask_says(tmp_path: Path, config: str) -> None:
    theirs, ours = theirs_and_ours(tmp_path, **CONFIGS[config])
    mems = memory = None
    for _ in range(2):
        order, targets = permutation(B, T, 4)
        same = {"input_ids": words(), "token_type_ids": torch.randint(2, (B, T))}
        given = {**same, "perm_mask": mask_of(order), "target_mapping": mapping_of(targets), "mems": mems}
        told = {**same, "order": order, "target_mapping": targets, "memory": memory}
        expected, memory = compare(theirs, ours, given, told)
        assert_same_memory(expected, memory)
        mems = list(expected)


def test_padding_and_guesses_without_an_order(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(tmp_path)
    given = {"input_ids": words(), "attention_mask": padding()}
    compare(theirs, ours, given, shown=padding().bool())
    targets = torch.tensor([[4, 6], [0, 8], [1, 2]])
    given |= {"target_mapping": mapping_of(targets)}
    compare(theirs, ours, given, shown=padding().bool())
    compare(theirs, ours, given, {**given, "target_mapping": targets}, shown=padding().bool())


def test_a_mask_without_guesses(tmp_path: Path) -> None:
    theirs, ours = theirs_and_ours(tmp_path)
    compare(theirs, ours, {"input_ids": words(), "perm_mask": (torch.rand(B, T, T) < 0.5).float()})


@pytest.mark.parametrize("kind", ["XLNetLMHeadModel", "XLNetModel"])
def test_folders_are_read_both_ways(tmp_path: Path, kind: str) -> None:
    theirs, ours = theirs_and_ours(tmp_path, kind, **CONFIGS["remembers the first"])
    ours.save_pretrained(tmp_path / "back")
    returned, report = getattr(transformers, kind).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    for (name, got), (_, expected) in zip(returned.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(got, expected), name
    again = type(ours).from_pretrained(tmp_path / "back")
    assert again.config == ours.config
    assert all(torch.equal(got, ours.state_dict()[name]) for name, got in again.state_dict().items())
    other = XLNetModel if kind == "XLNetLMHeadModel" else XLNetLMHeadModel
    other.from_pretrained(tmp_path, **{"unread" if other is XLNetModel else "fresh": ["lm_loss", "bias"]})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mem_len", [None, 4])
def test_generates_token_for_token(tmp_path: Path, mem_len: int | None, beams: int) -> None:
    theirs, ours = theirs_and_ours(tmp_path, mem_len=mem_len)
    with torch.no_grad():  # a text that does not repeat itself
        for model in (theirs.transformer.word_embedding, ours.transformer.word):
            model.weight.mul_(6)
    prompt = torch.randint(6, WORDS, (B, 4))
    options = {"num_beams": beams, "early_stopping": True} if beams > 1 else {}
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=12, **options)
    got = ours.generate(prompt, max_new_tokens=12, end=2, pad=5, beams=beams)
    assert len(expected.unique()) > 6
    assert torch.equal(got, expected)


def test_memory_is_of_the_first_segment(tmp_path: Path) -> None:
    model = randomise(XLNetModel(XLNetConfig(**SMALL))).eval()
    _, memory = model(words())
    now, zeros = words(), torch.zeros(B, T, dtype=torch.int64)
    assert_same(model(now, memory=memory).output, model(now, memory=memory, token_type_ids=zeros).output, "states")
    other = model(now, memory=memory, token_type_ids=zeros + 1).output
    assert (other - model(now, memory=memory).output).abs().max() > 1e-3


def test_a_permutation_guesses_what_it_does_not_see() -> None:
    order, targets = permutation(50, T, 4)
    guessed = torch.zeros(50, T).scatter(1, targets, 1.0).bool()
    assert (guessed.sum(1) == 4).all()
    assert torch.equal(order > 0, guessed)
    assert torch.equal(order.gather(1, targets), torch.arange(1, 5).expand(50, -1))
    with pytest.raises(ValueError, match="targets: expected at most T=9, got 10"):
        permutation(1, T, 10)


@pytest.mark.parametrize(
    ("key", "value"), [("bi_data", True), ("untie_r", False), ("attn_type", "both"), ("ff_activation", "mish")]
)
def test_other_mathematics_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    XLNetModel(XLNetConfig(**SMALL)).save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"{key}: expected .*, got {value!r}"):
        XLNetModel.from_pretrained(tmp_path)


def test_an_order_and_a_mask_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="order, perm_mask: expected one of the two"):
        XLNetModel(XLNetConfig(**SMALL))(words(), order=torch.zeros(B, T), perm_mask=torch.zeros(B, T, T))


def test_it_learns_to_guess_in_any_order() -> None:
    """Words that rise by one from left to right: any one of them tells all others."""
    torch.manual_seed(0)
    rows, length, most = 16, 8, 16
    sizes: dict[str, Any] = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}
    model = XLNetLMHeadModel(XLNetConfig(most, **sizes, dropout=0.0, initializer_range=0.1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def loss() -> Tensor:
        ids = (torch.randint(most, (rows, 1)) + torch.arange(length)) % most
        order, targets = permutation(rows, length, 4)
        logits, _ = model(ids, order=order, target_mapping=targets)
        return F.cross_entropy(logits.mT, ids.gather(1, targets))

    assert loss() > 2.0  # log 16 = 2.8
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 1.0


def test_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def step(model: Any, optimizer: Any, number: int) -> None:
        torch.manual_seed(number)
        ids, (order, targets) = words(), permutation(B, T, 3)
        optimizer.zero_grad()
        logits, _ = model(ids, order=order, target_mapping=targets)
        F.cross_entropy(logits.mT, ids.gather(1, targets)).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()

    def new() -> tuple[Any, Any]:
        model = XLNetLMHeadModel(XLNetConfig(**SMALL | {"dropout": 0.1}))
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    model, optimizer = new()
    for number in range(4):
        if number == 2:
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint")
        step(model, optimizer, number)
    again, its_optimizer = new()
    for part, state in zip((again, its_optimizer), torch.load(tmp_path / "checkpoint"), strict=True):
        part.load_state_dict(state)
    for number in (2, 3):
        step(again, its_optimizer, number)
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_compiles_as_one_graph() -> None:
    model = randomise(XLNetLMHeadModel(XLNetConfig(**SMALL | {"n_layer": 1}))).eval()
    ids, (order, targets) = words(), permutation(B, T, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(ids, order=order, target_mapping=targets, token_type_ids=ids % 2)
        expected = model(ids, order=order, target_mapping=targets, token_type_ids=ids % 2)
    assert_same(got.output, expected.output, "logits")
    assert_same_memory([each.transpose(0, 1) for each in expected.memory], got.memory)


def test_device_and_dtype_are_those_asked_for() -> None:
    model = XLNetLMHeadModel(XLNetConfig(**SMALL), device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    order, targets = permutation(B, T, 3)
    model = XLNetLMHeadModel(XLNetConfig(**SMALL), dtype=torch.bfloat16)
    assert model(words(), order=order, target_mapping=targets).output.dtype == torch.bfloat16
