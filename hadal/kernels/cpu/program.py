"""Jobs, steps and the thread team: how emitted kernels run one after the other on several threads.

A kernel is a function `(args, step, thread, threads)`: `args` are the words of one job (addresses and sizes that never
change), `step` the words of the current forward pass. A program is a list of jobs that all threads walk through
together, with a barrier after each job that asks for one; one native call runs the whole list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hadal.kernels.cpu.ir import F32, I64, PTR, Function, Module, Operand, Value, Variable
from hadal.kernels.cpu.layout import SPAN
from hadal.kernels.cpu.target import Isa

WORD = 8
JOB_WORDS = 3  # function, arguments, whether a barrier follows
YIELD_AFTER = 4096  # turns of a waiting thread before it offers its core to others
LATE_AFTER = 1 << 16  # turns, a few milliseconds, that no fair share of work makes a thread wait
_ACTIVE = 12  # word of a slot: whether the lead is at work


class Kernel:
    """A kernel being written: `k.f` the function, `k.arg` and `k.step` read words by name."""

    def __init__(self, f: Function, isa: Isa, arguments: Sequence[str], fields: Sequence[str]) -> None:
        self.f, self.isa = f, isa
        self._arguments, self._fields = list(arguments), list(fields)

    def arg(self, name: str) -> Value:
        """A word of the job, as an integer."""
        return self.f.load(I64, self.f["args"], WORD * self._arguments.index(name))

    def step(self, name: str) -> Value:
        """A word of the step, as an integer."""
        return self.f.load(I64, self.f["step"], WORD * self._fields.index(name))

    def ptr(self, name: str) -> Value:
        """A word of the job, as an address."""
        return self.f.load(PTR, self.f["args"], WORD * self._arguments.index(name))

    def step_ptr(self, name: str) -> Value:
        """A word of the step, as an address."""
        return self.f.load(PTR, self.f["step"], WORD * self._fields.index(name))

    def real(self, name: str) -> Value:
        """A word of the job that holds a float's bits in its low half."""
        return self.f.load(F32, self.f["args"], WORD * self._arguments.index(name))

    def row(self, array: str, row: Value) -> Value:
        """A packed row's word of a row array."""
        return self.f.load(I64, self.step_ptr(array), row * WORD)

    def span(self, span: Value, name: str) -> Value:
        """A word of a span of the step, given by its number."""
        place = span * (WORD * len(SPAN)) + WORD * SPAN.index(name)
        return self.f.load(I64, self.step_ptr("span_table"), place)

    def angles(self, row: Value, rotary: int) -> Value:
        """Where a packed row's cos and sin lie, in the regime that the job's word says."""
        return self.f.at(self.step_ptr("angles"), (row * 2 + self.arg("regime")) * (rotary * 4))

    def share(self, total: Operand) -> Iterator[Value]:
        """Loop over this thread's contiguous share of 0..total."""
        f = self.f
        total = f.const(I64, total)
        first = total * f["thread"] / f["threads"]
        last = total * (f["thread"] + 1) / f["threads"]
        yield from f.range(last, first)


class KernelModule(Module):
    """A module whose kernels know the fields of the step; `arguments` remembers each kernel's words."""

    def __init__(self, isa: Isa, step_fields: Sequence[str]) -> None:
        super().__init__()
        self.isa, self.step_fields = isa, list(step_fields)
        self.native_bf16 = isa.avx512
        self.arguments: dict[str, list[str]] = {}

    @contextmanager
    def kernel(self, name: str, arguments: str) -> Iterator[Kernel]:
        """Write a kernel whose job has the named words (separated by blanks)."""
        words = arguments.split()
        self.arguments[name] = words
        with self.function(name, {"args": PTR, "step": PTR, "thread": I64, "threads": I64}) as f:
            yield Kernel(f, self.isa, words, self.step_fields)


def emit_runner(module: Module, isa: Isa) -> None:
    """`lead(slots, helpers, jobs, count, step, barrier, result)` for thread 0, `serve(slot, spins)` for the others.

    A barrier word counts arrivals and never goes back, so that a helper which leaves the last barrier late still finds
    it open. A slot holds one helper's state on its own cache line: 0 asleep, 1 idle, 2 engaged, 3 running; then the
    words of `run`. `result` receives the threads that took part, and at how many barriers the lead waited so long that
    another must have been taken off its core.
    """
    words = {"jobs": PTR, "count": I64, "step": PTR, "barrier": PTR, "begun": I64, "thread": I64, "threads": I64}
    words["late"] = PTR
    with module.function("run", words, exported=False) as f:
        passed = f.var(f["begun"])
        for i in f.range(f["count"]):
            job = f.at(f["jobs"], i * (JOB_WORDS * WORD))
            function = f.load(PTR, job)
            f.line(
                f"call void {function.name}(ptr {f.load(PTR, job, WORD).name}, ptr %step, i64 %thread, i64 %threads)"
            )
            with f.when(f.load(I64, job, 2 * WORD).differs(0)):
                passed.set(passed.get() + f["threads"])
                with f.when(f["threads"] > 1):
                    f.emit(I64, "atomicrmw add ptr %barrier, i64 1 seq_cst")
                    turns = f.var(f.const(I64, 0))
                    for loop in f.repeat_while():
                        loop.leave_unless(_atomic(f, f["barrier"]) < passed.get())
                        _pause(f, isa, turns)
                    with f.when(turns.get() > LATE_AFTER):
                        f.store(f.load(I64, f["late"]) + 1, f["late"])
    with module.function("serve", {"slot": PTR, "spins": I64}) as f:
        idle = f.var(f.const(I64, 0))
        turns = f.var(f.const(I64, 0))
        for loop in f.repeat_while():
            state = f.var(_atomic(f, f["slot"]))
            with f.when(state.get().equals(3)):
                f.do("run", *(f.load(kind, f["slot"], WORD * (1 + i)) for i, kind in enumerate(words.values())))
                f.line("store atomic i64 1, ptr %slot seq_cst, align 8")
                idle.set(0)
            with f.when(state.get().equals(1)):
                # While the lead works alone, one who was woken too late for it stays awake for what comes next.
                at_work = _atomic(f, f.at(f["slot"], WORD * _ACTIVE)).differs(0)
                idle.set(at_work.choose(f.const(I64, 0), idle.get() + 1))
                with f.when(idle.get() > f["spins"]), f.when(_swap(f, f["slot"], 1, 0)):
                    state.set(0)
            loop.leave_unless(state.get().differs(0))
            _pause(f, isa, turns)
    common = {name: words[name] for name in ("jobs", "count", "step", "barrier")}
    with module.function("lead", {"slots": PTR, "helpers": I64, **common, "result": PTR}) as f:
        threads = f.var(f.const(I64, 1))
        begun = _atomic(f, f["barrier"])
        _announce(f, 1)
        for i in f.range(f["helpers"]):
            slot = f.load(PTR, f["slots"], i * WORD)
            with f.when(_swap(f, slot, 1, 2)):
                for place, value in enumerate((*(f[name] for name in common), begun, threads.get())):
                    f.store(value, slot, WORD * (1 + place))
                f.store(f.at(slot, WORD * (2 + len(words))), slot, WORD * len(words))
                threads.set(threads.get() + 1)
        for i in f.range(f["helpers"]):
            slot = f.load(PTR, f["slots"], i * WORD)
            with f.when(_atomic(f, slot).equals(2)):
                f.store(threads.get(), slot, 7 * WORD)
                f.line(f"store atomic i64 3, ptr {slot.name} seq_cst, align 8")
        f.store(threads.get(), f["result"])
        f.store(f.const(I64, 0), f["result"], WORD)
        late = f.at(f["result"], WORD)
        f.do("run", *(f[name] for name in common), begun, f.const(I64, 0), threads.get(), late)
        _announce(f, 0)


def _announce(f: Function, active: int) -> None:
    """Tell all helpers whether the lead is at work."""
    for i in f.range(f["helpers"]):
        place = f.at(f.load(PTR, f["slots"], i * WORD), WORD * _ACTIVE)
        f.line(f"store atomic i64 {active}, ptr {place.name} seq_cst, align 8")


def _swap(f: Function, slot: Value, old: int, new: int) -> Value:
    """Change a slot's state from `old` to `new`; whether it was `old`."""
    swapped = f.emit("{ i64, i1 }", f"cmpxchg ptr {slot.name}, i64 {old}, i64 {new} seq_cst seq_cst")
    return f.emit("i1", f"extractvalue {{ i64, i1 }} {swapped.name}, 1")


def _atomic(f: Function, pointer: Value) -> Value:
    return f.emit(I64, f"load atomic i64, ptr {pointer.name} seq_cst, align 8")


def _pause(f: Function, isa: Isa, turns: Variable) -> None:
    """A breath of a waiting thread; now and then the core is offered to whoever else may need it."""
    if isa.name == "neon":
        f.do("llvm.aarch64.hint", f.const("i32", 1))
    else:
        f.do("llvm.x86.sse2.pause")
    turn = turns.get() + 1
    turns.set(turn)
    with f.when((turn & (YIELD_AFTER - 1)).equals(0)):
        f.call("i32", "sched_yield")
