"""The openai client: a streamed answer with its reasoning, a tool's round trip, and an answer in a given form.

pip install openai && python examples/openai_sdk.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)


def stream_answer() -> None:
    messages: Any = [{"role": "user", "content": "Tell me a story about a fish."}]
    usage = None
    for chunk in client.chat.completions.create(model=MODEL, messages=messages, max_tokens=400, stream=True):
        for choice in chunk.choices:
            reasoning = getattr(choice.delta, "reasoning_content", None) or ""  # DeepSeek's field, unknown to OpenAI
            print(f"\033[2m{reasoning}\033[0m" if reasoning else choice.delta.content or "", end="", flush=True)
        usage = chunk.usage or usage
    assert usage is not None
    print(f"\n[{usage.prompt_tokens} tokens in, {usage.completion_tokens} out]\n")


def call_a_tool() -> None:
    city = {"type": "string", "enum": ["Paris", "Lima", "Oslo"]}
    function = {"name": "temperature", "description": "tells how warm a city is"}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    tools: Any = [{"type": "function", "function": {**function, "parameters": parameters}}]
    messages: list[Any] = [{"role": "user", "content": "How warm is it in Lima?"}]
    # "required" forces a call; "auto" lets the model choose. Thinking goes on in front of the call either way.
    first = client.chat.completions.create(
        model=MODEL, messages=messages, tools=tools, tool_choice="required", max_tokens=2000
    )
    turn = first.choices[0].message
    if not turn.tool_calls:
        return print("it thought until max_tokens, without a call\n")
    messages.append(turn)  # with its reasoning_content: DeepSeek-V4 wants it back when tools are there
    for call in turn.tool_calls:
        print("call:", call.function.name, call.function.arguments)
        degrees = {"Paris": 12, "Lima": 21, "Oslo": -3}[json.loads(call.function.arguments)["city"]]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{degrees} degrees"})
    last = client.chat.completions.create(
        model=MODEL, messages=messages, tools=tools, tool_choice="none", max_tokens=2000
    )
    print("answer:", last.choices[0].message.content, "\n")


def keep_to_a_form() -> None:
    fields = {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Ann turned 31 today. Who is it, and how old?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        max_tokens=500,
        extra_body={"thinking": {"type": "disabled"}},
    )
    print("form:", json.loads(answer.choices[0].message.content or ""))


if __name__ == "__main__":
    stream_answer()
    call_a_tool()
    keep_to_a_form()
