"""Every public docstring has an example, and every example runs."""

import doctest
import inspect

import pytest

import fastseq
import fastseq.bias
import fastseq.functional
import fastseq.nn.recurrent

PUBLIC = {
    **{f"fastseq.{n}": getattr(fastseq, n) for n in dir(fastseq) if not n.startswith("_")},
    **{f"functional.{n}": getattr(fastseq.functional, n) for n in fastseq.functional.__all__},
    **{f"bias.{n}": getattr(fastseq.bias, n) for n in fastseq.bias.__all__},
}
PUBLIC = {n: o for n, o in PUBLIC.items() if inspect.isclass(o) or inspect.isfunction(o)}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_example_runs(name: str) -> None:
    thing = PUBLIC[name]
    documentation = inspect.getdoc(thing)
    assert documentation, f"{name} has no docstring"
    if name == "fastseq.Choice":
        return  # a result, shown in the example of `explain`
    tests = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    assert any(t.examples for t in tests), f"{name} has no example"
    for test in tests:
        results = doctest.DocTestRunner(verbose=False).run(test)
        assert results.failed == 0, f"{name}: {results.failed} examples failed"
