"""The `hadal` command: verbs that load what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from hadal.llm import LLM

app = typer.Typer(
    name="hadal",
    help="DeepSeek-V4 from official files to a streaming answer. MODEL is a directory, a Hub repo id or `nano`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size; write for example 8GiB or 500MB")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def _size(text: str) -> Any:
    """An option for a number of bytes."""
    return typer.Option(parser=_bytes, metavar="SIZE", help=text)


Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all of them, but one fewer to serve.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_F = TypeVar("_F", bound=Callable[..., Any])


def _one_sentence_errors(verb: _F) -> _F:
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


@app.command()
@_one_sentence_errors
def serve(
    model: Annotated[str, typer.Argument(help="A directory, a Hub repo id or `nano`.")] = "nano",
    host: Annotated[
        str, typer.Option(help="Address to bind; the default is reachable from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind; 0 takes a free one.")] = 8000,
    mode: Mode = "fast",
    device: Device = "auto",
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests that run at once; more wait.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are turned away.")] = 1024,
    max_context: MaxContext = None,
    cache_memory: Annotated[
        int | None, _size("Memory for the contexts of requests, running and kept; half of what is free if left out.")
    ] = None,
    prefix_folder: Annotated[
        Path | None, typer.Option(help="Keep contexts in this folder too, so that they outlast a restart.")
    ] = None,
    prefix_disk: Annotated[int, _size("Most that this folder may hold.")] = "16GiB",  # type: ignore[assignment]
    speculation: Annotated[
        int | None,
        typer.Option(min=0, help="Most tokens to guess ahead; 0 for none, the draft head's limit if left out."),
    ] = None,
    expert_memory: Annotated[
        int | None, _size("Memory for experts, the rest is read from disk when needed; as fits if left out.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP in the shape of DeepSeek's and OpenAI's chat API."""
    import hadal.server

    llm = _load(
        model, mode, device, max_context, max_concurrent=max_concurrent, max_waiting=max_waiting,
        cache_memory=cache_memory, prefix_folder=prefix_folder, prefix_disk=prefix_disk, speculation=speculation,
        expert_memory=expert_memory, progress=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    hadal.server.run(llm, host=host, port=port, threads=threads)


@app.command()
@_one_sentence_errors
def chat(
    model: Annotated[str, typer.Argument(help="A directory, a Hub repo id or `nano`.")] = "nano",
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
    llm = _load(model, mode, device, max_context)
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


@app.command()
@_one_sentence_errors
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
    llm = _load(model, mode, device, max_context)
    params = llm.default_params(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    if as_json:
        output = llm.generate(prompt, params)[0]
        answer = output.outputs[0]
        _print_json(
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


@app.command()
@_one_sentence_errors
def inspect(
    path: Annotated[str, typer.Argument(help="A model, or a bare config.json or index file.")] = "nano",
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint from its headers alone: layers, formats, parameters, bytes, KV per token."""
    from hadal.checkpoint import inspect as describe

    facts = describe(path).to_dict()
    _print_facts(facts, as_json)


@app.command()
@_one_sentence_errors
def convert(
    src: Annotated[str, typer.Argument(help="Directory with official or Hugging Face tensor names.")],
    dst: Annotated[str, typer.Argument(help="Directory to write.")],
    quantize: Annotated[
        str | None, typer.Option(help="`fp4`: FP4 experts and FP8 dense matrices; `fp8`: FP8 both.")
    ] = None,
    names: Annotated[str, typer.Option(help="`official`, or `hf`: dequantised, for transformers.")] = "official",
    as_json: AsJson = False,
) -> None:
    """Rewrite a checkpoint in the official layout, or for transformers."""
    from hadal.checkpoint import convert as rewrite

    rewrite(src, dst, quantize, names=names)  # type: ignore[arg-type]  # convert itself refuses other words
    if as_json:
        return _print_json({"src": src, "dst": dst, "quantize": quantize, "names": names})
    print(f"wrote {dst}")


@app.command()
@_one_sentence_errors
def verify(
    golden: Annotated[Path | None, typer.Option(help="Folder of golden vectors; the packaged set if left out.")] = None,
    write: Annotated[Path | None, typer.Option(help="Also leave the computed vectors in this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this installation's numbers against the official ones; exit code 1 when a check fails."""
    from hadal.verify import run

    report = run(golden, write, lambda stage: print(stage, file=sys.stderr, flush=True))
    if as_json:
        _print_json(report.to_dict())
    else:
        _print_table(None, ["check", "error", "tolerance", "verdict"], report.rows())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
@_one_sentence_errors
def bench(
    model: Annotated[str, typer.Argument(help="A directory, a Hub repo id or `nano`.")] = "nano",
    phase: Annotated[
        list[str] | None, typer.Option(help="prefill, decode, batch (8 at once), long or train; several.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Prompt or context length; several.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    threads: Threads = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the figures into this SVG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure prefill, decode and training, each also as a fraction of this machine's own limit."""
    import torch

    from hadal.bench import COLUMNS, run, write_chart
    from hadal.checkpoint import load_model

    torch.set_num_threads(threads or torch.get_num_threads())
    load = functools.partial(load_model, model, device="cpu", dtype=dtype, fake_quant=False)
    figures = run(load, phase, tokens, lambda stage: print(stage, file=sys.stderr, flush=True))
    count = torch.get_num_threads()
    if plot:
        write_chart(plot, f"{model}, threads: {count}", figures)
    if as_json:
        return _print_json({"model": model, "threads": count, "figures": [f.to_dict() for f in figures]})
    _print_table(f"{model}, threads: {count}", COLUMNS, [f.row() for f in figures])


@app.command()
@_one_sentence_errors
def train(
    out: Annotated[Path, typer.Argument(help="Model directory to write; working files go to OUT.run.")],
    corpus: Annotated[Path, typer.Option(help="Folder of text files, .jsonl or .xz.")] = Path("corpus"),
    minutes: Annotated[
        float | None, typer.Option(help="Wall clock of the training loop; 55 if --steps is not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps instead of minutes.")] = None,
    scale: Annotated[int, typer.Option(help="1 is nano; 2, 3 ... are wider and deeper.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; nano's if left out.")] = None,
    packs: Annotated[int | None, typer.Option(help="Packs of 1024 tokens in a micro-batch; 1 if left out.")] = None,
    micro_batches: Annotated[int | None, typer.Option(help="Micro-batches in a step; 2 if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed and steps, same model.")] = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option(help="Continue the run in OUT.run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Pre-train a small model with every V4 part and write it quantised, in the official layout."""
    import dataclasses

    from hadal.train.loop import LoopConfig
    from hadal.train.pretrain import PretrainConfig, run

    given = {"steps": steps, "minutes": minutes, "lr": lr, "packs_per_micro_batch": packs}
    given["micro_batches"] = micro_batches
    loop = LoopConfig(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    config = PretrainConfig(corpus=corpus, out=out, loop=loop, scale=scale, device=device, seed=seed, resume=resume)
    report = dataclasses.asdict(run(config, lambda line: print(line, file=sys.stderr, flush=True)))
    if as_json:
        return _print_json(report)
    losses = [[source, f"{loss:.3f}"] for source, loss in report["held_out"].items()]
    _print_table(
        f"{report['steps']} steps, {report['tokens']:,} tokens -> {out}", ["held out", "nats per token"], losses
    )


@app.command()
@_one_sentence_errors
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine offers: versions, devices, threads, free memory, and which kernels run here and why."""
    import os
    import platform

    import torch

    from hadal import __version__
    from hadal.device import available, memory_available, resolve
    from hadal.kernels.describe import describe

    facts: dict[str, Any] = {"hadal": __version__, "python": platform.python_version(), "torch": torch.__version__}
    facts |= {"system": f"{platform.system()} {platform.machine()}", "cpu_count": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    facts |= {"devices": list(available())}
    facts |= {f"free_memory_{name}": memory_available(resolve(name)) for name in available()} | describe()
    _print_facts(facts, as_json)


def _load(model: str, mode: str, device: str, max_context: int | None, **options: Any) -> LLM:
    from hadal.llm import LLM

    return LLM(model, mode=mode, device=device, max_context=max_context, **({"max_concurrent": 1} | options))


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return _print_json(facts)
    _print_table(None, ["fact", "value"], [[_words(k), _words(v)] for k, v in facts.items() if v is not None])


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))


def _print_table(title: str | None, columns: list[str], rows: list[list[Any]]) -> None:
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


def main() -> None:
    """Entry point of the `hadal` script."""
    app()


if __name__ == "__main__":
    main()
