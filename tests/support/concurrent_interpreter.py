"""Triton's interpreter with the programs of a launch running side by side, as they may on a device.

Triton's own runs them one after another, so a program that waits for another waits for ever. Here each is a thread, and
a seed decides at every load, store and atomic which of them goes on: what is not synchronised meets, sooner or
later, an order that shows it, and the same seed shows it again. Only one runs at a time, so nothing in the interpreter
needs a lock, and a program is abandoned by not going on.

With ``weak`` memory is as weak as a GPU's. A plain store waits in its program until that program releases, or for a
while; a plain load may give what memory held at any time since the program's last acquire. Only its own stores a
program always sees. Atomics and volatile loads act on memory itself, at once.
"""

import inspect
import math
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl  # noqa: F401 - the interpreter looks for it among the names that a kernel sees
from numpy.typing import NDArray
from triton.runtime import interpreter

from .interpreter import quick_interpreter

SWITCH = 0.3  # chance that another program goes on at a load or a store; at an atomic it is certain to be drawn
FLUSH = 0.1  # chance that a store that waits becomes visible at such a point
STALE = 0.5  # chance that a load is as stale as it may be told to be

native = interpreter._interpreter
RELEASES = {interpreter._ir.MEM_SEMANTIC.RELEASE, interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE}
ACQUIRES = {interpreter._ir.MEM_SEMANTIC.ACQUIRE, interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE}


class AbandonedProgram(BaseException):
    """Ends a program whose launch is over; not an Exception, which the interpreter would wrap."""


@dataclass(eq=False)
class Write:
    """Elements written by a program, in the order of their addresses, and what was there before it became visible."""

    program: int
    pointers: NDArray[np.uint64]
    values: NDArray[Any]
    before: NDArray[Any] | None = None

    def at(self, pointers: NDArray[np.uint64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Where among the elements written these lie, and which of these lie there."""
        index = np.searchsorted(self.pointers, pointers).clip(max=self.pointers.size - 1)
        return index, self.pointers[index] == pointers


class Memory:
    """What each program sees of memory, as far as memory promises."""

    def __init__(self, programs: int, weak: bool, chance: random.Random) -> None:
        self.weak, self.chance = weak, chance
        self.waiting: list[list[Write]] = [[] for _ in range(programs)]
        self.history: list[Write] = []
        self.acquired = [0] * programs  # how much of the history a program must have seen

    def load(self, program: int, pointers: Any, mask: Any, other: Any, dtype: Any, volatile: bool) -> NDArray[Any]:
        if self.weak:
            self._flush_own(program, pointers[mask])
        values = native.load(pointers, mask, other, dtype)
        if not self.weak or volatile or self.chance.random() > STALE:
            return values
        known = self.chance.randint(self.acquired[program], len(self.history))
        for write in reversed(self.history[known:]):
            index, hit = write.at(pointers)
            hit &= mask
            if hit.any():
                if write.program == program:
                    break
                values = np.where(hit, write.before[index].view(values.dtype), values)
        return values

    def store(self, program: int, pointers: Any, values: Any, mask: Any) -> None:
        if not self.weak:
            native.store(pointers, values, mask)
            return
        pointers, values, mask = np.broadcast_arrays(pointers, values, mask)
        order = np.argsort(pointers[mask], kind="stable")
        if order.size:
            self._flush_own(program, pointers[mask])
            self.waiting[program].append(Write(program, pointers[mask][order], values[mask][order]))

    def atomic(self, program: int, pointers: Any, sem: Any, act: Callable[[], Any]) -> Any:
        if not self.weak:
            return act()
        if sem in RELEASES:
            self.flush(program)
        pointers = np.sort(np.ravel(pointers))
        before = np.frombuffer(self._bytes(pointers), dtype=np.int32)
        found = act()
        after = np.frombuffer(self._bytes(pointers), dtype=np.int32)
        if (before != after).any():
            self.history.append(Write(program, pointers, after, before))
        if sem in ACQUIRES:
            self.acquired[program] = len(self.history)
        return found

    def pass_time(self, program: int) -> None:
        if self.waiting[program] and self.chance.random() < FLUSH:
            self._show(self.waiting[program].pop(self.chance.randrange(len(self.waiting[program]))))

    def flush(self, program: int) -> None:
        """What the program stored becomes visible to all."""
        for write in self.waiting[program]:
            self._show(write)
        self.waiting[program].clear()

    def _flush_own(self, program: int, pointers: NDArray[np.uint64]) -> None:
        for write in [write for write in self.waiting[program] if write.at(pointers)[1].any()]:
            self._show(write)
            self.waiting[program].remove(write)

    def _show(self, write: Write) -> None:
        everywhere = np.ones(write.pointers.shape, bool)
        write.before = native.load(write.pointers, everywhere, np.zeros_like(write.values), write.values.dtype)
        native.store(write.pointers, write.values, everywhere)
        self.history.append(write)

    @staticmethod
    def _bytes(pointers: NDArray[np.uint64]) -> bytes:
        nothing = np.zeros(pointers.shape, np.int32)
        return native.load(pointers, np.ones(pointers.shape, bool), nothing, np.dtype(np.int32)).tobytes()


class Launch:
    """The programs of one launch, of which at any time one runs."""

    def __init__(self, run: Callable[[], None], places: list[tuple[int, ...]], seed: int, weak: bool) -> None:
        self.run, self.places = run, places
        self.chance = random.Random(seed)
        self.memory = Memory(len(places), weak, self.chance)
        self.turns = [threading.Semaphore(0) for _ in places]
        self.alive = list(range(len(places)))
        self.over = threading.Event()
        self.failure: BaseException | None = None
        self.ended = False

    def complete(self, limit_s: float) -> None:
        """Run all programs to their end; if that takes longer than ``limit_s`` abandon them and fail."""
        threads = [threading.Thread(target=self._program, args=(p,), daemon=True) for p in self.alive]
        for thread in threads:
            thread.start()
        self._pass_on()
        if not self.over.wait(limit_s):
            stuck = [self.places[p] for p in self.alive]
            self.failure = TimeoutError(f"programs {stuck} were still running after {limit_s} s")
        self.ended = True
        for turn in self.turns:
            turn.release()
        for thread in threads:
            thread.join(5.0)
        if self.failure is not None:
            raise self.failure

    def point(self, program: int, chance: float = SWITCH) -> None:
        """Where a program touches memory another may go on, and an abandoned one ends."""
        if self.chance.random() < chance and not self.ended:
            self._pass_on()
            self._await_turn(program)
        if self.ended:
            raise AbandonedProgram
        self.memory.pass_time(program)

    def current(self) -> int:
        return self.places.index(interpreter.interpreter_builder.grid_idx)

    def _program(self, program: int) -> None:
        try:
            self._await_turn(program)
            self.run()
            self.memory.flush(program)
        except AbandonedProgram:
            pass
        except BaseException as failure:  # of any kind: it belongs to whoever launched
            self.failure = self.failure or failure
            self.over.set()
            return
        self.alive.remove(program)
        if self.alive:
            self._pass_on()
        else:
            self.over.set()

    def _pass_on(self) -> None:
        self.turns[self.chance.choice(self.alive)].release()

    def _await_turn(self, program: int) -> None:
        self.turns[program].acquire()
        if self.ended:
            raise AbandonedProgram
        interpreter.interpreter_builder.grid_idx = self.places[program]


@contextmanager
def concurrent_programs(seed: int = 0, *, weak: bool = False, limit_s: float = 20.0) -> Iterator[None]:
    """Interpreted kernels run all programs of a launch side by side, in an order that the seed decides."""
    running: list[Launch] = []
    builder, execute = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    launches = 0

    def launched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        kernel, places = self.fn, []

        def program(**bound: Any) -> None:  # the interpreter calls it for one program after another
            nonlocal launches
            places.append(interpreter.interpreter_builder.grid_idx)
            if len(places) == math.prod(interpreter.interpreter_builder.grid_dim):
                launches += 1
                running.append(Launch(lambda: kernel(**bound), places, hash((seed, launches)), weak))
                running[-1].complete(limit_s)

        program.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
        self.fn = program
        try:
            return execute(self, *arguments, **keywords)
        except interpreter.InterpreterError:
            if running and running[-1].failure is not None:
                raise running[-1].failure from None
            raise
        finally:
            running.clear()

    def load(self: Any, ptrs: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: bool) -> Any:
        launch, dtype = running[-1], ptrs.get_element_ty()
        kind = interpreter._get_np_dtype(dtype)
        fill = np.zeros_like(ptrs.data, dtype=kind) if other is None else other.data
        program = launch.current()
        launch.point(program)
        values = launch.memory.load(program, ptrs.data, mask.data, fill, kind, bool(is_volatile))
        return interpreter.TensorHandle(values, dtype)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> None:
        launch = running[-1]
        program = launch.current()
        launch.point(program)
        launch.memory.store(program, ptrs.data, value.data, mask.data)

    def atomic(method: Callable[..., Any]) -> Callable[..., Any]:
        def act(self: Any, *arguments: Any) -> Any:
            launch, sem = running[-1], arguments[-2]
            pointer = next(a for a in arguments if isinstance(a, interpreter.TensorHandle))
            program = launch.current()
            launch.point(program, 1.0)
            return launch.memory.atomic(program, pointer.data, sem, lambda: method(self, *arguments))

        return act

    with (
        patch.object(interpreter.GridExecutor, "__call__", launched),
        patch.object(builder, "create_masked_load", load),
        patch.object(builder, "create_masked_store", store),
        patch.object(builder, "create_atomic_rmw", atomic(builder.create_atomic_rmw)),
        patch.object(builder, "create_atomic_cas", atomic(builder.create_atomic_cas)),
        quick_interpreter(),
    ):
        yield
