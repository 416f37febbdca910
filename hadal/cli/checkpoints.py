"""`hadal inspect`, `convert` and `verify`: what a checkpoint is, in another form, and whether numbers are right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hadal.cli.options import AsJson, one_sentence_errors, print_facts, print_json, print_progress, print_table


@one_sentence_errors
def inspect(
    path: Annotated[str, typer.Argument(help="A model, or a bare config.json or index file.")] = "nano",
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint from its headers alone: layers, formats, parameters, bytes, KV per token."""
    from hadal.checkpoint import inspect as describe

    facts = describe(path).to_dict()
    print_facts(facts, as_json)


@one_sentence_errors
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
        return print_json({"src": src, "dst": dst, "quantize": quantize, "names": names})
    print(f"wrote {dst}")


@one_sentence_errors
def verify(
    golden: Annotated[Path | None, typer.Option(help="Folder of golden vectors; the packaged set if left out.")] = None,
    write: Annotated[Path | None, typer.Option(help="Also leave the computed vectors in this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this installation's numbers against the official ones; exit code 1 when a check fails."""
    from hadal.verify import run

    report = run(golden, write, print_progress)
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(None, ["check", "error", "tolerance", "verdict"], report.rows())
    raise typer.Exit(0 if report.ok else 1)
