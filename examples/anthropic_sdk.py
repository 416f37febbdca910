"""The anthropic client: a streamed answer with its thinking, a tool's round trip, and a count of tokens.

pip install anthropic && python examples/anthropic_sdk.py
"""

from __future__ import annotations

import os
from typing import Any

import anthropic

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # or any claude-* name: both stand for the model that the server has
client = anthropic.Anthropic(base_url=f"{URL}/anthropic", api_key=KEY)
ORDER: Any = {
    "name": "find_order",
    "description": "tells where an order is",
    "input_schema": {
        "type": "object",
        "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 999}},
        "required": ["number"],
    },
}


def stream_answer() -> None:
    with client.messages.stream(
        model=MODEL,
        max_tokens=400,
        system="You are kind.",
        messages=[{"role": "user", "content": "Tell me a story about a fish."}],
    ) as stream:
        for event in stream:
            if event.type == "thinking":
                print(f"\033[2m{event.thinking}\033[0m", end="", flush=True)
            elif event.type == "text":
                print(event.text, end="", flush=True)
        print("\n[", stream.get_final_message().usage.output_tokens, "tokens out ]\n")


def call_a_tool() -> None:
    messages: list[Any] = [{"role": "user", "content": "Where is order 42?"}]
    count = client.messages.count_tokens(model=MODEL, messages=messages, tools=[ORDER])
    print("the prompt has", count.input_tokens, "tokens")
    first = client.messages.create(
        model=MODEL, max_tokens=2000, messages=messages, tools=[ORDER], tool_choice={"type": "any"}
    )
    if first.stop_reason != "tool_use":
        return print("it thought until max_tokens, without a call")
    messages.append({"role": "assistant", "content": first.content})  # thinking blocks included
    results = []
    for block in first.content:
        if block.type == "tool_use":
            print("call:", block.name, block.input)
            results.append({"type": "tool_result", "tool_use_id": block.id, "content": "It is on its way."})
    messages.append({"role": "user", "content": results})
    last = client.messages.create(
        model=MODEL, max_tokens=2000, messages=messages, tools=[ORDER], tool_choice={"type": "none"}
    )
    print("answer:", "".join(block.text for block in last.content if block.type == "text"))
    print("of the second prompt,", last.usage.cache_read_input_tokens, "tokens came from the cache")


if __name__ == "__main__":
    stream_answer()
    call_a_tool()
