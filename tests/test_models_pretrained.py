"""Laws of models in folders: what is written is read, and what has no place is refused; and the docstrings run."""

import doctest
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastseq import models
from fastseq.models import Pretrained, Rule
from fastseq.models.names import under

from .support.models import edit_config


@dataclass
class Config:
    width: int = 6
    head: int = 2
    depth: int = 2


class Base(Pretrained):
    """Every kind of rule: a module, a name that stays, parts that are joined, matrices transposed, heads apart."""

    Config = Config
    model_type, architecture, prefix = "toy", "Base", "base."
    names = (
        Rule("layers.{}.joined", ("block.{}.q", "block.{}.k", "block.{}.v"), transposed=True),
        Rule("layers.{}.heads", "block.{}.o", head_width="head"),
        Rule("layers.{}.linear", "block.{}.dense.inner", transposed=True),
    )
    ignored = ("block.{}.mask",)
    spelled: ClassVar = {"inner.gamma": "inner.weight"}
    fixed: ClassVar = Pretrained.fixed | {"scaled": False}
    unused = frozenset({"colour"})

    def __init__(self, config: Any, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        E, kind = config.width, {"device": device, "dtype": dtype}
        self.word = torch.nn.Embedding(5, E, **kind)
        self.layers = torch.nn.ModuleList()
        for _ in range(config.depth):
            layer = torch.nn.Module()
            layer.joined = torch.nn.Parameter(torch.randn(3 * E, E, **kind))
            layer.heads = torch.nn.Parameter(torch.randn(E, E, **kind))
            layer.linear = torch.nn.Linear(E, 2 * E, **kind)
            self.layers.append(layer)


class Headed(Pretrained):
    """The same with a head, whose weight is the embeddings' too."""

    Config = Config
    model_type, architecture, prefix = "toy", "Headed", "base."
    names = under("base.", Base.names)
    tied: ClassVar = {"head.weight": "base.word.weight"}

    def __init__(self, config: Any, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        self.base = Base(config, device, dtype)
        self.bias = torch.nn.Parameter(torch.randn(5, device=device, dtype=dtype))


def written(folder: Path, model: Pretrained) -> dict[str, Tensor]:
    """The weights as they stand in the file."""
    model.save_pretrained(folder, safetensors=False)
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def rewrite(folder: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("kind", [Base, Headed])
def test_what_is_written_is_read(tmp_path: Path, kind: type[Pretrained], safetensors: bool) -> None:
    model = kind(Config(width=4))
    model.save_pretrained(tmp_path / "new" / "folder", safetensors=safetensors)
    again = kind.from_pretrained(tmp_path / "new" / "folder")
    assert_equal(again, model)
    assert again.config == model.config
    assert not again.training


def test_names_and_shapes_are_theirs(tmp_path: Path) -> None:
    model = Base(Config(depth=1))
    weights = written(tmp_path, model)
    layer: Any = model.layers[0]
    q, k, v = layer.joined.chunk(3)
    expected = {
        "word.weight": model.word.weight,
        "block.0.q": q.T,
        "block.0.k": k.T,
        "block.0.v": v.T,
        "block.0.o": layer.heads.view(6, 3, 2),
        "block.0.dense.inner.weight": layer.linear.weight.T,
        "block.0.dense.inner.bias": layer.linear.bias,
    }
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
        assert weights[name].is_contiguous(), name
    said = json.loads((tmp_path / "config.json").read_text())
    assert said == {"model_type": "toy", "architectures": ["Base"], "width": 6, "head": 2, "depth": 1}


def test_a_rule_fits_whole_words_and_the_first_counts() -> None:
    rule = Rule("layers.{}.a", ("x.{}.b", "x.{}.c"))
    assert rule.named("layers.12.a.weight") == ["x.12.b.weight", "x.12.c.weight"]
    assert rule.named("layers.12.a") == ["x.12.b", "x.12.c"]
    for other in ("layers.12.ab.weight", "layers.one.a", "layers.12", "own.layers.12.a"):
        assert rule.named(other) is None

    class Chosen(Base):
        names = (Rule("word", "first"), Rule("word", "second"), *Base.names)

    assert Chosen._rule("word.weight")[1] == ["first.weight"]


def test_files_with_and_without_a_head_are_read_by_both(tmp_path: Path) -> None:
    headed = Headed(Config())
    headed.save_pretrained(tmp_path / "headed")
    with pytest.raises(ValueError, match=r"missing \[\]; unexpected \[bias\]"):
        Base.from_pretrained(tmp_path / "headed")
    base = Base.from_pretrained(tmp_path / "headed", unread=["bias"])
    assert_equal(base, headed.base)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"missing \[bias\]; unexpected \[\]"):
        Headed.from_pretrained(tmp_path / "base")
    assert_equal(Headed.from_pretrained(tmp_path / "base", fresh=["bias"]).base, base)


def test_names_must_be_right_both_ways(tmp_path: Path) -> None:
    weights = written(tmp_path, Base(Config(depth=1)))
    rewrite(tmp_path, {name: tensor for name, tensor in weights.items() if name != "block.0.k"})
    with pytest.raises(ValueError, match=r"missing \[block.0.k\]; unexpected \[\]"):
        Base.from_pretrained(tmp_path)
    rewrite(tmp_path, {**weights, "block.1.q": weights["block.0.q"], "other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing \[\]; unexpected \[block.1.q, other\]"):
        Base.from_pretrained(tmp_path)
    Base.from_pretrained(tmp_path, unread=["block.1", "other"])
    with pytest.raises(ValueError, match=r"missing \[.* and \d+ more\]"):
        Base.from_pretrained(tmp_path, depth=5)


@pytest.mark.parametrize(("name", "shape"), [("word.weight", (5, 7)), ("block.0.k", (6, 5)), ("block.0.o", (6, 3))])
def test_shapes_must_be_right(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    weights = written(tmp_path, Base(Config(depth=1)))
    rewrite(tmp_path, {**weights, name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=rf"weights: expected .* got .*{name} \[{shape[0]}, {shape[1]}\]"):
        Base.from_pretrained(tmp_path)


def test_what_carries_nothing_is_passed_and_old_spellings_are_read(tmp_path: Path) -> None:
    model = Base(Config(depth=1))
    weights = written(tmp_path, model)
    weights["block.0.dense.inner.gamma"] = weights.pop("block.0.dense.inner.weight")
    rewrite(tmp_path, {**weights, "block.0.mask": torch.zeros(3)})
    assert_equal(Base.from_pretrained(tmp_path), model)


def test_copies_must_be_copies(tmp_path: Path) -> None:
    model = Headed(Config())
    weights = written(tmp_path, model)
    rewrite(tmp_path, {**weights, "head.weight": weights["base.word.weight"].clone()})
    assert_equal(Headed.from_pretrained(tmp_path), model)
    rewrite(tmp_path, {**weights, "head.weight": weights["base.word.weight"] + 1})
    with pytest.raises(ValueError, match=r"expected head.weight to be base.word.weight, to which it is tied"):
        Headed.from_pretrained(tmp_path)
    weights["head.weight"] = weights.pop("base.word.weight")
    rewrite(tmp_path, weights)
    assert_equal(Headed.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaled": True}, "config.json, scaled: expected False, all there is here, got True"),
        ({"is_decoder": True}, "config.json, is_decoder: expected False, all there is here, got True"),
        ({"pruned_heads": {"0": [1]}}, "config.json, pruned_heads: expected {}"),
        ({"new_idea": 3}, "config.json, new_idea: expected a key of Config, got 3"),
        ({"model_type": "bert"}, "config.json, model_type: expected 'toy', got 'bert'"),
    ],
)
def test_what_the_configuration_says_must_be_known(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    Base(Config()).save_pretrained(tmp_path)
    edit_config(tmp_path, colour="red", scaled=False, use_cache=True, task_specific_params={"a": 1})
    Base.from_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Base.from_pretrained(tmp_path)


def test_the_configuration_can_be_overridden(tmp_path: Path) -> None:
    Base(Config()).save_pretrained(tmp_path)
    model = Base.from_pretrained(tmp_path, depth=1, unread=["block.1"])
    assert model.config == Config(depth=1)
    with pytest.raises(TypeError, match="breadth"):
        Base.from_pretrained(tmp_path, breadth=1)


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected one with config.json, got 'org/model'; none is downloaded"):
        Base.from_pretrained("org/model")
    Base(Config()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or pytorch_model.bin.*\['config.json'\]"):
        Base.from_pretrained(tmp_path)


def test_safetensors_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Base(Config())
    model.save_pretrained(tmp_path / "safe")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for act in (lambda: Base.from_pretrained(tmp_path / "safe"), lambda: model.save_pretrained(tmp_path / "new")):
        with pytest.raises(ImportError, match=r"model.safetensors: needs safetensors .*, or pytorch_model.bin"):
            act()
    model.save_pretrained(tmp_path / "bin", safetensors=False)
    assert_equal(Base.from_pretrained(tmp_path / "bin"), model)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    Base(Config()).save_pretrained(tmp_path, safetensors=False)
    torch.save({"word.weight": Path("code")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        Base.from_pretrained(tmp_path)


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    model = Base(Config(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for dtype in (None, torch.float64, torch.bfloat16):
        again = Base.from_pretrained(tmp_path, dtype=dtype)
        assert again.word.weight.dtype == (dtype or torch.float32)
        assert torch.equal(again.word.weight.bfloat16(), model.word.weight)


def test_gradients_flow_into_what_was_read(tmp_path: Path) -> None:
    Base(Config()).save_pretrained(tmp_path)
    model = Base.from_pretrained(tmp_path)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_models_are_imported_only_when_asked_for() -> None:
    code = "import sys, fastseq; assert 'fastseq.models' not in sys.modules; import fastseq.models"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


PUBLIC = {name: thing for name, thing in vars(models).items() if inspect.isclass(thing) or inspect.isfunction(thing)}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_example_runs(name: str) -> None:
    thing = PUBLIC[name]
    assert inspect.getdoc(thing), f"{name} has no docstring"
    tests = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    model = hasattr(thing, "architecture")  # configurations and outputs are shown where they are used
    assert any(test.examples for test in tests) or not (model or inspect.isfunction(thing)), f"{name} has no example"
    for test in tests:
        assert doctest.DocTestRunner(verbose=False).run(test).failed == 0, name
