"""The `hadal` command: verbs that load what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import typer

from hadal.cli import accounts, checkpoints, measure, serve, talk, train

app = typer.Typer(
    name="hadal",
    help="DeepSeek-V4 from official files to a streaming answer. MODEL is a directory, a Hub repo id or `nano`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _verb in (
    serve.serve, talk.chat, talk.generate, checkpoints.inspect, checkpoints.convert, checkpoints.verify, measure.bench,
    train.train, measure.doctor, accounts.usage,
):  # fmt: skip
    app.command()(_verb)
app.add_typer(accounts.keys, name="keys", no_args_is_help=True)


def main() -> None:
    """Entry point of the `hadal` script."""
    app()
