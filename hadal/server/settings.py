"""Settings: what whoever runs the server may choose, from options of `hadal serve` and an optional TOML file."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from hadal.accounts import PRICE_LIST, data_folder

Effort = Literal["low", "high", "max"]
Habit = Literal["default", "thinking", "non-thinking"]

# Names under which clients know the model; a pattern's first match counts.
ALIASES: Mapping[str, Habit] = MappingProxyType(
    {
        "deepseek-flash": "default",
        "deepseek-v4-flash": "default",
        "deepseek-v4-pro": "default",
        "deepseek-chat": "non-thinking",
        "deepseek-reasoner": "thinking",
        "claude-*": "default",
    }
)
# The vendor's folding of effort words onto its own, by the month since which it counts.
EFFORTS: Mapping[str, Mapping[str, Effort]] = MappingProxyType(
    {
        "2026-04": {
            "minimal": "high", "low": "high", "medium": "high", "high": "high", "xhigh": "max", "max": "max",
            "ultra": "max",
        },
        "2026-08": {
            "minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max",
            "ultra": "max",
        },
    }
)  # fmt: skip
_RELOADED = ("aliases", "efforts", "price_list")
_log = logging.getLogger("hadal.server")

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class SettingsError(ValueError):
    """A setting that cannot be; the message names it."""


class Name(NamedTuple):
    """What a client's spelling of the model means; `thinking` is None where the request decides."""

    model: str
    thinking: bool | None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DefaultMaxTokens:
    """The most tokens of an answer that asks for no limit."""

    non_thinking: Count = 8192
    thinking: Count = 65536
    max_effort: Count = 131072

    def of(self, thinking: bool, effort: str) -> int:
        """The limit of a request."""
        if not thinking:
            return self.non_thinking
        return self.max_effort if effort == "max" else self.thinking


@dataclass(frozen=True, eq=False, config=ConfigDict(extra="forbid"))
class Settings:
    """Times are in seconds, sizes in bytes. SettingsError, through `read_settings`, for a value that cannot be.

    `model` is the name that the server goes by, `aliases` are others. Answers wait at most `start_seconds` for their
    first token and take at most `request_seconds` in all; a request whose predicted wait is above `max_wait_seconds` is
    turned away, and a body has `body_seconds` to arrive. A key keeps at most `max_files` files of `file_limit` bytes.
    `open_bind` allows an address that other machines reach even without keys. `data` is a folder, and `database` a URL,
    by default of a file in that folder.
    """

    model: str = "nano"
    config: Path | None = None
    aliases: Mapping[str, Habit] = field(default_factory=lambda: dict(ALIASES))
    efforts: Mapping[str, Effort] = field(default_factory=dict)
    history: Literal["lenient", "strict"] = "lenient"
    default_max_tokens: DefaultMaxTokens = field(default_factory=DefaultMaxTokens)
    data: Path = field(default_factory=data_folder)
    database: str | None = None
    prices: Path | None = None
    price_list: str = PRICE_LIST
    body_limit: Count = 48 << 20
    file_limit: Count = 200 << 20
    max_files: Count = 1000
    max_tools: Count = 128
    start_seconds: Positive = 600.0
    request_seconds: Positive | None = None
    body_seconds: Positive = 60.0
    keep_alive_seconds: Positive = 10.0
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    max_wait_seconds: Positive = 120.0
    cors: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    open_bind: bool = False
    otel: bool = False
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="before")
    @classmethod
    def _whole_effort_rules(cls, given: Any) -> Any:
        values = dict(given.kwargs or {})
        efforts = values.get("efforts", {})
        if isinstance(efforts, str):
            if efforts not in EFFORTS:
                raise ValueError(f"`efforts` is {efforts!r}; choose {' or '.join(EFFORTS)}, or give a table of words")
            values["efforts"] = EFFORTS[efforts]
        elif isinstance(efforts, Mapping):
            values["efforts"] = {**EFFORTS["2026-08"], **efforts}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("`tls_cert` and `tls_key` belong together; give both or none")
        self.now  # noqa: B018  what changes from here on is a change
        return self

    @cached_property
    def names(self) -> Names:
        """Every name of the model."""
        return Names(self.model, self.aliases)

    @property
    def now(self) -> Settings:
        """These settings, with what the file at `config` says by now about aliases, efforts and the price list."""
        return self._watch.look() if self.config else self

    @cached_property
    def _watch(self) -> _Watch:
        return _Watch(self)


class Names:
    """The model's own name and its aliases."""

    def __init__(self, model: str, aliases: Mapping[str, Habit]) -> None:
        self._model, self._aliases = model, aliases

    def resolve(self, spelled: str) -> Name | None:
        """What a name means, or None for one that the server does not know; a `[mark]` behind it does not count."""
        bare = spelled.partition("[")[0] if spelled.endswith("]") else spelled  # a client's own, as "[1m]"
        if bare == self._model:
            return Name(self._model, None)
        for pattern, habit in self._aliases.items():
            if fnmatchcase(bare, pattern):
                return Name(self._model, None if habit == "default" else habit == "thinking")
        return None

    def listed(self) -> list[str]:
        """All names that are no patterns, the model's own first."""
        return [self._model, *(name for name in self._aliases if "*" not in name and name != self._model)]


def read_settings(config: Path | None = None, **options: Any) -> Settings:
    """The settings of a TOML file whose keys are those of Settings, overridden by `options` that are not None."""
    given = {name: value for name, value in options.items() if value is not None}
    return _make((_read(config) | {"config": config} if config else {}) | given)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is no TOML ({error}); correct it") from None
    if "config" in values:
        raise SettingsError(f"{file} names a `config`; one file cannot name another")
    return values


def _make(values: Mapping[str, Any]) -> Settings:
    known = [f.name for f in fields(Settings)]
    for name in values:
        if name not in known:
            raise SettingsError(f"unknown setting `{name}`; there are {', '.join(known)}")
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = str(first["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"setting `{where}`: {said} (given {first['input']!r})" if where else said) from None


class _Watch:
    """Looks whether the file has changed, and keeps the settings that were good last."""

    def __init__(self, settings: Settings) -> None:
        assert settings.config is not None
        self._file, self._settings = settings.config, settings
        self._seen, self._part = self._stamp(), self._reloaded()

    def look(self) -> Settings:
        """The settings of now."""
        if (stamp := self._stamp()) != self._seen:
            self._seen = stamp
            try:
                part = self._reloaded()
            except (SettingsError, OSError) as error:
                _log.warning("settings stay as they were: %s", error)
                return self._settings
            changed = {name: value for name, value in part.items() if value != self._part[name]}
            self._settings, self._part = replace(self._settings, **changed), part
            _log.info("settings read again: %s", ", ".join(changed) or "nothing that can change while serving")
        return self._settings

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size

    def _reloaded(self) -> dict[str, Any]:
        values = _read(self._file)
        fresh = _make({name: values[name] for name in _RELOADED if name in values})
        return {name: getattr(fresh, name) for name in _RELOADED}
