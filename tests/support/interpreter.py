"""Triton's interpreter, without what it does needlessly often."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import triton


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Replaces the functions of ``triton.language`` once for a launch and module, and counts no overflows.

    Triton does the one again whenever a kernel calls a function, and searches the language for them: half of the time.
    The other doubles every sum of integers, for an assertion that only a debug build makes.
    """
    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()  # modules whose functions have found the language replaced

    def once(function: Any) -> Any:
        if id(function.__globals__) in done:
            return None
        done.add(id(function.__globals__))
        return replace(function)

    def launched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        done.clear()
        return launch(self, *arguments, **keywords)

    unchecked = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with (
        patch.object(interpreter, "_patch_lang", once),
        patch.object(interpreter.GridExecutor, "__call__", launched),
        patch.object(interpreter.interpreter_builder, "options", unchecked),
    ):
        yield
