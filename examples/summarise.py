"""A long document: whole where it fits into the context, in parts where not; then questions, read from the cache.

pip install openai && python examples/summarise.py README.md "What is checked?"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
MOST_TOKENS = int(os.environ.get("MOST_TOKENS", 0))  # of a prompt; 0 is what the model can hold
ANSWER_TOKENS = 500
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)


def count_tokens(text: str) -> tuple[int, int]:
    """Tokens of a text, and of the longest context."""
    told: Any = client.post("/tokenize", body={"prompt": text}, cast_to=object)
    return told["count"], told["max_model_len"]


def ask(messages: list[Any], question: str) -> str:
    """The answer, which joins the conversation."""
    messages.append({"role": "user", "content": question})
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=ANSWER_TOKENS, extra_body={"thinking": {"type": "disabled"}}
    )
    said, usage = answer.choices[0].message.content or "", answer.usage
    messages.append({"role": "assistant", "content": said})
    assert usage is not None and usage.prompt_tokens_details is not None
    print(f"[cached: {usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} tokens]")
    return said


def cut(text: str, parts: int) -> list[str]:
    """About equal parts, cut between lines."""
    lines, size = text.splitlines(keepends=True), len(text) / parts
    made, length = [""], 0
    for line in lines:
        if length >= size * len(made):
            made.append("")
        made[-1] += line
        length += len(line)
    return made


def main(path: Path, questions: list[str]) -> None:
    text = path.read_text(encoding="utf-8")
    tokens, context = count_tokens(text)
    room = (MOST_TOKENS or context) - 2 * ANSWER_TOKENS * (1 + len(questions))
    if room <= 0:
        sys.exit("the context has no room for so many answers; ask fewer questions or raise MOST_TOKENS")
    print(f"{path}: {tokens} tokens, room for {room}")
    if tokens > room:
        parts = cut(text, -(-tokens // room))
        notes = [ask([], f"{part}\n\nNote what matters in this part of a longer document.") for part in parts]
        text = "\n\n".join(f"Part {number}: {note}" for number, note in enumerate(notes, 1))
    conversation: list[Any] = [{"role": "system", "content": f"You answer from this document.\n\n{text}"}]
    for question in ["Summarise the document in five sentences.", *questions]:
        print(f"{question}\n{ask(conversation, question)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
