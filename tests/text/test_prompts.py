"""Prompt sentences read from a checkpoint's encoding file as data: found by hash, never by name, never executed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hadal.text import PromptTextError, PromptTexts, own_prompt_texts, prompts, read_prompt_texts
from hadal.text.prompts import OFFICIAL_HASHES

HIGH = "Look twice.\n\n"
MAX = "Look three times.\nThen once more.\n\n"
TOOLS = 'Tools: <{dsml_token}x> "{tool_schemas}" {thinking_start_token}{thinking_end_token}\n'
FORMAT = "Follow {schema}"
HASHES = {
    name: hashlib.sha256(text.encode()).hexdigest()
    for name, text in (("effort", HIGH), ("stronger effort", MAX), ("tools", TOOLS), ("response format", FORMAT))
}

# As a vendor's file may look: sentences in a dict, a sum, joined literals, a default; and code that must not run.
SOURCE = f"""
import this_module_does_not_exist
raise SystemExit("executed")
EFFORTS: dict = {{"high": {HIGH!r}, "max": ("Look three times.\\n"
    "Then once more.\\n" + "\\n")}}
number = 3 + 4

class Templates:
    tools = {TOOLS!r}

def fill(schema, template={FORMAT!r}):
    return template.format(schema=schema)
"""


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "OFFICIAL_HASHES", HASHES)


def write(directory: Path, source: str) -> Path:
    path = directory / "encoding" / "encoding_dsv4.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


@pytest.mark.usefixtures("hashes")
def test_sentences_are_found_wherever_they_stand_and_decide_the_rules(tmp_path: Path) -> None:
    write(tmp_path, SOURCE)
    assert read_prompt_texts(tmp_path) == PromptTexts({"low": "", "high": HIGH, "max": MAX}, "low", TOOLS, FORMAT)
    write(tmp_path, SOURCE.replace("Look three", "Look four"))
    assert read_prompt_texts(tmp_path) == PromptTexts({"high": "", "max": HIGH}, "high", TOOLS, FORMAT)


@pytest.mark.usefixtures("hashes")
def test_an_altered_sentence_is_named_with_file_hash_and_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, SOURCE.replace("Look twice", "Look four"))
    with pytest.raises(PromptTextError) as caught:
        read_prompt_texts(tmp_path)
    for part in (str(path), HASHES["effort"], "(the effort text)", "copy encoding/encoding_dsv4.py"):
        assert part in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptTextError, match=r"does not exist.*copy"):
        read_prompt_texts(tmp_path)
    for source in ("def (", "(" * 5000, "x = '\0'"):
        write(tmp_path, source)
        with pytest.raises(PromptTextError, match=r"not readable as Python.*copy"):
            read_prompt_texts(tmp_path)


def test_a_template_with_other_fields_is_refused(tmp_path: Path) -> None:
    for template in ("{tool_schemas} {0}", "{other}{tool_schemas}", "none", "{tool_schemas}{tool_schemas}"):
        with pytest.raises(PromptTextError, match=r"must hold \{tool_schemas\} once"):
            PromptTexts({"high": ""}, "high", template, "{schema}")


def test_published_hashes_are_those_of_the_reference_documents(shared_dir: Path) -> None:
    document = (shared_dir / "data" / "v4-format" / "ENCODING.md").read_text(encoding="utf-8")
    begin = document.index("Reasoning Effort: ")
    effort = document[begin : document.index("\n```", begin)] + "\n\n"
    assert hashlib.sha256(effort.encode()).hexdigest() == OFFICIAL_HASHES["effort"]
    specification = (shared_dir / "spec" / "architecture.md").read_text(encoding="utf-8")
    assert all(digest in specification for digest in OFFICIAL_HASHES.values())


def test_own_wording_puts_nothing_in_front_unless_asked_for_the_most() -> None:
    own = own_prompt_texts()
    assert (list(own.efforts), own.default_effort, own.efforts["high"]) == (["high", "max"], "high", "")
    for text in (own.efforts["max"], own.tools, own.response_format):
        assert hashlib.sha256(text.encode()).hexdigest() not in OFFICIAL_HASHES.values()
