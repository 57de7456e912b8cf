"""Options and fixtures of the pytest-benchmark suites: ``pytest benchmarks [--full] [--on cuda]``.

The table prints torch's side and ours next to each other (a group per case); ``--benchmark-json=FILE`` writes
them with their provenance. The sides of a group run one after the other, so a busy machine can favour either:
for a verdict use ``auto.py`` (CPU) or ``gpu.py``, which interleave them.
"""

from collections.abc import Callable

import pytest
import torch
from contest import Case

from fastseq import stopwatch

Verdicts = dict[Case, dict[str, str | None]]


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("fastseq benchmarks").addoption
    add("--full", action="store_true", help="the complete grid (hours) instead of a few minutes' worth")
    add("--on", default="cpu", metavar="DEVICE", help="device of the tensors: cpu (default) or cuda")
    add("--threads", type=int, default=torch.get_num_threads(), help="torch's threads on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    """Warm up, and on an accelerator read the clock only after waiting for it; half a second a side."""
    torch.set_num_threads(config.getoption("--threads"))
    config.option.benchmark_warmup = True
    config.option.benchmark_disable_gc = True
    config.option.benchmark_columns = config.option.benchmark_columns or ["min", "median", "iqr", "rounds"]
    config.option.benchmark_timer = "torch.utils.benchmark.utils.timer.timer"
    if config.option.benchmark_max_time == "1.0":  # the plugin's default, which the warm-up takes once more
        config.option.benchmark_max_time = "0.5"
    if config.getoption("--on") == "cuda":  # on both sides
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


@pytest.fixture(scope="session")
def verdicts() -> Verdicts:
    """What the correctness gate said of each case, so that it runs once and not once per side."""
    return {}


@pytest.fixture
def race(benchmark, verdicts: Verdicts, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Time one side of a case, unless the sides disagree: then every one of them fails, untimed."""
    device = request.config.getoption("--on")

    def run(case: Case, side: str) -> None:
        contest = case.contest(device, ("auto",))
        contest.drop_wrong_rivals()
        if case not in verdicts:
            verdicts[case] = {name: contest.disagreement(name) for name in contest.sides}
        wrong = {name: why for name, why in verdicts[case].items() if why is not None}
        assert not wrong, f"not timed, the results disagree: {wrong}"
        with contest.context():
            choice = contest.explain()
        benchmark.group = case.name
        benchmark.extra_info.update(stopwatch.provenance(device))
        benchmark.extra_info.update(side=side, implementation=choice.name, why=choice.reason)
        with contest.context():
            contest.set_up(side)
            benchmark(contest.sides[side])

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test takes ``case`` and ``side``: its module's DEFAULT or FULL cases, times its SIDES."""
    if {"case", "side"} <= set(metafunc.fixturenames):
        cases = metafunc.module.FULL if metafunc.config.getoption("--full") else metafunc.module.DEFAULT
        pairs = [(case, side) for case in cases for side in metafunc.module.SIDES]
        metafunc.parametrize(("case", "side"), pairs, ids=[f"{case.name}-{side}" for case, side in pairs])
