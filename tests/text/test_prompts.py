"""Prompt sentences read from a checkpoint's encoding file as data: found by hash, never by name, never executed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hadal.text import PromptTextError, PromptTexts, own_prompt_texts, read_prompt_texts
from hadal.text.prompts import OFFICIAL_HASHES

HIGH = "Look twice.\n\n"
MAX = "Look three times.\nThen once more.\n\n"
TOOLS = 'Tools: <{dsml_token}x> "{tool_schemas}" {thinking_start_token}{thinking_end_token}\n'
FORMAT = "Follow {schema}"
HASHES = {
    name: hashlib.sha256(text.encode()).hexdigest()
    for name, text in (("high effort", HIGH), ("max effort", MAX), ("tools", TOOLS), ("response format", FORMAT))
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


def write(directory: Path, source: str) -> Path:
    path = directory / "encoding" / "encoding_dsv4.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


def test_sentences_are_found_wherever_they_stand(tmp_path: Path) -> None:
    write(tmp_path, SOURCE)
    texts = read_prompt_texts(tmp_path, "0731", hashes=HASHES)
    assert texts == PromptTexts({"low": "", "high": HIGH, "max": MAX}, "low", TOOLS, FORMAT)
    preview = read_prompt_texts(tmp_path, "preview", hashes={k: v for k, v in HASHES.items() if k != "high effort"})
    assert preview == PromptTexts({"high": "", "max": MAX}, "high", TOOLS, FORMAT)


def test_an_altered_sentence_is_named_with_file_hash_and_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, SOURCE.replace("Look three", "Look four"))
    with pytest.raises(PromptTextError) as caught:
        read_prompt_texts(tmp_path, "0731", hashes=HASHES)
    for part in (str(path), HASHES["max effort"], "max effort", "copy encoding/encoding_dsv4.py"):
        assert part in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PromptTextError, match=r"does not exist.*copy"):
        read_prompt_texts(tmp_path, "preview")
    for source in ("def (", "(" * 5000, "x = '\0'"):
        write(tmp_path, source)
        with pytest.raises(PromptTextError, match=r"not readable as Python.*copy"):
            read_prompt_texts(tmp_path, "preview")
    write(tmp_path, "x = 1")
    with pytest.raises(PromptTextError, match=r"unknown chat rules '0813'"):
        read_prompt_texts(tmp_path, "0813")  # type: ignore[arg-type]


def test_a_template_with_other_fields_is_refused(tmp_path: Path) -> None:
    for template in ("{tool_schemas} {0}", "{other}{tool_schemas}", "none", "{tool_schemas}{tool_schemas}"):
        with pytest.raises(PromptTextError, match=r"must hold \{tool_schemas\} once"):
            PromptTexts({"high": ""}, "high", template, "{schema}")


def test_published_hashes_are_those_of_the_reference_documents(shared_dir: Path) -> None:
    document = (shared_dir / "data" / "v4-format" / "ENCODING.md").read_text(encoding="utf-8")
    begin = document.index("Reasoning Effort: ")
    effort = document[begin : document.index("\n```", begin)] + "\n\n"
    assert hashlib.sha256(effort.encode()).hexdigest() == OFFICIAL_HASHES["preview"]["max effort"]
    assert OFFICIAL_HASHES["0731"]["high effort"] == OFFICIAL_HASHES["preview"]["max effort"]
    specification = (shared_dir / "spec" / "architecture.md").read_text(encoding="utf-8")
    assert all(digest in specification for hashes in OFFICIAL_HASHES.values() for digest in hashes.values())


def test_own_wording_has_the_ladders_of_both_rules() -> None:
    preview, latest = own_prompt_texts("preview"), own_prompt_texts()
    assert (list(preview.efforts), preview.default_effort, preview.efforts["high"]) == (["high", "max"], "high", "")
    assert (list(latest.efforts), latest.default_effort, latest.efforts["low"]) == (["low", "high", "max"], "low", "")
    assert latest.efforts["high"] and latest.efforts["high"] != latest.efforts["max"]
    official = set(OFFICIAL_HASHES["0731"].values())
    for text in (*latest.efforts.values(), latest.tools, latest.response_format):
        assert hashlib.sha256(text.encode()).hexdigest() not in official
