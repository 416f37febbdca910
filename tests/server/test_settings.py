"""Settings: names and efforts, values that cannot be, and a file that changes while the server runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hadal.server.settings import Settings, SettingsError, read_settings


def write(file: Path, text: str) -> Path:
    """A changed file has another time, however coarse the clock of the file system is."""
    before = file.stat().st_mtime_ns if file.exists() else 0
    file.write_text(text)
    os.utime(file, ns=(before + 10**9, before + 10**9))
    return file


@pytest.mark.parametrize(
    ("spelled", "thinking"),
    [
        ("tiny", None),
        ("deepseek-flash", None),
        ("deepseek-v4-pro[1m]", None),
        ("deepseek-chat", False),
        ("deepseek-reasoner", True),
        ("claude-sonnet-4-5", None),
        ("claude-opus-4-1[1m]", None),
    ],
)
def test_names_that_clients_use_mean_the_model(spelled: str, thinking: bool | None) -> None:
    assert Settings(model="tiny").names.resolve(spelled) == ("tiny", thinking)


@pytest.mark.parametrize("spelled", ["", "gpt-4", "xclaude-3", "Tiny", "deepseek-chat-2"])
def test_other_names_are_unknown(spelled: str) -> None:
    assert Settings(model="tiny").names.resolve(spelled) is None


def test_patterns_are_not_listed() -> None:
    names = Settings(model="deepseek-chat").names.listed()
    assert names[0] == "deepseek-chat" and names.count("deepseek-chat") == 1 and not any("*" in n for n in names)


def test_effort_words_follow_the_vendor_by_month(tmp_path: Path) -> None:
    newest = read_settings().efforts
    assert [newest[word] for word in ("minimal", "medium", "xhigh", "ultra")] == ["low", "high", "high", "max"]
    older = read_settings(write(tmp_path / "a.toml", 'efforts = "2026-04"')).efforts
    assert [older[word] for word in ("low", "medium", "xhigh")] == ["high", "high", "max"]
    own = read_settings(write(tmp_path / "b.toml", '[efforts]\nxhigh = "max"')).efforts
    assert (own["xhigh"], own["medium"]) == ("max", "high")


def test_answers_without_a_limit_get_the_vendors() -> None:
    limit = read_settings().default_max_tokens.of
    assert (limit(False, "max"), limit(True, "high"), limit(True, "max")) == (8192, 65536, 131072)


def test_options_stand_over_the_file_and_absent_options_do_not(tmp_path: Path) -> None:
    file = write(tmp_path / "hadal.toml", 'history = "strict"\nstart_seconds = 5\ncors = ["https://a.example"]')
    made = read_settings(file, start_seconds=7.0, history=None)
    assert (made.history, made.start_seconds, made.cors) == ("strict", 7.0, ("https://a.example",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed = 1", "unknown setting `speed`"),
        ('history = "loose"', "setting `history`: Input should be 'lenient' or 'strict'"),
        ("body_limit = 0", "setting `body_limit`"),
        ("start_seconds = -1.0", "setting `start_seconds`"),
        ('[aliases]\nx = "sometimes"', "setting `aliases.x`"),
        ('[efforts]\nlow = "lowest"', "setting `efforts.low`"),
        ('efforts = "2025-01"', "choose 2026-04 or 2026-08"),
        ("[default_max_tokens]\nfew = 3", "default_max_tokens.few"),
        ('tls_cert = "a.pem"', "belong together"),
        ('config = "b.toml"', "cannot name another"),
        ("history = ", "is no TOML"),
    ],
)
def test_values_that_cannot_be_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(write(tmp_path / "hadal.toml", text))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_efforts_and_price_list_change_while_serving_and_nothing_else(tmp_path: Path) -> None:
    file = write(tmp_path / "hadal.toml", 'price_list = "a"')
    settings = read_settings(file)
    assert settings.now is settings
    write(file, 'price_list = "b"\nhistory = "strict"\n[aliases]\n"gpt-*" = "thinking"\n[efforts]\nlow = "max"')
    now = settings.now
    assert (now.price_list, now.history, now.efforts["low"]) == ("b", "lenient", "max")
    assert now.names.resolve("gpt-4") == ("nano", True) and now.names.resolve("deepseek-chat") is None
    assert settings.now is now


def test_an_option_outlasts_a_change_of_other_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "hadal.toml", 'price_list = "a"')
    settings = read_settings(file, price_list="mine")
    write(file, 'price_list = "a"\nefforts = "2026-04"')
    assert (settings.now.price_list, settings.now.efforts["xhigh"]) == ("mine", "max")


@pytest.mark.parametrize("bad", ["price_list = 3", "price_list = ", None])
def test_a_broken_or_missing_file_leaves_settings_as_they_were(
    tmp_path: Path, bad: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "hadal.toml", 'price_list = "a"')
    settings = read_settings(file)
    if bad is None:
        file.unlink()
    else:
        write(file, bad)
    assert [settings.now.price_list for _ in range(3)] == ["a"] * 3
    assert caplog.text.count("settings stay as they were") == 1


def test_a_name_of_many_brackets_is_resolved_at_once() -> None:
    began = time.monotonic()
    assert Settings().names.resolve("claude-" + "[" * 200_000) is not None
    assert time.monotonic() - began < 2  # looking for each bracket's end takes half a minute
