"""Support automation: a bot that must look an order up before it answers, and may start a return, over several turns.

pip install openai && python examples/support_bot.py
"""

from __future__ import annotations

import json
import os
from typing import Any

import openai

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
MODEL = "deepseek-v4-flash"  # an alias of whatever model the server has
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
ORDERS = {
    "A1001": {"article": "lamp", "state": "sent on Monday", "paid": 40},
    "A1002": {"article": "chair", "state": "delivered", "paid": 90},
}
NUMBER = {"type": "string", "pattern": "^A[0-9]{4}$"}
WHY = {"type": "string", "enum": ["broken", "wrong article", "changed mind"]}


def find_order(number: str) -> Any:
    return ORDERS.get(number) or {"error": f"there is no order {number}"}


def start_return(number: str, why: str) -> Any:
    order = ORDERS.get(number)
    if order is None or order["state"] != "delivered":
        return {"error": "only orders that were delivered can be returned"}
    order["state"] = f"to be returned: {why}"
    return {"refund": order["paid"]}


def describe(name: str, description: str, **fields: Any) -> Any:
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    describe("find_order", "tells an order's article, state and price", number=NUMBER),
    describe("start_return", "lets the customer send an article back", number=NUMBER, why=WHY),
]


def answer(messages: list[Any], rounds: int = 3) -> str:
    """The bot's words after at most so many rounds of calls: the first must look something up, the last must speak."""
    for number in range(rounds + 1):
        choice: Any = {0: "required", rounds: "none"}.get(number, "auto")
        made = client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=2000
        )
        turn = made.choices[0].message
        messages.append(turn)  # with reasoning_content, which V4 wants back
        if not turn.tool_calls:
            return turn.content or ""
        for call in turn.tool_calls:
            try:
                result = {"find_order": find_order, "start_return": start_return}[call.function.name](
                    **json.loads(call.function.arguments)
                )
            except (KeyError, TypeError, ValueError) as error:  # the model may invent a tool when it is not forced
                result = {"error": f"{type(error).__name__}: {error}"}
            print("   ", call.function.name, call.function.arguments, "->", json.dumps(result))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    return turn.content or ""


def main() -> None:
    messages: list[Any] = [{"role": "system", "content": "You help customers of a furniture shop. Be brief."}]
    for question in ["Where is my order A1001?", "The chair of A1002 is broken, I want to return it.", "Thank you!"]:
        print("customer:", question)
        messages.append({"role": "user", "content": question})
        print("bot:", answer(messages), "\n")


if __name__ == "__main__":
    main()
