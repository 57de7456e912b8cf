"""Which timings the kernel tests forbid: a kernel that fails a test is not timed."""

import re
from typing import NamedTuple

from attention_cases import WORDS
from contest import Case

FEATURES = {word: (word,) for word in ("lstm", "gru", "rnn", *WORDS)} | {
    "mask": ("padding", "dense"),
    "'right'": ("causal",),
    "'left'": ("window",),
}
NOT_ASKED = r"'\w+': (None|False|0\.0|-1|'')(?=[,}])"  # in a name made of a dictionary
KERNELS = {  # what a test file is about, by a word in its name; the first that occurs counts
    "relative": ("relative",),
    "attention_forward": ("attention_forward",),
    "attention_backward": ("attention_backward",),
    "attention_decode": ("attention_decode",),
    "attention": ("attention_forward", "attention_backward", "attention_decode"),
    "cell": ("step",),
    "recurrent": ("layer", "reset", "step"),
    "sequence": ("layer", "reset"),
}
ALL = tuple(dict.fromkeys(kernel for kernels in KERNELS.values() for kernel in kernels))
STATES = {0: "passed", 1: "failed", 124: "cut short", 137: "cut short", None: "cut short"}  # by exit code


class Bar(NamedTuple):
    """Kernels that may not be timed, where they are asked for one of these features (none: at all), and why."""

    kernels: frozenset[str]
    features: frozenset[str]
    why: str

    def holds(self, case: Case) -> bool:
        return bool(self.kernels & case.needs) and (not self.features or bool(self.features & case.features))


def bars(log: str) -> tuple[list[Bar], str]:
    """What may not be timed, from the log of the kernel tests as ``gpu.sh`` writes it; and a sentence on it.

    A failing test bars the cells or features that its name mentions (any feature, if it only says that it is
    about features), or all of its file's kernels if it mentions none. A file that did not run (no test passed)
    bars them all; one cut short by its time limit, what had failed.
    """
    found: list[Bar] = []
    said = []

    def bar(kernels: tuple[str, ...], text: str, why: str) -> None:
        words = re.findall("|".join(FEATURES), re.sub(NOT_ASKED, "", text).lower())
        if not words and "feature" in text:
            words = list(WORDS)
        found.append(Bar(frozenset(kernels), frozenset(feature for word in words for feature in FEATURES[word]), why))

    for part in re.split(r"^#file ", log, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        kernels = next((KERNELS[word] for word in KERNELS if word in name), ALL)
        code = re.search(r"^#code (\d+)", body, flags=re.MULTILINE)
        ended = int(code[1]) if code else None
        state = STATES.get(ended, f"code {ended}")
        passed = len(re.findall(r"::\S.* PASSED", body))
        failed = sorted(set(re.findall(r"::(\S.*?) (?:FAILED|ERROR)\b", body)))
        said.append(f"{name}: {state}, {passed} tests passed, {len(failed)} failed")
        for test in failed:
            bar(kernels, test, f"{name}::{test} failed")
        if name == "marked_gpu":  # drop-in tests of all kinds: what fails there counts, what did not run does not
            continue
        if not passed or (state not in ("passed", "cut short") and not failed):
            bar(kernels, "", f"{name}: {state}, {passed} tests passed")
    if not said:
        found.append(Bar(frozenset(ALL), frozenset(), "no kernel test has run"))
    return found, "tests: " + ("; ".join(said) or "none has run")


def reason(found: list[Bar], case: Case) -> str | None:
    """Why a case may not be timed, or None."""
    return next((bar.why for bar in found if bar.holds(case)), None)
