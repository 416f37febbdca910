"""`hadal keys` and `hadal usage`: who may use the service, and what they used."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli.options import AsJson, one_sentence_errors, print_json, print_table

if TYPE_CHECKING:
    from hadal.accounts import Accounts, Key

keys = typer.Typer(help="API keys: make, list, revoke, limit. A running server follows within two seconds.")


def _dollars(text: str) -> Decimal:
    try:
        amount = Decimal(text.removeprefix("$"))
    except InvalidOperation:
        amount = Decimal("nan")
    if not amount.is_finite():
        raise typer.BadParameter(f"{text!r} is no amount of USD; write for example 12.50")
    return amount


def _moment(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time; write for example 2026-11-23 or 2026-11-23T18:00") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _time(text: str) -> Any:
    return typer.Option(parser=_moment, metavar="TIME", help=f"{text}, in UTC unless it names its zone.")


Database = Annotated[
    str | None, typer.Option(metavar="URL", help="sqlite:///FILE or postgresql://...; hadal.db in the data folder.")
]
Name = Annotated[str, typer.Argument(help="Name or id of a key.")]
RequestsPerMinute = Annotated[int | None, typer.Option(min=0, help="Most requests in any 60 seconds.")]
TokensPerMinute = Annotated[int | None, typer.Option(min=0, help="Most tokens, prompt and answer, in 60 seconds.")]
Concurrent = Annotated[int | None, typer.Option(min=0, help="Most requests under way in one server.")]
Budget = Annotated[Decimal | None, typer.Option(parser=_dollars, metavar="USD", help="Most money per period.")]
Tokens = Annotated[int | None, typer.Option(min=0, help="Most tokens per period.")]
Period = Annotated[str | None, typer.Option(help="day, month (in UTC) or total.")]


@keys.command()
@one_sentence_errors
def create(
    name: Annotated[str, typer.Argument(help="Who or what the key is for.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    budget: Budget = None,
    tokens: Tokens = None,
    period: Period = None,
    expires: Annotated[datetime | None, _time("When the key ends")] = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print its secret, which is shown this once; without options it is unlimited."""
    from hadal.accounts import Limits

    given = _given(requests_per_minute, tokens_per_minute, concurrent, budget, tokens, period)
    with _open(database) as accounts:
        key, secret = accounts.keys.create(name, Limits(**given), expires)
    if as_json:
        return print_json({"secret": secret} | _plain(_facts(key)))
    print(secret)


@keys.command("list")
@one_sentence_errors
def list_keys(database: Database = None, as_json: AsJson = False) -> None:
    """Show all keys, their limits and what is left of their budgets."""
    with _open(database) as accounts:
        rows = [_facts(key) | {"left": accounts.balance(key).left} for key in accounts.keys.list()]
    if as_json:
        return print_json([_plain(row) for row in rows])
    print_table(None, ["name", "begins", "created", "ends", "limits", "left"], [_words(row) for row in rows])


@keys.command()
@one_sentence_errors
def revoke(name: Name, database: Database = None) -> None:
    """Make a key useless; requests under way run to their end."""
    with _open(database) as accounts:
        key = accounts.keys.revoke(name)
    print(f"revoked {key.name} ({key.id})")


@keys.command()
@one_sentence_errors
def limit(
    name: Name,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent: Concurrent = None,
    budget: Budget = None,
    tokens: Tokens = None,
    period: Period = None,
    unlimited: Annotated[bool, typer.Option("--unlimited", help="Drop all limits that are not given here.")] = False,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Change limits of a key; those not given stay."""
    from hadal.accounts import Limits

    given = _given(requests_per_minute, tokens_per_minute, concurrent, budget, tokens, period)
    dropped = dataclasses.asdict(Limits()) if unlimited else {}
    with _open(database) as accounts:
        key = accounts.keys.limit(name, **(dropped | given))
    if as_json:
        return print_json(_plain(_facts(key)))
    print(f"{key.name}: {_limits(_facts(key))}")


@one_sentence_errors
def usage(
    since: Annotated[datetime | None, _time("Count requests from here on")] = None,
    until: Annotated[datetime | None, _time("Count requests before this")] = None,
    by: Annotated[
        str, typer.Option(help="Groups, with commas between: key, user, tenant, day, month, model, api, status ...")
    ] = "key",
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Show what was used: requests, tokens by kind, cost and latency."""
    groups = tuple(name.strip() for name in by.split(",") if name.strip())
    with _open(database) as accounts:
        found = accounts.usage(since, until, groups)
    if as_json:
        sums = [dataclasses.asdict(row) for row in found]
        return print_json([row.pop("group") | _plain(row) for row in sums])
    columns = [*groups, "requests", "errors", "hit", "miss", "output", "reasoning", "cost", "first token", "total"]
    rows = []
    for row in found:
        counts = [row.requests, row.errors, row.hit, row.miss, row.output, row.reasoning]
        first = "" if row.first_token_s is None else f"{row.first_token_s:.2f} s"
        names = ["-" if value is None else value for value in row.group.values()]
        rows.append([*names, *(f"{n:,}" for n in counts), f"${row.cost:.6f}", first, f"{row.total_s:.2f} s"])
    print_table(None, columns, rows)


def _open(database: str | None) -> Accounts:
    from hadal.accounts import Accounts

    return Accounts(database)


def _given(*values: Any) -> dict[str, Any]:
    names = ("requests_per_minute", "tokens_per_minute", "concurrent", "budget", "tokens", "period")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _facts(key: Key) -> dict[str, Any]:
    facts = dataclasses.asdict(key)
    limits = facts.pop("limits")
    return facts | {name: value for name, value in limits.items() if value is not None}


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Money without exponents, times in ISO's form."""
    texts = {name: f"{value:f}" for name, value in facts.items() if isinstance(value, Decimal)}
    times = {name: value.isoformat() for name, value in facts.items() if isinstance(value, datetime)}
    return facts | texts | times


def _words(row: dict[str, Any]) -> list[str]:
    ends = "revoked" if row["revoked"] else f"{row['expires']:%Y-%m-%d %H:%M}" if row["expires"] else "never"
    left = "" if row["left"] is None else f"${row['left']:.6f}"
    return [row["name"], row["prefix"], f"{row['created']:%Y-%m-%d %H:%M}", ends, _limits(row), left]


def _limits(facts: dict[str, Any]) -> str:
    """Limits for people."""
    period = {"day": "a day", "month": "a month", "total": "in all"}[facts["period"]]
    texts = {
        "requests_per_minute": "{} requests a minute", "tokens_per_minute": "{} tokens a minute",
        "concurrent": "{} at once", "budget": "${:.2f} " + period, "tokens": "{} tokens " + period,
    }  # fmt: skip
    return ", ".join(text.format(facts[name]) for name, text in texts.items() if name in facts) or "none"
