"""Questions to a folder: passages found by BM25, answers with their sources in a fixed form.

V4 has no embeddings, so words find passages. The conversation only grows: a passage that was shown is not shown again,
and what came before a question is read from the prefix cache.

pip install openai && python examples/rag.py docs "How are keys made?" "What does a drain do?"
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)


def read_passages(folder: Path, words: int = 120) -> list[tuple[str, str]]:
    """File name and text of passages of about so many words, cut between paragraphs."""
    passages: list[tuple[str, str]] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".txt")):
        name, text = str(path.relative_to(folder)), ""
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            text += paragraph + "\n\n"
            if len(text.split()) >= words:
                passages.append((name, text))
                text = ""
        passages += [(name, text)] if text.strip() else []
    return passages


def rank(question: str, texts: list[str], k1: float = 1.5, b: float = 0.75) -> list[int]:
    """Indices of texts, best first, by BM25."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = [0.0] * len(bags)
    for word in set(re.findall(r"\w+", question.lower())):
        holders = sum(word in bag for bag in bags)
        rarity = math.log(1 + (len(bags) - holders + 0.5) / (holders + 0.5))
        for i, bag in enumerate(bags):
            scores[i] += rarity * bag[word] * (k1 + 1) / (bag[word] + k1 * (1 - b + b * bag.total() / mean))
    return sorted(range(len(bags)), key=lambda i: -scores[i])


def main(folder: Path, questions: list[str]) -> None:
    passages = read_passages(folder)
    names = sorted({name for name, _ in passages})
    # The form stands in the prompt's beginning, so it is the same for all questions.
    sources = {"type": "array", "items": {"type": "string", "enum": names}, "minItems": 1, "maxItems": 3}
    fields = {"answer": {"type": "string", "maxLength": 600}, "sources": sources}
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    messages: Any = [{"role": "system", "content": "Answer from the passages alone, and name the files used."}]
    shown: set[int] = set()
    for question in questions:
        found = sorted(set(rank(question, [text for _, text in passages])[:3]) - shown)
        shown.update(found)
        texts = "".join(f'<passage file="{passages[i][0]}">\n{passages[i][1]}</passage>\n' for i in found)
        messages.append({"role": "user", "content": f"{texts}\n{question}"})
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, response_format=form, max_tokens=2000,
            extra_body={"thinking": {"type": "disabled"}},
        )  # fmt: skip
        said, usage = answer.choices[0].message.content or "", answer.usage
        messages.append({"role": "assistant", "content": said})
        told = json.loads(said)
        cited = [name for name in dict.fromkeys(told["sources"]) if name in {passages[i][0] for i in shown}]
        assert usage is not None and usage.prompt_tokens_details is not None
        print(f"{question}\n  {told['answer']}\n  sources: {', '.join(cited) or 'none of those shown'}")
        print(f"  cached: {usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} tokens\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
