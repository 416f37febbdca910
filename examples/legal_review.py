"""Legal review: a contract judged as a whole, then its clauses all at once, each in a fixed form.

The clauses are turns that follow the same first turn, so that each reads the contract from the cache.

pip install openai && python examples/legal_review.py [CONTRACT.txt]      clauses begin with "1.", "2." and so on
"""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
CONTRACT = """Agreement on the use of a workshop
1. The tenant may use the workshop on all days from 8 to 20 o'clock.
2. The rent is 400 a month. The landlord may change it at any time without notice.
3. The tenant is liable for all damage to the building, whoever caused it.
4. Either side may end the agreement at the end of a month, with a month's notice.
"""
FINDING = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["liability", "money", "term", "use", "other"]},
        "risk": {"type": "string", "enum": ["low", "medium", "high"]},
        "problem": {"type": "string", "maxLength": 200},
        "better": {"type": "string", "maxLength": 200},
    },
    "required": ["kind", "risk", "problem", "better"],
    "additionalProperties": False,
}


def judge(messages: list[Any], what: str) -> tuple[list[Any], tuple[int, int]]:
    """Prints the finding; returns the conversation with it, and tokens from the cache and in all."""
    asked = [*messages, {"role": "user", "content": f"Judge {what}: its risk, the problem, and better words."}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=asked,
        response_format={"type": "json_schema", "json_schema": {"name": "finding", "schema": FINDING, "strict": True}},
        max_tokens=2000,
        extra_body={"thinking": {"type": "disabled"}},
    )
    said, usage = answer.choices[0].message.content or "", answer.usage
    finding = json.loads(said)
    print(f"{what}: {finding['risk']} ({finding['kind']})\n  {finding['problem']}\n  better: {finding['better']}")
    assert usage is not None and usage.prompt_tokens_details is not None
    spent = usage.prompt_tokens_details.cached_tokens or 0, usage.prompt_tokens
    return [*asked, {"role": "assistant", "content": said}], spent


def main(contract: str) -> None:
    clauses = [f"clause {number}" for number in re.findall(r"^(\d+)\.", contract, re.MULTILINE)]
    system = {"role": "system", "content": f"You advise the tenant's side of this contract.\n\n{contract}"}
    opened, _ = judge([system], "the contract as a whole")
    with ThreadPoolExecutor(8) as pool:
        spent = [spent for _, spent in pool.map(lambda clause: judge(opened, clause), clauses)]
    cached, total = (sum(column) for column in zip(*spent, strict=True))
    print(f"{len(clauses)} clauses: {cached} of {total} tokens from the cache")


if __name__ == "__main__":
    main(Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else CONTRACT)
