"""One system of the peer benchmarks in its own process: it answers requests on standard input with seconds taken.

    python peer_sides.py NAME PATH THREADS

A request is a JSON line {"work": "prefill" | "decode" | "batch" | "read" | "gemm", "tokens": n, ...}; the answer has
CPU and wall seconds of the work alone, its amount (tokens, bytes, operations) and the process's peak memory.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MARGIN = 512  # positions a sequence may grow by while it is measured
GEMM_SIDE = 1024
GEMM_TIMES = 32
WARM_PROMPT = 1024
WARM_SECONDS = 0.5  # matrix units take a while to reach their pace


class AbsentError(Exception):
    """What a system needs is not installed here."""


@dataclass(frozen=True)
class System:
    """How to drive one system: `fresh(capacity)` begins a sequence, `feed(sequence, ids)` computes its next logits.

    `begin(prompts)` begins several sequences of one length, `step(sequences, ids)` adds a token to each.
    """

    vocabulary: int
    chunk: int
    fresh: Callable[[int], Any]
    feed: Callable[[Any, list[int]], object]
    begin: Callable[[list[list[int]]], Any]
    step: Callable[[Any, list[int]], object]


def open_hadal(path: str) -> System:
    """Hadal as a user gets it: the official files, every setting left alone."""
    import hadal
    from hadal.engine import Engine, SamplingParams

    model = hadal.load_model(path, device="cpu")

    def feed(state: Any, ids: list[int]) -> object:
        return model.logits_ragged(ids, [len(ids)], [state])

    def begin(prompts: list[list[int]]) -> Engine:
        # The whole engine, which chooses its tokens itself: scheduling and sampling are part of its time.
        engine = Engine(model, max_concurrent=len(prompts), prefix_cache=False, speculation=0)
        params = SamplingParams(max_tokens=MARGIN, temperature=0.0, ignore_eos=True)
        requests = [engine.prepare(prompt, params) for prompt in prompts]
        for request in requests:
            engine.submit(request)
        while not all(request.output_ids for request in requests):
            engine.step()
        return engine

    def step(engine: Engine, ids: list[int]) -> None:
        assert len(engine.step()) == len(ids)

    return System(model.config.vocab_size, 2048, lambda capacity: model.new_state(), feed, begin, step)


def open_transformers(path: str, dtype: torch.dtype) -> System:
    """transformers with its own cache; chunks of 512, since its one-shot prompts slow down from 2,048 on."""
    try:
        import transformers
    except ImportError as error:
        raise AbsentError("transformers is not installed") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.DeepseekV4ForCausalLM.from_pretrained(path, dtype=dtype)
    model.eval()

    @torch.no_grad()
    def feed(cache: Any, ids: list[int]) -> object:
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def begin(prompts: list[list[int]]) -> Any:
        cache = transformers.DynamicCache(config=model.config)
        model(torch.tensor(prompts), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def step(cache: Any, ids: list[int]) -> object:
        return model(torch.tensor([ids]).T, past_key_values=cache, use_cache=True, logits_to_keep=1)

    new = functools.partial(transformers.DynamicCache, config=model.config)
    return System(model.config.vocab_size, 512, lambda _: new(), feed, begin, step)


def open_llama(path: str, threads: int) -> System:
    """llama.cpp through the binding of llama-cpp-python, with the library that LLAMA_CPP_LIB_PATH names."""
    try:
        import llama_cpp.llama_cpp as native
    except (ImportError, FileNotFoundError, RuntimeError, OSError) as error:
        raise AbsentError(f"llama.cpp cannot be loaded ({error})") from error
    silence = native.llama_log_callback(lambda level, text, data: None)
    native.llama_log_set(silence, ctypes.c_void_p())
    native.llama_backend_init()
    parameters = native.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = False  # its AMX buffers crash on this architecture; the others change nothing here
    model = native.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        raise AbsentError(f"llama.cpp does not read {path}")

    class Sequence:
        def __init__(self, capacity: int, count: int = 1) -> None:
            self.silence = silence  # must outlive every call
            self.ends = [0] * count
            options = native.llama_context_default_params()
            options.n_ctx, options.n_batch, options.n_ubatch = capacity * count, 2048, 512
            options.n_seq_max = count
            options.n_threads = options.n_threads_batch = threads
            self.context = native.llama_init_from_model(model, options)
            assert self.context, "llama.cpp gave no context"

        def __del__(self) -> None:
            native.llama_free(self.context)

    def feed(sequence: Sequence, ids: list[int]) -> object:
        tokens = (native.llama_token * len(ids))(*ids)
        failed = native.llama_decode(sequence.context, native.llama_batch_get_one(tokens, len(ids)))
        assert not failed, f"llama.cpp failed with {failed}"
        return native.llama_get_logits(sequence.context)

    def add(sequences: Sequence, tokens: list[tuple[int, int]]) -> None:
        """Tokens as (sequence, id), with logits for each sequence's last one."""
        batch = native.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        last = {s: i for i, (s, _) in enumerate(tokens)}
        for i, (s, token) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, sequences.ends[s], 1, s
            batch.logits[i] = last[s] == i
            sequences.ends[s] += 1
        failed = native.llama_decode(sequences.context, batch)
        native.llama_batch_free(batch)
        assert not failed, f"llama.cpp failed with {failed}"

    def begin(prompts: list[list[int]]) -> Sequence:
        sequences = Sequence(len(prompts[0]) + MARGIN, len(prompts))
        for s, prompt in enumerate(prompts):
            add(sequences, [(s, token) for token in prompt])
        return sequences

    def step(sequences: Sequence, ids: list[int]) -> object:
        add(sequences, list(enumerate(ids)))
        return [native.llama_get_logits_ith(sequences.context, i) for i in range(len(ids))]

    vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
    return System(vocabulary, 2048, Sequence, feed, begin, step)


def open_system(name: str, path: str, threads: int) -> System | None:
    """The system called `name`; None for the machine itself."""
    if name == "machine":
        return None
    if name.startswith("hadal"):
        return open_hadal(path)
    if name.startswith("transformers"):
        return open_transformers(path, torch.bfloat16 if name.endswith("bf16") else torch.float32)
    return open_llama(path, threads)


class Worker:
    """Carries out requests; remembers the sequences that decode continues."""

    def __init__(self, system: System | None) -> None:
        self.system = system
        self.sequences: dict[int, Any] = {}
        self.random = torch.Generator().manual_seed(0)
        self.read = functools.cache(_reader)
        self.factors: list[torch.Tensor] = []
        self.warm = 0

    def carry_out(self, request: dict[str, Any]) -> dict[str, float]:
        """Seconds and amount of one request."""
        work, amount = getattr(self, "_" + request.pop("work"))(**request)
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu, "wall": wall, "amount": amount}

    def _prefill(self, tokens: int) -> tuple[Callable[[], object], float]:
        assert self.system
        if self.warm < min(tokens, WARM_PROMPT):
            self.warm = min(tokens, WARM_PROMPT)
            self._fill(self.warm)
        sequence, ids = self.system.fresh(tokens + MARGIN), self._ids(tokens)
        return lambda: self._feed(sequence, ids), tokens

    def _decode(self, context: int, steps: int) -> tuple[Callable[[], object], float]:
        if context not in self.sequences:
            self.sequences[context] = self._fill(context)
            self._feed(self.sequences[context], self._ids(4), 1)
        ids = self._ids(steps)
        return lambda: self._feed(self.sequences[context], ids, 1), steps

    def _batch(self, context: int, steps: int, count: int) -> tuple[Callable[[], object], float]:
        assert self.system
        key = -count * context  # apart from the single sequences
        if key not in self.sequences:
            self.sequences[key] = self.system.begin([self._ids(context) for _ in range(count)])
            self.system.step(self.sequences[key], self._ids(count))
        rows = [self._ids(count) for _ in range(steps)]
        step, sequences = self.system.step, self.sequences[key]
        return lambda: [step(sequences, ids) for ids in rows], steps * count

    def _read(self, nbytes: int) -> tuple[Callable[[], object], float]:
        read = self.read(nbytes)
        times = max(1, 2**29 // nbytes)
        return lambda: [read() for _ in range(times)], nbytes * times

    def _gemm(self) -> tuple[Callable[[], object], float]:
        if not self.factors:
            self.factors = [torch.randn(GEMM_SIDE, GEMM_SIDE).bfloat16() for _ in range(2)]
            began = time.process_time()
            while time.process_time() - began < WARM_SECONDS:
                torch.mm(*self.factors)
        return lambda: [torch.mm(*self.factors) for _ in range(GEMM_TIMES)], 2.0 * GEMM_SIDE**3 * GEMM_TIMES

    def _fill(self, context: int) -> Any:
        assert self.system
        sequence = self.system.fresh(context + MARGIN)
        self._feed(sequence, self._ids(context))
        return sequence

    def _feed(self, sequence: Any, ids: list[int], chunk: int = 0) -> None:
        assert self.system
        for begin in range(0, len(ids), chunk or self.system.chunk):
            self.system.feed(sequence, ids[begin : begin + (chunk or self.system.chunk)])

    def _ids(self, count: int) -> list[int]:
        assert self.system
        return torch.randint(3, self.system.vocabulary, (count,), generator=self.random).tolist()


def _reader(nbytes: int) -> Callable[[], object]:
    """Reads a block of memory as fast as torch can: by the better of a sum and a product with itself."""
    block = torch.ones(nbytes // 4)
    kinds: list[Callable[[], object]] = [block.sum, lambda: torch.dot(block, block)]
    taken = []
    for kind in kinds:
        kind()
        began = time.perf_counter()
        kind()
        taken.append(time.perf_counter() - began)
    return kinds[taken.index(min(taken))]


def main() -> None:
    name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    torch.set_num_threads(threads)
    try:
        system = open_system(name, path, threads)
        if system:
            system.feed(system.fresh(MARGIN), [3, 4])
    except AbsentError as error:
        return answer({"absent": str(error)})
    worker = Worker(system)
    answer({"ready": name})
    for line in sys.stdin:
        taken = worker.carry_out(json.loads(line))
        answer(taken | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


if __name__ == "__main__":
    main()
