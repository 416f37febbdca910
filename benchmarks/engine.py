"""The engine's figures: throughput, its own share of a step, prefixes, speculation, bytes of context, a million tokens.

    python benchmarks/engine.py                          # all but the million
    python benchmarks/engine.py overhead --model DIR     # one of: overhead prefix speculation bytes million
    python benchmarks/engine.py million --tokens 1000000

Wall time, on as many threads as --threads says. `overhead` runs 1, 8 and 32 greedy requests and takes the time inside
the native calls off each step. `speculation` answers conversations of the corpus with and without drafts, in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hadal.checkpoint import load_model
from hadal.engine import Engine, Request, SamplingParams
from hadal.kernels.cpu.team import Team
from hadal.llm import LLM
from hadal.model import Model
from hadal.plan import count

MEASURES = ("overhead", "prefix", "speculation", "bytes", "million")


def requests(engine: Engine, prompts: list[list[int]], tokens: int, **params: Any) -> list[Request]:
    """Queue one request per prompt."""
    made = [engine.prepare(p, SamplingParams(**({"max_tokens": tokens, "temperature": 0.0} | params))) for p in prompts]
    for request in made:
        engine.submit(request)
    return made


def random_prompts(model: Model, number: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids that share no prefix."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.config.vocab_size, (number, length), generator=g).tolist()


@contextmanager
def native_seconds() -> Iterator[list[float]]:
    """Seconds inside native calls, added up while the block runs."""
    spent, run = [0.0], Team.run_at

    def timed(*args: Any, **options: Any) -> int:
        start = time.perf_counter()
        try:
            return run(*args, **options)
        finally:
            spent[0] += time.perf_counter() - start

    Team.run_at = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Team.run_at = run  # type: ignore[method-assign]


def measure_overhead(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of greedy decoding behind 512 tokens, and what of a step is spent outside the native calls."""
    model = load_model(args.model, device="cpu")
    rows = []
    for number in (1, 8, 32):
        engine = Engine(model, max_concurrent=32, speculation=0, prefix_cache=False)
        requests(engine, random_prompts(model, number, 512), 40 + 64 * args.rounds, ignore_eos=True)
        while engine.stats.generated < number * 20:
            engine.step()
        rates, shares = [], []
        for _ in range(args.rounds):
            with native_seconds() as native:
                before, start = engine.stats.generated, time.perf_counter()
                while engine.stats.generated < before + 64 * number:
                    engine.step()
                seconds = time.perf_counter() - start
            rates.append((engine.stats.generated - before) / seconds)
            shares.append(1 - native[0] / seconds)
        rows.append({
            "requests": number, "tokens_per_second": statistics.median(rates),
            "outside_kernels": statistics.median(shares), "step_ms": 1e3 * number / statistics.median(rates),
        })  # fmt: skip
    return rows


def measure_prefix(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to the first token of a prompt of 8,192 tokens, of the same again, and of one that goes on from it."""
    model, length = load_model(args.model, device="cpu"), 8192
    rows = []
    for number in range(args.rounds):
        engine = Engine(model)
        (prompt,) = random_prompts(model, 1, length, number)
        times = []
        for ids in (prompt, prompt, prompt + prompt[:20]):
            start = time.perf_counter()
            (request,) = requests(engine, [ids], 1)
            while engine.busy:
                engine.step()
            times.append(time.perf_counter() - start)
        assert request.cache_reason == "hit"
        rows.append(times)
    first, again, further = (statistics.median(column) for column in zip(*rows, strict=True))
    return [{
        "first_s": first, "again_s": again, "20_more_s": further,
        "again_over_first": statistics.median(b / a for a, b, _ in rows),
    }]  # fmt: skip


def measure_speculation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One answer at a time on the embedded model, with and without drafts; the answers must be the same."""
    prompts = ["Tell me a story about a fox.", "What can you do?", "Who are you?", "Write three sentences about rain."]
    rows = []
    for temperature in (0.0, 0.7, 1.0):
        sides = {depth: LLM("nano", device="cpu", speculation=depth, prefix_cache=False) for depth in (0, None)}
        rates: dict[Any, list[float]] = {0: [], None: []}
        for _ in range(args.rounds):
            said = {}
            for depth, llm in sides.items():
                params = SamplingParams(max_tokens=200, temperature=temperature, seed=1, ignore_eos=True)
                tokens, start = 0, time.perf_counter()
                answers = []
                for text in prompts:
                    (out,) = llm.chat([{"role": "user", "content": text}], params, thinking=False)
                    answers.append(out.outputs[0].token_ids)
                    tokens += len(answers[-1])
                rates[depth].append(tokens / (time.perf_counter() - start))
                said[depth] = answers
            assert said[0] == said[None], "speculation changed a token"
        stats = sides[None].engine.stats
        pairs = [b / a for a, b in zip(rates[0], rates[None], strict=True)]
        rows.append({
            "temperature": temperature, "plain": statistics.median(rates[0]), "drafted": statistics.median(rates[None]),
            "over_plain": statistics.median(pairs), "acceptance": stats.acceptance,
            "drafts_per_step": stats.drafted / max(stats.steps, 1),
        })  # fmt: skip
    return rows


def measure_bytes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes that a token of context takes, beside the official layout's."""
    model = load_model(args.model, device="cpu")
    state = model.new_state()
    ids = random_prompts(model, 1, 4096)[0]
    before = model.pool.live
    model.logits_ragged(torch.tensor(ids), [len(ids)], [state])
    taken = (model.pool.live - before) * model.pool.page_bytes / len(ids)
    official = count(model.config)
    return [{
        "bytes_per_token": taken, "official": official.kv_bytes_per_token,
        "over_official": taken / official.kv_bytes_per_token, "fixed_bytes": model.home_bytes,
        "fixed_official": official.state_bytes,
    }]  # fmt: skip


def measure_million(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A prompt of `--tokens` on the embedded model, decode behind it and behind 4,096, and a follow-up of 20 tokens."""
    model = load_model("nano", device="cpu")
    engine = Engine(model, token_budget=2048, snapshot_every=1 << 17, speculation=0)
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (prompt,) = random_prompts(model, 1, args.tokens)
    start = time.perf_counter()
    (request,) = requests(engine, [prompt], 65, ignore_eos=True)
    while not request.output_ids:
        engine.step()
        if engine.stats.steps % 512 == 0:
            print(f"{request.computed:,} tokens after {time.perf_counter() - start:.0f} s", flush=True)
    first = time.perf_counter() - start
    far = _step_seconds(engine)
    start = time.perf_counter()
    requests(engine, [prompt + prompt[:20]], 1)
    while engine.busy:
        engine.step()
    follow = time.perf_counter() - start
    requests(engine, random_prompts(model, 1, 4096, 9), 65, ignore_eos=True)
    while engine.stats.generated < 67:
        engine.step()
    near = _step_seconds(engine)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [{
        "tokens": len(prompt), "prefill_s": first, "peak_gib": peak / 2**20, "grown_gib": (peak - at_start) / 2**20,
        "decode_ms": 1e3 * far, "decode_4096_ms": 1e3 * near, "over_4096": far / near, "20_more_s": follow,
    }]  # fmt: skip


def _step_seconds(engine: Engine) -> float:
    """The median step until the request that runs ends."""
    times = []
    while engine.busy:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[:-1])


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", choices=[*MEASURES, []])
    parser.add_argument("--model", default="nano", help="a directory, a Hub repo id or nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the million's prompt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.measures or MEASURES[:-1]:
        for row in globals()[f"measure_{name}"](args):
            shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            print(json.dumps({"measure": name, "model": args.model} | shown), flush=True)


if __name__ == "__main__":
    main()
