"""The command line: exit codes, one-line errors, records, and that no mismatch passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastseq.cli import bench, characters, compare, info, language, main
from fastseq.cli.equality import Call, backward, compare_models, nudge_, weights_for
from fastseq.cli.language import verdict

ROOT = Path(__file__).parents[1]

FACTORIES = """
import random
import torch
import fastseq
from torch import nn
from torch.nn.utils.rnn import pack_sequence

class Tagger(nn.Module):
    def __init__(self, cell=nn.LSTM):
        super().__init__()
        self.rnn = cell(4, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)
    def forward(self, x, scale=1.0):
        return {"tags": (self.head(self.rnn(x)[0]) * scale).softmax(-1)}

class Wrong(Tagger):
    # what a bug in a swapped module would do
    def forward(self, x):
        y = self.rnn(x)[0]
        return self.bug(y) if isinstance(self.rnn, fastseq.LSTM) else y

class WrongOutput(Wrong):
    def bug(self, y): return y * (1 + 1e-5)
class WrongGradient(Wrong):
    def bug(self, y): return y + 1e-4 * (y - y.detach())
class WrongShape(Wrong):
    def bug(self, y): return y[:, :-1]
class WrongType(Wrong):
    def bug(self, y): return y.double()
class NoGradient(Wrong):
    def bug(self, y): return y.detach()
class NotANumber(Wrong):
    def bug(self, y): return y * float("nan")
class Raises(Wrong):
    def bug(self, y): raise ArithmeticError("out of order")

class Random(Tagger):
    def forward(self, x):
        return self.rnn(x)[0] + 0.01 * random.random()

class Single(Tagger):
    # refuses float64
    def forward(self, x):
        return self.rnn(x.float())[0] if x.dtype == torch.float32 else 1 / 0

x = torch.randn(3, 5, 4)
def tensor(): return Tagger(), x
def arguments(): return Tagger(nn.GRU), (x, 2.0)
def keywords(): return Tagger(nn.RNN), ((x,), {"scale": torch.tensor(2.0)})
def packed(): return nn.LSTM(4, 8), pack_sequence([torch.randn(3, 4), torch.randn(5, 4)], enforce_sorted=False)
def cell(): return nn.GRUCell(4, 8), (x[:, 0], torch.randn(3, 8))
def frozen(): return nn.LSTM(4, 8).requires_grad_(False), x
def half(): return Tagger().bfloat16(), x.bfloat16()
def double(): return Tagger().double(), x.double()
def single(): return Single(), x
def swapped_before(): return Tagger(fastseq.LSTM), x
def dropout(): return nn.LSTM(4, 8, num_layers=2, dropout=0.5), x

def random_model(): return Random(), x
def wrong_output(): return WrongOutput(), x
def wrong_gradient(): return WrongGradient(), x
def wrong_shape(): return WrongShape(), x
def wrong_type(): return WrongType(), x
def no_gradient(): return NoGradient(), x
def not_a_number(): return NotANumber(), x
def raises(): return Raises(), x

def broken():
    raise RuntimeError("no\\nsuch corpus")
def no_inputs(): return Tagger()
def bad_inputs(): return Tagger(), [x]
def wrong_size(): return Tagger(), torch.randn(3, 5, 7)
def nothing_to_swap(): return nn.Linear(4, 8), x
class Silent(Tagger):
    def forward(self, x): return 1
def nothing_returned(): return Silent(), x
not_callable = 3
"""


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command line in a fresh folder; returns its exit code, stdout and stderr."""
    (tmp_path / "model.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "BUDGET_S", 0.0)  # three rounds are enough to see that it measures
    small = characters.Sizes(embedding=8, hidden=16, time=12, batch=4)
    monkeypatch.setattr(language, "Sizes", lambda: small)
    monkeypatch.setattr(characters, "SAMPLE_LENGTH", 20)
    for name, (pair, shapes) in bench.CASES.items():
        tiny = bench.Heads(2, 2, 5, 4, causal=True, padded=True)
        if isinstance(shapes[0], bench.Shape):
            tiny = bench.Shape(shapes[0].T and 3, 2, 4, 5)
        monkeypatch.setitem(bench.CASES, name, (pair, (tiny,)))

    def run(*arguments):
        code = main([*arguments])
        return code, *capsys.readouterr()

    return run


def record(folder="fastseq-compare"):
    return json.loads(Path(folder, "record.json").read_text(encoding="utf-8"))


# fastseq compare


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_language_model_is_the_same_swapped(run, cell):
    code, out, err = run("compare", "--cell", cell, "--steps", "8", "--device", "cpu", "--threads", "1")
    assert code == 0, out + err
    assert "Equal" in out
    assert "\x1b" not in out + err  # plain where there is no terminal
    assert "training 8/8" in err
    made = record()
    assert made["verdict"] == {"equal": True, "reasons": []}
    assert made["losses"]["fastseq"] == made["losses"]["torch"]  # on a CPU it is the same operator
    assert len(made["losses"]["torch"]) == len(made["loss_check"]["tolerance"]) == 8
    assert made["sample"].startswith("The ")
    assert len(made["sample"]) == len("The ") + 20
    assert [row["name"] for row in made["times"]["rows"]] == ["torch", "fastseq", "torch, nudged"]
    assert made["provenance"]["torch"] == torch.__version__
    assert made["settings"]["model"]["cell"] == cell
    assert made["settings"]["threads"] == made["provenance"]["threads"] == made["times"]["threads"] == 1
    assert Path("fastseq-compare/loss.png").read_bytes().startswith(b"\x89PNG")


def test_language_model_learns(run):
    assert run("compare", "--steps", "60", "--device", "cpu")[0] == 0
    losses = record()["losses"]
    assert sum(losses["fastseq"][-10:]) / 10 < losses["fastseq"][0] - 0.5
    assert losses["torch, nudged"] != losses["torch"]  # or it would measure nothing


def test_another_implementation_agrees_within_what_rounding_does(run):
    options = ("--device", "cpu", "--implementation", "reference", "--output", "here")
    code, out, _ = run("compare", "--steps", "30", *options)
    assert code == 0, out
    made = record("here")
    assert 0 < made["loss_check"]["max_difference"] < 1e-3
    assert made["settings"]["implementation"] == "reference"


def test_without_matplotlib_there_is_a_record_and_a_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = run("compare", "--steps", "2", "--device", "cpu")
    assert code == 0
    assert "matplotlib is not installed" in out
    assert record()["losses"]
    assert not Path("fastseq-compare/loss.png").exists()


def test_training_that_goes_another_way_is_a_mismatch(run, monkeypatch):
    step = characters.Training.step

    def forgetful(self):
        if isinstance(self.model.rnn, __import__("fastseq").LSTM):
            self._state = None  # the swapped run alone loses its state between steps
        step(self)

    monkeypatch.setattr(characters.Training, "step", forgetful)
    code, out, _ = run("compare", "--steps", "4", "--device", "cpu")
    assert code == 1
    assert "losses differ at 3 of 4 steps, first at step 1" in out
    assert record()["verdict"]["equal"] is False


def test_verdict_allows_what_nudges_do_and_nothing_else():
    peer, nudged = [4.0, 3.0, 2.0], [4.0, 3.001, 2.0]

    def reasons(ours, nudged=nudged):
        return verdict(ours, peer, nudged, torch.finfo(torch.float32).eps).reasons

    assert not reasons(peer)
    assert not reasons([4.0, 3.007, 2.007])  # how far it has strayed: step 2 may use what step 1 did
    assert "first at step 0" in reasons([4.001, 3.0, 2.0])[0]
    assert "at 1 of 3 steps, first at step 1" in reasons([4.0, 3.009, 2.0])[0]
    assert "not finite" in reasons([4.0, float("nan"), 2.0])[0]
    assert "not finite" in reasons(peer, [4.0, float("inf"), 2.0])[0]


OWN = ["tensor", "arguments", "keywords", "packed", "cell", "half", "double", "single", "swapped_before", "dropout"]


@pytest.mark.parametrize("factory", OWN)
def test_own_model_is_the_same_swapped(run, factory):
    code, out, err = run("compare", f"model.py:{factory}", "--device", "cpu")
    assert code == 0, out + err
    made = record()
    names = [check["name"] for check in made["equality"]["checks"]]
    assert any(name.startswith("output") for name in names)
    assert any(name.startswith("gradient of input") for name in names)
    assert any(name.startswith("gradient of") and "weight_hh" in name for name in names)
    assert all(check["difference"] == 0 for check in made["equality"]["checks"])
    assert all(check["budget"] > 0 for check in made["equality"]["checks"] if "gradient" in check["name"])
    assert set(made["times"]) == {"forward", "forward and backward"}
    assert made["memory"] is None  # a CPU has no peak to read: said, not guessed
    assert "Memory: not measured" in out
    assert Path("fastseq-compare/compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("factory", "rule"), [("tensor", "against float64"), ("double", "nudging"), ("single", "nudging")]
)
def test_budget_says_where_it_comes_from(run, factory, rule):
    run("compare", f"model.py:{factory}", "--device", "cpu")
    assert rule in record()["equality"]["rule"]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("factory", ["tensor", "arguments", "cell"])
def test_own_model_is_within_budget_on_every_implementation(run, factory, implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
    code, out, err = run("compare", f"model.py:{factory}", "--implementation", implementation)
    assert code == 0, out + err


def test_frozen_model_without_parameters_to_train_still_compares(run):
    assert run("compare", "model.py:frozen", "--device", "cpu")[0] == 0
    assert "gradient of input[0]" in [check["name"] for check in record()["equality"]["checks"]]


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("random_model", "a random model cannot be compared"),
        ("wrong_output", "output: off by"),
        ("wrong_gradient", "gradient of rnn.weight_hh_l0: off by"),
        ("wrong_shape", "output: shape [3, 4, 16], torch.nn gives [3, 5, 16]"),
        ("wrong_type", "output: torch.float64, torch.nn gives torch.float32"),
        ("no_gradient", "gradient of rnn.weight_ih_l0: only torch.nn has it"),
        ("not_a_number", "output: off by nan"),
        ("raises", "the swapped model raised ArithmeticError: out of order"),
    ],
)
def test_mismatch_is_found_named_and_not_timed(run, factory, reason):
    code, out, _ = run("compare", f"model.py:{factory}", "--device", "cpu")
    assert code == 1
    made = record()
    assert any(reason in entry for entry in made["verdict"]["reasons"]), made["verdict"]
    assert reason in out
    assert "times" not in made


# a user's mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["train"], "invalid choice: 'train'"),
        (["compare", "model.py"], "model.py: expected FILE.py:factory"),
        (["compare", "absent.py:tensor"], "absent.py: no such file"),
        (["compare", "model.py:absent"], "model.py: no function 'absent'"),
        (["compare", "model.py:not_callable"], "model.py: no function 'not_callable'"),
        (["compare", "model.py:broken"], "raised RuntimeError: no such corpus (line "),
        (["compare", "model.py:no_inputs"], "expected (model, inputs), got Tagger"),
        (["compare", "model.py:bad_inputs"], "inputs: expected a tensor, a tuple or (args, kwargs), got list"),
        (["compare", "model.py:wrong_size"], "the model fails with torch.nn alone: RuntimeError"),
        (["compare", "model.py:nothing_to_swap"], "nothing to swap"),
        (["compare", "model.py:nothing_returned"], "returns no tensor"),
        (["compare", "syntax.py:factory"], "importing syntax.py raised SyntaxError"),
        (["compare", "model.py:double", "--implementation", "triton"], "triton: "),
        (["compare", "model.py:tensor", "--cell", "gru"], "--cell belongs to the built-in model"),
        (["compare", "--cell", "transformer"], "invalid choice: 'transformer'"),
        (["compare", "--steps", "0"], "expected at least 1, got 0"),
        (["compare", "--device", "abacus"], "--device abacus: torch knows no such device"),
        (["compare", "--output", "model.py/below"], "--output model.py/below: Not a directory"),
        (["bench", "lstn"], "no case 'lstn'; there are lstm, gru, rnn, lstm_cell, gru_cell, rnn_cell, attention, mha"),
        pytest.param(
            ["compare", "--device", "cuda"], "--device cuda: torch sees no such device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device"),
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(run, arguments, message):
    Path("syntax.py").write_text("def factory(:")
    code, out, err = run(*arguments)
    assert code == 2
    assert err.startswith("fastseq: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in out + err


def test_interrupt_has_its_exit_code(run, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "info", interrupted)
    assert run("info") == (130, "", "fastseq: interrupted\n")


# fastseq bench


def test_bench_is_json_with_provenance(run):
    code, out, err = run("bench", "lstm", "gru_cell", "lstm", "--json", "--budget", "0", "--device", "cpu")
    assert code == 0
    made = json.loads(out)
    assert [(row["case"], row["run"]) for row in made["rows"]] == [
        (name, how) for name in ("lstm", "gru_cell") for how in ("forward", "forward and backward")
    ]
    for row in made["rows"]:
        assert 0 < row["torch_ms"]["lower"] <= row["torch_ms"]["median"] <= row["torch_ms"]["upper"]
        assert row["ratio"]["median"] > 0
        assert row["noise"]["median"] > 0
        assert row["rounds"] == 3
    assert made["mismatches"] == []
    assert "commit" in made["provenance"]
    assert "bench" in err


def test_bench_without_names_runs_every_case(run):
    code, out, _ = run("bench", "--budget", "0", "--device", "cpu")
    assert code == 0
    assert "\x1b" not in out
    assert all(f"{name} " in out for name in bench.CASES)
    assert "time / torch" in out


def test_bench_gives_no_times_to_a_mismatch(run, monkeypatch):
    forward = torch.nn.GRU.forward
    monkeypatch.setattr("fastseq.GRU.forward", lambda self, *a, **k: [1.001 * y for y in forward(self, *a, **k)])
    code, out, err = run("bench", "gru", "--json", "--budget", "0", "--device", "cpu")
    assert code == 1
    assert json.loads(out)["rows"] == []
    assert "mismatch: gru T3 B2 I4 H5" in err


@pytest.mark.parametrize("implementation", ["auto", "torch", "reference"])
def test_bench_of_attention_agrees_with_torch(run, implementation):
    options = ("--json", "--budget", "0", "--device", "cpu", "--implementation", implementation)
    code, out, err = run("bench", "attention", "mha", "encoder", *options)
    assert code == 0, err
    made = json.loads(out)
    assert made["mismatches"] == []
    assert [row["case"] for row in made["rows"]] == ["attention"] * 2 + ["mha"] * 2 + ["encoder"] * 2
    assert {row["shape"] for row in made["rows"]} == {"B2 N2 S5 D4 causal padded"}


@pytest.mark.parametrize("hidden", [{}, {"causal": True}, {"padded": True}])
def test_bench_of_attention_hides_the_same_on_both_sides(run, monkeypatch, hidden):
    for name in ("attention", "mha", "encoder"):
        monkeypatch.setitem(bench.CASES, name, (bench.CASES[name][0], (bench.Heads(2, 2, 5, 4, **hidden),)))
    assert run("bench", "attention", "mha", "encoder", "--budget", "0", "--device", "cpu")[0] == 0


def test_bench_gives_no_times_to_a_wrong_attention(run, monkeypatch):
    attend = bench.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        bench.functional, "scaled_dot_product_attention", lambda *a, **options: attend(*a, **options | {"scale": 0.4})
    )
    code, out, err = run("bench", "attention", "--json", "--budget", "0", "--device", "cpu")
    assert code == 1
    assert json.loads(out)["rows"] == []
    assert "mismatch: attention B2 N2 S5 D4 causal padded: output" in err


# fastseq info


def test_info_explains_every_operation(run):
    code, out, _ = run("info")
    assert code == 0
    assert all(name in out for name in info.OPERATIONS)
    assert torch.__version__ in out


def test_info_says_why_of_attention(run):
    made = json.loads(run("info", "--json")[1])
    reasons = {entry["operation"]: entry["reason"] for entry in made["operations"] if entry["device"] == "cpu"}
    assert {"attention", "attention, masked", "mha", "encoder"} <= reasons.keys()
    assert reasons["attention"] != reasons["attention, masked"]


def test_info_as_a_process_is_json():
    command = [sys.executable, "-m", "fastseq", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert {choice["operation"] for choice in made["operations"]} == set(info.OPERATIONS)
    assert all(choice["implementation"] and choice["reason"] for choice in made["operations"])
    assert made["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "cpu" in made["devices"]


# what the proofs rest on


def test_nudge_moves_weights_by_about_one_rounding():
    model = torch.nn.LSTM(4, 8)
    before = [p.detach().clone() for p in model.parameters()]
    nudge_(model, 0)
    eps = torch.finfo(torch.float32).eps
    for old, new in zip(before, model.parameters(), strict=True):
        moved = ((new - old) / old).abs()
        assert 0 < moved.max() <= 2 * eps
        assert (moved > 0).float().mean() > 0.9


def test_weights_see_a_softmax():
    x = torch.randn(3, 5, requires_grad=True)
    y = x.softmax(-1)
    backward(y, weights_for(y))
    assert x.grad.abs().max() > 1e-3


def test_comparison_leaves_both_models_as_they_were():
    peer = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    ours = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    ours.load_state_dict(peer.state_dict())
    before = {name: value.clone() for name, value in peer.state_dict().items()}
    assert compare_models(peer, ours, Call((torch.randn(3, 4),))).passed
    for model in (peer, ours):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
