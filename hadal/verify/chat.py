"""The official chat-encoding vectors: messages in, prompt text out, byte for byte.

The vendor's tools section is not part of this package; it is recovered from an expected output and accepted only if its
SHA-256 is the published one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hadal.text import PromptTexts, encode_messages
from hadal.text.prompts import OFFICIAL_HASHES
from hadal.text.tokens import DSML, EOS, THINK_CLOSE, THINK_OPEN
from hadal.verify.report import Check, skipped, within

GROUP = "chat vectors"
SECTION_START, SCHEMAS_START = "## Tools", "### Available Tool Schemas\n\n"


def check_chat(folder: Path | None) -> list[Check]:
    """The four preview vectors in `folder` (test_input_N.json, test_output_N.txt)."""
    if folder is None or not folder.is_dir():
        return [
            skipped(
                GROUP, "official vectors", "their folder is not here; give --golden a directory beside data/v4-format"
            )
        ]
    texts = _recover_texts((folder / "test_output_1.txt").read_text("utf-8"))
    checks = []
    for number in range(1, 5):
        raw = json.loads((folder / f"test_input_{number}.json").read_text("utf-8"))
        messages, tools = (raw["messages"], raw["tools"]) if isinstance(raw, dict) else (raw, None)
        wanted = (folder / f"test_output_{number}.txt").read_text("utf-8")
        found = encode_messages(messages, texts, thinking=number != 4, tools=tools).text
        same = sum(a == b for a, b in zip(found, wanted, strict=False))
        checks.append(
            within(GROUP, f"vector {number}", max(len(found), len(wanted)) - same, 0, "characters that differ")
        )
    return checks


def _recover_texts(output: str) -> PromptTexts:
    section = output[output.index(SECTION_START) : output.index(EOS)]
    head, rest = section.split(SCHEMAS_START, 1)
    tail = rest[rest.index("\n\n") : rest.index("<｜User｜>")]
    template = head + SCHEMAS_START + "{tool_schemas}" + tail
    for token, field in (
        (DSML, "dsml_token"),
        (THINK_OPEN, "thinking_start_token"),
        (THINK_CLOSE, "thinking_end_token"),
    ):
        template = template.replace(token, f"{{{field}}}")
    digest = hashlib.sha256(template.encode()).hexdigest()
    assert digest == OFFICIAL_HASHES["tools"], f"the recovered tools section has SHA-256 {digest}"
    return PromptTexts({"high": "", "max": ""}, "high", template, "{schema}")
