"""Laws of measuring, with a clock that the contestants move themselves."""

import json
import subprocess

import pytest
import torch

from fastseq import stopwatch
from fastseq.stopwatch import Spread, provenance, race


class Clock:
    """A clock that stands still until a contestant moves it."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def contestant(self, name, *seconds):
        """Take the given seconds, call by call, the last of them for ever after."""
        remaining = list(seconds)

        def run():
            self.log.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return run


@pytest.fixture
def clock():
    return Clock()


def test_ratio_is_time_over_peers_time(clock):
    contestants = {"torch": clock.contestant("torch", 0.2), "fastseq": clock.contestant("fastseq", 0.1)}
    result = race(contestants, rounds=5, calls=1, clock=clock)
    assert result.ratio().median == pytest.approx(0.5)
    assert result.ratio("torch") == Spread(1.0, 1.0, 1.0)
    assert result.noise().median == pytest.approx(1.0)
    assert result.time("torch").median == pytest.approx(200.0)
    assert [row.name for row in result.rows()] == ["torch", "fastseq", "torch again"]


def test_any_contestant_can_be_the_peer(clock):
    contestants = {"fastseq": clock.contestant("fastseq", 0.1), "torch": clock.contestant("torch", 0.2)}
    result = race(contestants, peer="torch", rounds=3, calls=1, clock=clock)
    assert result.ratio().median == pytest.approx(0.5)
    assert result.again == "torch again"


def test_every_contestant_runs_once_a_round_and_as_often_in_every_place(clock):
    names = ["a", "b", "c"]
    race({n: clock.contestant(n, 0.1) for n in names}, rounds=6, calls=1, warmup=0, again=False, clock=clock)
    rounds = [clock.log[k : k + 3] for k in range(0, len(clock.log), 3)]
    assert all(sorted(order) == names for order in rounds)
    assert all(sorted(place) == ["a", "a", "b", "b", "c", "c"] for place in zip(*rounds, strict=True))


def test_drift_of_the_machine_does_not_reach_the_ratio(clock):
    slower = [0.1 * 1.1**k for k in range(40)]
    contestants = {
        "torch": clock.contestant("torch", *[2 * s for s in slower]),
        "fastseq": clock.contestant("fastseq", *slower),
    }
    result = race(contestants, rounds=20, calls=1, again=False, clock=clock)
    assert result.ratio().median == pytest.approx(0.5)
    assert result.time("torch").upper > 2 * result.time("torch").lower


def test_warm_up_is_not_measured(clock):
    contestants = {"torch": clock.contestant("torch", 9.0, 9.0, 9.0, 0.1)}
    assert max(race(contestants, rounds=5, calls=1, again=False, clock=clock).seconds["torch"]) < 1


def test_setup_is_not_measured_and_serves_the_second_run_too(clock):
    contestants = {"torch": clock.contestant("torch", 0.1)}
    result = race(
        contestants, setup={"torch": clock.contestant("setup", 5.0)}, rounds=3, calls=1, warmup=1, clock=clock
    )
    assert result.time("torch again").median == pytest.approx(100.0)
    assert clock.log == ["setup", "torch"] * 8  # one warm-up and three rounds, twice


def test_a_sample_is_long_enough_for_the_clock(clock):
    contestants = {"torch": clock.contestant("torch", 1e-3), "fastseq": clock.contestant("fastseq", 1e-4)}
    result = race(contestants, rounds=3, clock=clock)
    assert result.calls == pytest.approx(stopwatch.SHORTEST_SAMPLE_S / 1e-4, abs=1)
    assert result.time("fastseq").median == pytest.approx(0.1)


def test_budget_ends_a_race_but_not_before_there_are_quartiles(clock):
    slow = {"torch": clock.contestant("torch", 10.0)}
    assert len(race(slow, rounds=99, budget_s=1.0, calls=1, clock=clock).seconds["torch"]) == 3
    fast = {"torch": clock.contestant("torch", 0.125)}
    assert len(race(fast, rounds=99, budget_s=2.5, calls=1, clock=clock).seconds["torch"]) == 10


def test_threads_are_pinned_meanwhile_and_put_back(clock):
    before, seen = torch.get_num_threads(), []
    wanted = before + 1

    def failing():
        seen.append(torch.get_num_threads())
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        race({"torch": failing}, threads=wanted, clock=clock)
    assert seen == [wanted]
    assert torch.get_num_threads() == before
    assert race({"torch": clock.contestant("torch", 0.1)}, threads=wanted, clock=clock).threads == wanted


def test_after_round_counts_the_rounds(clock):
    seen = []
    race({"torch": clock.contestant("torch", 0.1)}, rounds=4, calls=1, clock=clock, after_round=seen.append)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("contestants", "keywords", "message"),
    [
        ({}, {}, "nothing to time"),
        ({"torch": print}, {"peer": "jax"}, "'jax' is not one of torch"),
        ({"torch": print}, {"rounds": 0}, "at least 1, got 0"),
    ],
)
def test_errors_teach(contestants, keywords, message):
    with pytest.raises(ValueError, match=message):
        race(contestants, **keywords)


def test_ratio_without_a_name_needs_a_single_rival(clock):
    three = {name: clock.contestant(name, 0.1) for name in ("torch", "a", "b")}
    with pytest.raises(ValueError, match="needs a name"):
        race(three, rounds=1, calls=1, clock=clock).ratio()


def test_record_is_json(clock):
    result = race({"torch": clock.contestant("torch", 0.1)}, rounds=3, calls=1, clock=clock)
    record = json.loads(json.dumps(result.record()))
    assert record["rows"][0]["ms"]["median"] == pytest.approx(100.0)
    assert record["rows"][0]["rounds"] == 3


def test_provenance_traces_a_number():
    facts = json.loads(json.dumps(provenance()))
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"] == facts["cpu"]
    assert facts["date"].endswith("+00:00")


def test_commit_is_that_of_this_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    copied = tmp_path / "stopwatch.py"
    copied.write_text("")
    monkeypatch.setattr(stopwatch, "__file__", str(copied))
    git("init")
    git("commit", "--allow-empty", "-m", "somebody else's")
    assert provenance()["commit"] is None
    git("add", "stopwatch.py")
    git("commit", "-m", "now it is tracked")
    assert (provenance()["commit"], provenance()["modified"]) == (git("rev-parse", "HEAD"), False)
    copied.write_text("changed")
    assert provenance()["modified"] is True
