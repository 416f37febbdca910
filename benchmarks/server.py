"""The server's figures: what HTTP costs, many streams at once, and more requests than it can serve.

    python benchmarks/server.py overhead --model DIR     # 8 streams against LLM.generate, in turn, one thread each
    python benchmarks/server.py load --seconds 300       # 200 streams at once: errors, ledger rows, memory, first token
    python benchmarks/server.py overload --seconds 60    # ten times the requests that fit: who is served, how fast

Each starts `hadal serve` in a process of its own, with its data in a temporary folder, and calls it on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from hadal.engine import SamplingParams
from hadal.llm import LLM

WORDS = (
    "ship",
    "sea",
    "light",
    "king",
    "tower",
    "garden",
    "winter",
    "road",
    "song",
    "stone",
    "bird",
    "friend",
    "storm",
)


@dataclass
class Server:
    """A running `hadal serve`."""

    process: subprocess.Popen[str]
    port: int
    data: Path
    memory: list[float] = field(default_factory=list)  # MiB, sampled

    def sample_memory(self) -> None:
        """Note the resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)  # type: ignore[index]

    def rows(self) -> Counter[str]:
        """Finished rows of the ledger by finish reason."""
        with sa.create_engine(f"sqlite:///{self.data}/hadal.db").connect() as connection:
            return Counter(connection.execute(sa.text("select finish_reason from ledger")).scalars())


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    """A server until the block ends; SIGTERM must then end it with exit code 0."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hadal.cli", "serve", "--port", "0", "--data", folder, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        server = Server(process, int(re.search(r":(\d+)", line.split("http://")[1])[1]), Path(folder))  # type: ignore[index]
        try:
            asyncio.run(until_ready(server))
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(90)
            assert code == 0, f"the server ended with exit code {code}"


async def until_ready(server: Server) -> None:
    """Wait for the model."""
    for _ in range(600):
        try:
            if (await call(server, "GET /readyz"))[0] == 200:
                return
        except OSError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the server does not become ready")


@dataclass
class Answer:
    """One streamed answer; moments are of time.perf_counter."""

    status: int
    begun: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    whole: bool = False  # whether the end was seen
    error: str = ""
    come_back: float = 0.0  # seconds, as Retry-After says

    @property
    def pace(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first else 0.0


async def call(server: Server, what: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body of a request that is answered at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await write(writer, what, body)
    head = await reader.readuntil(b"\r\n\r\n")
    rest = await reader.read()
    writer.close()
    return int(head.split()[1]), rest


async def write(writer: asyncio.StreamWriter, what: str, body: Any) -> None:
    """Send a request of one connection."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{what} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
    writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + data)
    await writer.drain()


async def stream(server: Server, body: dict[str, Any]) -> Answer:
    """One chat answer, read to its end."""
    answer = Answer(0, time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 22)
    try:
        await write(writer, "POST /v1/chat/completions", body | {"stream": True})
        head = await reader.readuntil(b"\r\n\r\n")
        answer.status = int(head.split()[1])
        told = re.search(rb"(?i)retry-after: (\d+)", head)
        answer.come_back = float(told[1]) if told else 0.0
        while line := await reader.readline():
            if line.startswith(b'data: {"error'):
                answer.error = line.decode()
            elif b'"content":"' in line or b'"reasoning_content":"' in line:
                answer.last = time.perf_counter()
                # The opening chunk has an empty content.
                if not answer.first and b'"role"' not in line:
                    answer.first = answer.last
            if b'"completion_tokens":' in line:
                answer.tokens = int(line.split(b'"completion_tokens":')[1].split(b",")[0])
            answer.whole |= line.startswith(b"data: [DONE]")
    finally:
        writer.close()
    return answer


def question(model: str, source: random.Random, tokens: int, words: int = 40) -> dict[str, Any]:
    """A conversation that shares no prefix with the others."""
    text = " ".join(source.choice(WORDS) for _ in range(words))
    return {
        "model": model, "messages": [{"role": "user", "content": f"Tell a story with {text}"}],
        "thinking": {"type": "disabled"}, "temperature": 1.0, "max_tokens": tokens, "seed": source.randrange(2**31),
    }  # fmt: skip


async def keep_asking(server: Server, args: argparse.Namespace, number: int, seconds: float) -> list[Answer]:
    """`number` clients that ask again once they are answered, or about when one that was turned away may return."""
    end, answers = time.perf_counter() + seconds, []

    async def client(seed: int) -> None:
        source = random.Random(seed)
        while time.perf_counter() < end:
            answers.append(await stream(server, question(args.name, source, args.tokens)))
            if answers[-1].status != 200:
                await asyncio.sleep(answers[-1].come_back * source.uniform(0.5, 1.5))

    async def watch() -> None:
        while time.perf_counter() < end:
            server.sample_memory()
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(args.seed + i) for i in range(number)))
    return answers


def percentile(values: list[float], share: float) -> float:
    """A value of the sorted list."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def measure_load(args: argparse.Namespace) -> dict[str, Any]:
    """Many streams at once for a while: nothing may fail or be lost. Little memory for contexts fills at once."""
    with serving(
        args.model, "--max-concurrent", str(args.streams), "--max-wait-seconds", "600", "--cache-memory", "512MiB"
    ) as server:
        answers = asyncio.run(keep_asking(server, args, args.streams, args.seconds))
        rows = server.rows()
        first = [a.first - a.begun for a in answers if a.first]
        bad = [a for a in answers if a.status != 200 or not a.whole or a.error]
        return {
            "streams": args.streams, "seconds": args.seconds, "answers": len(answers), "failed": len(bad),
            "ledger_rows_missing": len(answers) - len(bad) - sum(rows[r] for r in ("stop", "length", "tool_calls")),
            "tokens_per_second": round(sum(a.tokens for a in answers) / args.seconds),
            "first_token_p50_s": round(percentile(first, 0.5), 3),
            "first_token_p99_s": round(percentile(first, 0.99), 3),
            "memory_mib_by_minute": [round(m) for m in server.memory[::60]], "memory_mib_end": round(server.memory[-1]),
        }  # fmt: skip


def measure_overload(args: argparse.Namespace) -> dict[str, Any]:
    """As many clients as fit, then ten times as many: the pace of those who are served."""
    fit = 16
    with serving(args.model, "--max-concurrent", str(fit), "--max-waiting", str(fit)) as server:
        calm = asyncio.run(keep_asking(server, args, fit, args.seconds / 2))
        crowded = asyncio.run(keep_asking(server, args, 10 * fit, args.seconds))
    served = [a for a in crowded if a.status == 200]
    alone, together = (statistics.median(a.pace for a in some if a.tokens > 20) for some in (calm, served))
    return {
        "clients": 10 * fit, "statuses": dict(Counter(a.status for a in crowded)),
        "broken": sum(not a.whole or bool(a.error) for a in served),
        "pace_calm": round(alone, 1), "pace_crowded": round(together, 1), "pace_kept": round(together / alone, 3),
    }  # fmt: skip


def measure_overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of 8 answers at once through HTTP and through LLM.generate, in turn."""
    torch.set_num_threads(1)
    llm = LLM(args.model, max_concurrent=8, prefix_cache=False)
    ratios, rates = [], []
    with serving(args.model, "--threads", "1", "--max-concurrent", "8") as server:
        for turn in range(args.rounds + 1):
            source = random.Random(args.seed + turn)
            bodies = [question(args.name, source, args.tokens) | {"ignore_eos": True} for _ in range(8)]

            async def ask(bodies: list[dict[str, Any]] = bodies) -> list[Answer]:
                return await asyncio.gather(*(stream(server, body) for body in bodies))

            begun = time.perf_counter()
            told = asyncio.run(ask())
            through = sum(a.tokens for a in told) / (time.perf_counter() - begun)
            params = [
                SamplingParams(max_tokens=args.tokens, seed=b["seed"], temperature=1.0, ignore_eos=True) for b in bodies
            ]
            begun = time.perf_counter()
            plain = llm.chat([b["messages"] for b in bodies], params, thinking=False)
            direct = sum(len(o.outputs[0].token_ids) for o in plain) / (time.perf_counter() - begun)
            if turn:  # the first warms both up
                ratios.append(through / direct)
                rates.append((through, direct))
    return {
        "server_tokens_per_second": round(statistics.median(r[0] for r in rates)),
        "generate_tokens_per_second": round(statistics.median(r[1] for r in rates)),
        "share_kept": [round(r, 3) for r in sorted(ratios)], "median": round(statistics.median(ratios), 3),
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=("overhead", "load", "overload"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.name = Path(args.model).resolve().name
    measure = {"overhead": measure_overhead, "load": measure_load, "overload": measure_overload}[args.measure]
    print(json.dumps(measure(args), indent=2))


if __name__ == "__main__":
    main()
