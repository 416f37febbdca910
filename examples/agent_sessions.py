"""Several agents at once, each with tools over many turns; the share of their prompts that the cache knew.

Every agent has the same beginning, which they share. A `user_id` per agent would keep their caches apart.

pip install openai && python examples/agent_sessions.py [AGENTS] [TURNS]
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY)
RULES = "You keep a list of things to do. " + " ".join(
    f"Rule {n}: keep it short, tidy and in order." for n in range(50)
)
TASK = {"type": "string", "enum": ["wash", "cook", "write", "read", "walk"]}


def describe(name: str, description: str) -> Any:
    schema = {"type": "object", "properties": {"task": TASK}, "required": ["task"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [describe("add", "puts a task on the list"), describe("finish", "takes a task off the list")]


async def work(agent: int, turns: int) -> list[tuple[int, int]]:
    """Tokens from the cache and in all, of each request of one agent."""
    todo: list[str] = []
    spent: list[tuple[int, int]] = []
    messages: list[Any] = [{"role": "system", "content": RULES}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Agent {agent}, turn {turn}: change the list, then tell it."})
        choices: list[Any] = ["required", "none"]  # act, then speak
        for choice in choices:
            made = await client.chat.completions.create(
                model=MODEL, messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=1000,
                extra_body={"thinking": {"type": "disabled"}},
            )  # fmt: skip
            assert made.usage is not None and made.usage.prompt_tokens_details is not None
            spent.append((made.usage.prompt_tokens_details.cached_tokens or 0, made.usage.prompt_tokens))
            said = made.choices[0].message
            messages.append(said)
            for call in said.tool_calls or []:
                task = json.loads(call.function.arguments)["task"]
                todo = [other for other in todo if other != task] + [task] * (call.function.name == "add")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(todo)})
    return spent


async def main(agents: int, turns: int) -> None:
    sessions = await asyncio.gather(*(work(agent, turns) for agent in range(agents)))
    for number, requests in enumerate(zip(*sessions, strict=True), 1):
        cached, total = (sum(column) for column in zip(*requests, strict=True))
        print(f"request {number}: {cached:6} of {total:6} tokens from the cache, {cached / total:.1%}")
    cached, total = (sum(column) for column in zip(*(pair for session in sessions for pair in session), strict=True))
    print(f"{agents} agents, {turns} turns: {cached / total:.1%} of {total} tokens from the cache")


if __name__ == "__main__":
    agents, turns = [int(given) for given in sys.argv[1:]] or [4, 5]
    asyncio.run(main(agents, turns))
