"""`hadal chat` and `hadal generate`: one person and one model in a terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from hadal.cli.options import (
    AsJson,
    Device,
    MaxContext,
    MaxTokens,
    Mode,
    Model,
    Seed,
    Served,
    Temperature,
    TopP,
    load_llm,
    one_sentence_errors,
    print_json,
)


@one_sentence_errors
def chat(
    model: Served = "nano",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    think: Annotated[bool, typer.Option(help="Let the model reason before it answers.")] = True,
    effort: Annotated[str | None, typer.Option(help="How hard to think: low, high or max.")] = None,
    max_tokens: MaxTokens = 4096,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    mode: Mode = "fast",
    device: Device = "auto",
    max_context: MaxContext = None,
) -> None:
    """Talk to a model in the terminal; /exit or end of input leaves, Ctrl-C stops an answer."""
    from rich.console import Console
    from rich.text import Text

    from hadal.engine import RequestError
    from hadal.terminal import ask, show
    from hadal.text import ChatError

    console = Console(highlight=False, soft_wrap=True)
    llm = load_llm(model, mode, device, max_context)
    if effort is not None and effort not in llm.efforts:
        raise RequestError(f"unknown effort {effort!r}; this model knows {', '.join(llm.efforts)}", "effort")
    params = llm.default_params(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    console.print(f"[dim]{llm.name} on {llm.engine.device}; /exit leaves[/dim]")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while (line := ask(console)) is not None:
        turn = [*messages, {"role": "user", "content": line}]
        try:
            said = show(console, llm.stream_chat(turn, params, thinking=think, reasoning_effort=effort))
        except (ChatError, RequestError) as error:
            console.print(Text(f"error: {error}", "red"))
            continue
        if said is not None:
            messages = [*turn, said]


@one_sentence_errors
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue, as it is (no chat format).")],
    model: Model = "nano",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End in front of this text; may be repeated.")] = None,
    mode: Mode = "fast",
    device: Device = "auto",
    max_context: MaxContext = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    llm = load_llm(model, mode, device, max_context)
    params = llm.default_params(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    if as_json:
        output = llm.generate(prompt, params)[0]
        answer = output.outputs[0]
        print_json(
            {
                "prompt": prompt, "text": answer.text, "finish_reason": answer.finish_reason, "error": answer.error,
                "prompt_token_ids": output.prompt_token_ids, "token_ids": answer.token_ids,
            }
        )  # fmt: skip
        raise typer.Exit(1 if answer.error else 0)
    from hadal.terminal import printable

    shown = printable if sys.stdout.isatty() else str
    for delta in llm.stream(prompt, params):
        print(shown(delta.text), end="", flush=True)
        if delta.error:
            print(f"\nerror: {delta.error}", file=sys.stderr)
            raise typer.Exit(1)
    print()
