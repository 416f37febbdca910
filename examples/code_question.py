"""Questions about a repository: files packed into the prompt up to a number of tokens, in an order that stays.

The files come first and the question last, so that all questions share a prefix; each is a request of its own.

pip install openai && python examples/code_question.py hadal/server "Where are keys checked?" "What does Gate do?"
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
BUDGET = int(os.environ.get("BUDGET", 60000))  # tokens of files
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)


def count_tokens(text: str) -> int:
    told: Any = client.post("/tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object)
    return int(told["count"])


def list_files(folder: Path) -> list[Path]:
    """What git tracks, or all Python files, shortest path first."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0")[:-1] if listed.returncode == 0 else []
    paths = [folder / name for name in names] or [*folder.rglob("*.py")]
    return sorted((path for path in paths if path.is_file()), key=lambda path: (len(path.parts), path))


def pack(folder: Path) -> str:
    """Whole files while they fit, and the names of all."""
    packed, left, names = [], BUDGET, []
    for path in list_files(folder):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        block = f'<file path="{path.relative_to(folder)}">\n{text}</file>\n'
        size = count_tokens(block) if len(block) < 20 * left else left + 1
        names.append(f"{path.relative_to(folder)}{'' if size <= left else ' (not shown)'}")
        if size <= left:
            packed.append(block)
            left -= size
    print(f"{len(packed)} of {len(names)} files, {BUDGET - left} tokens")
    return "You answer questions about this code.\n\n" + "\n".join(names) + "\n\n" + "".join(packed)


def main(folder: Path, questions: list[str]) -> None:
    prefix = pack(folder)
    for question in questions:
        messages: Any = [{"role": "system", "content": prefix}, {"role": "user", "content": question}]
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2000, stream=True)
        print(f"\n{question}")
        for chunk in answer:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if usage := chunk.usage:
                assert usage.prompt_tokens_details is not None
                print(f"\n[cached: {usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} tokens]")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
