"""The terminal's side of a conversation: asking for a line, showing an answer as it comes."""

from __future__ import annotations

import time
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text


def ask(console: Console) -> str | None:
    """The next non-empty line, or None to leave."""
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        except UnicodeDecodeError as error:
            console.print(f"[red]error: that line is not {error.encoding} text; type it again[/red]")
            continue
        if line == "/exit":
            return None
        if line:
            return line


def show(console: Console, stream: Any) -> dict[str, Any] | None:
    """Print an answer as it comes and return it as the assistant's message, or None when the engine failed on it."""
    said: dict[str, Any] = {"role": "assistant", "content": ""}
    reasoning, tokens, start, first = "", 0, time.perf_counter(), None
    try:
        for delta in stream:
            first = first or time.perf_counter()
            tokens += len(delta.token_ids)
            if delta.reasoning:
                console.print(Text(printable(delta.reasoning), "dim"), end="")
                reasoning += delta.reasoning
            if delta.text:
                console.print(Text("\n\n" if reasoning and not said["content"] else ""), end="")
                console.print(Text(printable(delta.text)), end="")
                said["content"] += delta.text
            if delta.finish_reason == "error":
                console.print(Text(f"\nerror: {delta.error}", "red"))
                return None
    except KeyboardInterrupt:
        stream.close()
    end = time.perf_counter()
    speed = (tokens - 1) / (end - (first or end)) if tokens > 1 and first and end > first else 0.0
    console.print(f"\n[dim]{tokens} tokens, {speed:.1f} tokens/s, first after {(first or end) - start:.2f} s[/dim]")
    return said | ({"reasoning_content": reasoning} if reasoning else {})


def printable(text: str) -> str:
    """Without control characters: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
