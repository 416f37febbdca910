"""OpenAI's Responses API: events of a streamed answer, and a function's round trip with the client keeping the items.

pip install openai && python examples/responses.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
ADD: Any = {
    "type": "function",
    "name": "add",
    "description": "adds two numbers",
    "parameters": {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": 999} for name in "ab"},
        "required": ["a", "b"],
    },
    "strict": False,
}


def stream_answer() -> None:
    events = client.responses.create(
        model=MODEL, instructions="You are kind.", input="Tell me a story.", max_output_tokens=400, stream=True
    )
    for event in events:
        if event.type == "response.reasoning_text.delta":
            print(f"\033[2m{event.delta}\033[0m", end="", flush=True)
        elif event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
        elif event.type in ("response.completed", "response.incomplete"):
            print(f"\n[{event.type}]\n")


def call_a_function() -> None:
    items: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
    first = client.responses.create(
        model=MODEL, input=items, tools=[ADD], tool_choice="required", max_output_tokens=2000
    )
    if first.status != "completed":
        return print("it thought until max_output_tokens, without a call")
    items += first.output  # the server stores nothing, so all items travel with each request
    for item in first.output:
        if item.type == "function_call":
            given = json.loads(item.arguments)
            print("call:", item.name, given)
            items.append({"type": "function_call_output", "call_id": item.call_id, "output": str(sum(given.values()))})
    last = client.responses.create(model=MODEL, input=items, tools=[ADD], tool_choice="none", max_output_tokens=2000)
    print("answer:", last.output_text)
    assert last.usage is not None
    print("cached:", last.usage.input_tokens_details.cached_tokens, "of", last.usage.input_tokens)


if __name__ == "__main__":
    stream_answer()
    call_a_function()
