"""What the verbs share: options by their meaning, loading a model, tables, and errors in one sentence."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from hadal.llm import LLM


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size; write for example 8GiB or 500MB")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def size(text: str, **more: Any) -> Any:
    """An option for a number of bytes."""
    return typer.Option(parser=_bytes, metavar="SIZE", help=text, **more)


Served = Annotated[str, typer.Argument(help="A directory, a Hub repo id or `nano`.")]
Model = Annotated[str, typer.Option("--model", "-m", help="A directory, a Hub repo id or `nano` (embedded).")]
Mode = Annotated[str, typer.Option(help="`fast`, or `faithful`: rounds exactly where the official code rounds.")]
Device = Annotated[str, typer.Option(help="`auto`, `cpu` or an accelerator's name.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 always takes the likeliest token; the model's own if left out.")
]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens that together reach this probability.")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]
MaxContext = Annotated[
    int | None, typer.Option(help="Most tokens of a prompt and its answer; the model's own limit if left out.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all of them, but one fewer to serve.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_F = TypeVar("_F", bound=Callable[..., Any])


def one_sentence_errors(verb: _F) -> _F:
    """Errors that Hadal raises on purpose become one sentence and exit code 2; any other keeps its traceback."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except ValueError as error:
            if not type(error).__module__.startswith("hadal."):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except BrokenPipeError:
            raise  # typer ends quietly when nobody reads on
        except OSError as error:
            cause = f"cannot use {error.filename} ({error.strerror}); give another path" if error.filename else error
            print(f"error: {cause}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run  # type: ignore[return-value]


def load_llm(model: str, mode: str, device: str, max_context: int | None, **options: Any) -> LLM:
    """The model of a verb that answers one request at a time unless `options` say otherwise."""
    from hadal.llm import LLM

    return LLM(model, mode=mode, device=device, max_context=max_context, **({"max_concurrent": 1} | options))


def print_progress(line: str) -> None:
    """A line of progress, where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Facts by name: a table for people, or one JSON object."""
    if as_json:
        return print_json(facts)
    print_table(None, ["fact", "value"], [[_words(k), _words(v)] for k, v in facts.items() if v is not None])


def print_json(value: Any) -> None:
    """One JSON object on one line."""
    print(json.dumps(value, ensure_ascii=False, default=str))


def print_table(title: str | None, columns: list[str], rows: list[list[Any]]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    Console().print(table)


def _words(value: Any) -> str:
    """A fact for people."""
    if isinstance(value, dict):
        return ", ".join(f"{_words(v)} {k}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, (int, float)):
        return f"{value:,}"
    return str(value).replace("_", " ")
