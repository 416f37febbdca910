"""Jobs, steps and the thread team: how emitted kernels run one after the other on several threads.

A kernel is a function `(args, step, thread, threads)`: `args` are the words of one job (addresses and sizes that never
change), `step` the words of the current forward pass. A program is a list of jobs that all threads walk through
together, with a barrier after each job that asks for one; one native call runs the whole list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hadal.kernels.cpu.ir import F32, I64, PTR, Function, Module, Operand, Value
from hadal.kernels.cpu.target import Isa

WORD = 8
JOB_WORDS = 3  # function, arguments, whether a barrier follows
YIELD_AFTER = 4096  # turns of a waiting thread before it offers its core to others


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
    """`run(jobs, count, step, barrier, thread, threads)` and `serve(slot, spins)`, which a helper thread sits in.

    A barrier word counts arrivals over the whole run. A slot holds one helper's state on its own cache line: 0 asleep,
    1 idle, 2 engaged, 3 running; then its thread number, and the words of `run`.
    """
    with module.function(
        "run", {"jobs": PTR, "count": I64, "step": PTR, "barrier": PTR, "thread": I64, "threads": I64}
    ) as f:
        passed = f.var(f.const(I64, 0))
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
    with module.function("serve", {"slot": PTR, "spins": I64}) as f:
        idle = f.var(f.const(I64, 0))
        turns = f.var(f.const(I64, 0))
        for loop in f.repeat_while():
            state = f.var(_atomic(f, f["slot"]))
            with f.when(state.get().equals(3)):
                words = [f.load(PTR, f["slot"], WORD * w) for w in (2, 4, 5)]
                count, thread, threads = (f.load(I64, f["slot"], WORD * w) for w in (3, 1, 6))
                f.do("run", words[0], count, words[1], words[2], thread, threads)
                f.line("store atomic i64 1, ptr %slot seq_cst, align 8")
                idle.set(0)
            with f.when(state.get().equals(1)):
                idle.set(idle.get() + 1)
                with f.when(idle.get() > f["spins"]):
                    swapped = f.emit("{ i64, i1 }", "cmpxchg ptr %slot, i64 1, i64 0 seq_cst seq_cst")
                    slept = f.emit("i1", f"extractvalue {{ i64, i1 }} {swapped.name}, 1")
                    with f.when(slept):
                        state.set(0)
            loop.leave_unless(state.get().differs(0))
            _pause(f, isa, turns)
    with module.function("engage", {"slot": PTR, "result": PTR}) as f:
        swapped = f.emit("{ i64, i1 }", "cmpxchg ptr %slot, i64 1, i64 2 seq_cst seq_cst")
        engaged = f.emit("i1", f"extractvalue {{ i64, i1 }} {swapped.name}, 1")
        f.store(engaged.zext(I64), f["result"])


def _atomic(f: Function, pointer: Value) -> Value:
    return f.emit(I64, f"load atomic i64, ptr {pointer.name} seq_cst, align 8")


def _pause(f: Function, isa: Isa, turns: object) -> None:
    """A breath of a waiting thread; now and then the core is offered to whoever else may need it."""
    if isa.name == "neon":
        f.do("llvm.aarch64.hint", f.const("i32", 1))
    else:
        f.do("llvm.x86.sse2.pause")
    turn = turns.get() + 1  # type: ignore[attr-defined]
    turns.set(turn)  # type: ignore[attr-defined]
    with f.when((turn & (YIELD_AFTER - 1)).equals(0)):
        f.call("i32", "sched_yield")
