"""PromptTexts: the long sentences the chat codec puts around messages, official ones read as data, our own as source.

An official checkpoint carries its sentences in `encoding/encoding_dsv4.py`. That file is parsed, never executed; each
sentence is found by its SHA-256 among all string constants, so the names used there do not matter (spec 7.3, 7.4).
"""

from __future__ import annotations

import ast
import hashlib
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hadal.text.tokens import DSML, THINK_CLOSE, THINK_OPEN

ENCODING_FILE = "encoding/encoding_dsv4.py"

# Which text has which SHA-256. The 0731 rules give preview's "max" sentence to "high" and add a stronger one.
OFFICIAL_HASHES: Mapping[str, str] = {
    "effort": "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
    "stronger effort": "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c",
    "tools": "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8",
    "response format": "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5",
}

# Fields of the two templates and the control token of each; None is the caller's JSON, which may hold no control token.
_FIELDS: Mapping[str, str | None] = {
    "dsml_token": DSML,
    "thinking_start_token": THINK_OPEN,
    "thinking_end_token": THINK_CLOSE,
    "tool_schemas": None,
    "schema": None,
}


class PromptTextError(ValueError):
    """Prompt sentences that are missing, altered or not in the form expected; the message names the file and hash."""


@dataclass(frozen=True)
class PromptTexts:
    """The sentences of one rule set: what each effort says first, and the templates of the two system sections.

    `efforts` maps every accepted effort to its text ("" for none), `default_effort` is meant when none is given.
    Templates are `str.format` texts; raises PromptTextError for a field that the grammar does not have.
    """

    efforts: Mapping[str, str]
    default_effort: str
    tools: str
    response_format: str

    def __post_init__(self) -> None:
        assert self.default_effort in self.efforts
        for template, payload in ((self.tools, "tool_schemas"), (self.response_format, "schema")):
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
            unknown = sorted(set(fields) - set(_FIELDS))
            if unknown or fields.count(payload) != 1:
                raise PromptTextError(
                    f"a prompt template must hold {{{payload}}} once and no field besides {', '.join(_FIELDS)}; "
                    f"this one holds {fields}"
                )


def fill_template(template: str, payload: str) -> list[tuple[str, bool]]:
    """Pieces of a filled template as (text, may hold control tokens); the payload may not."""
    pieces: list[tuple[str, bool]] = []
    for literal, field, _, _ in string.Formatter().parse(template):
        pieces.append((literal, True))
        if field is not None:
            token = _FIELDS[field]
            pieces.append((payload, False) if token is None else (token, True))
    return pieces


def read_prompt_texts(directory: str | Path) -> PromptTexts:
    """Reads the official sentences of a checkpoint directory, as data; which rules they make up, the file decides.

    Raises PromptTextError naming file, hash and remedy when the file is missing, is not Python, or lacks a sentence in
    its published form.
    """
    path = Path(directory) / ENCODING_FILE
    remedy = f"copy {ENCODING_FILE} of the official checkpoint into the model directory"
    if not path.is_file():
        raise PromptTextError(f"{path} does not exist and the prompt sentences are read from it; {remedy}")
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
        strings = {text for node in ast.walk(tree) if isinstance(node, ast.expr) for text in _constant_strings(node)}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PromptTextError(f"{path} is not readable as Python source ({error}); {remedy}") from error
    by_hash = {hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(): text for text in strings}
    found = {name: by_hash[digest] for name, digest in OFFICIAL_HASHES.items() if digest in by_hash}
    for name, digest in OFFICIAL_HASHES.items():
        if name not in found and name != "stronger effort":
            raise PromptTextError(f"{path} has no string with SHA-256 {digest} (the {name} text); {remedy}")
    tools, response_format = found["tools"], found["response format"]
    if "stronger effort" not in found:
        return PromptTexts({"high": "", "max": found["effort"]}, "high", tools, response_format)
    efforts = {"low": "", "high": found["effort"], "max": found["stronger effort"]}
    return PromptTexts(efforts, "low", tools, response_format)


def own_prompt_texts() -> PromptTexts:
    """Hadal's own wording in the same grammar, for models trained here; "high" says nothing, as in their training."""
    return PromptTexts({"high": "", "max": _OWN_MAX}, "high", _OWN_TOOLS, _OWN_RESPONSE_FORMAT)


def _constant_strings(node: ast.expr) -> list[str]:
    """The string that an expression of literals stands for, or nothing; sums of literals count as one string."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _constant_strings(node.left) for right in _constant_strings(node.right)]
    return []


_OWN_MAX = """Think as long as the task needs. Look at it from several sides, write each step down,
try to prove yourself wrong, and answer only when nothing is left open.

"""
_OWN_TOOLS = """## Tools

The functions listed below may be called. To call them, end the answer with this block, one invoke for each call:

<{dsml_token}tool_calls>
<{dsml_token}invoke name="FUNCTION">
<{dsml_token}parameter name="ARGUMENT" string="true">TEXT</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}tool_calls>

Text goes in as it is, with string="true". Everything else is written as JSON, with string="false".

Functions:

{tool_schemas}
"""
_OWN_RESPONSE_FORMAT = """## Answer format

Answer only with JSON that fits this schema:
{schema}"""
