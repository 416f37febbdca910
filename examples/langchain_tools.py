"""LangChain: a chain of prompt, model and parser; an answer as a pydantic object; tools bound to the model.

pip install langchain-openai && python examples/langchain_tools.py
"""

from __future__ import annotations

import os
from typing import Literal

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

URL, KEY = os.environ.get("HADAL_URL", "http://127.0.0.1:8000"), os.environ.get("HADAL_KEY", "none")
model = ChatOpenAI(
    model="deepseek-v4-flash",  # an alias of whatever model the server has
    base_url=f"{URL}/v1",
    api_key=KEY,
    max_tokens=1000,
    extra_body={"thinking": {"type": "disabled"}},  # LangChain does not send reasoning_content back
)


class Mood(BaseModel):
    """What a message sounds like."""

    mood: Literal["glad", "sad", "angry"]
    why: str = Field(max_length=80)


@tool
def stock(article: Literal["lamp", "chair", "table"]) -> str:
    """Tells how many of an article there are."""
    return f"{len(article)} of {article}"


def main() -> None:
    chain = ChatPromptTemplate.from_messages([("system", "You are kind."), ("user", "Write about {topic}.")])
    for piece in (chain | model | StrOutputParser()).stream({"topic": "the sea"}):
        print(piece, end="", flush=True)
    print()
    found = model.with_structured_output(Mood, method="json_schema").invoke("I love this lamp!")
    assert isinstance(found, Mood)
    print("mood:", found.mood, "/", found.why)
    answer = model.bind_tools([stock], tool_choice="required").invoke("How many lamps are there?")
    for call in answer.tool_calls:
        print("call:", call["args"], "->", stock.invoke(call["args"]))


if __name__ == "__main__":
    main()
