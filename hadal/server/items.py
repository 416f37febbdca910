"""Items: the input of POST /responses, its texts, thoughts, calls and results, and the conversation that they make."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from hadal.server.body import List
from hadal.server.parts import Part, join_texts, plain_call, read_text_as
from hadal.server.responses_wire import SEALED

NOTHING_STORED = "nothing is stored here; send the whole conversation as `input`"
_TEXT_ONLY = "DeepSeek-V4 reads text only; send the content as text"


class Text(Part):
    """A part of the content of an item."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "input_text": ("text", "prompt_cache_breakpoint"),
        "output_text": ("text", "annotations logprobs parsed"),
        "reasoning_text": ("text", ""),
        "summary_text": ("text", ""),
        "refusal": ("refusal", ""),
    }
    remedy: ClassVar[str] = _TEXT_ONLY
    text: str = ""
    refusal: str = ""
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None
    prompt_cache_breakpoint: Any = None


Texts = Annotated[List[Text], BeforeValidator(read_text_as("input_text"))]


class Item(Part):
    """One entry of `input`. Answers of this server can be sent back as they came."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "message": ("role content", "id status phase"),
        "reasoning": ("", "id status content summary encrypted_content"),
        "function_call": ("call_id name arguments", "id status parsed_arguments namespace"),
        "function_call_output": ("output", "call_id name namespace id status"),
        "custom_tool_call": ("call_id name input", "id status namespace"),
        "custom_tool_call_output": ("call_id output", "id status"),
    }
    remedy: ClassVar[str] = f"what an item refers to is not here, for {NOTHING_STORED}"
    type: str = "message"
    id: Any = None
    status: Any = None
    phase: Any = None
    role: Literal["user", "assistant", "system", "developer"] = "user"
    content: Texts = Field([])
    summary: List[Text] = Field([])
    encrypted_content: str = ""
    call_id: str = ""
    name: str = ""
    namespace: str = ""
    arguments: str = ""
    parsed_arguments: Any = None
    input: str = ""
    output: Texts = Field([])

    @property
    def said(self) -> str:
        """The text of a message or of a tool's result."""
        return join_texts([part.text or part.refusal for part in self.content or self.output])

    @property
    def result(self) -> dict[str, Any]:
        """A tool's result in the chat API's shape; one that nobody called (Codex: a goal) is told as the user's."""
        if self.call_id:
            return {"role": "tool", "tool_call_id": self.call_id, "content": self.said}
        name = prompt_name(self.namespace, self.name)
        return {"role": "user", "content": f"{name}:\n{self.said}" if name else self.said}

    @property
    def thought(self) -> str:
        """The reasoning that an item carries, openly or sealed by this server; else what another one summed up."""
        if self.content:
            return "".join(part.text for part in self.content)
        if self.encrypted_content.startswith(SEALED):
            try:
                return base64.b64decode(self.encrypted_content[len(SEALED) :], validate=True).decode()
            except ValueError:
                return ""
        return join_texts([part.text for part in self.summary])

    @property
    def call(self) -> dict[str, Any]:
        """A call in the chat API's shape; free text is the one argument `input`."""
        free = self.type == "custom_tool_call"
        arguments = json.dumps({"input": self.input}, ensure_ascii=False) if free else self.arguments
        return plain_call(self.call_id, prompt_name(self.namespace, self.name), arguments)


def prompt_name(namespace: str, name: str) -> str:
    """What the model knows a tool by: DeepSeek-V4's format has no namespaces."""
    return f"{namespace}__{name}" if namespace else name


def conversation(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """The items as chat messages.

    Reasoning, text and calls that follow one another are one turn. System messages at the start are one; DeepSeek-V4's
    format has no place for later ones, so they are told with the user's words.
    """
    system = [instructions] if instructions else []
    said: list[dict[str, Any]] = []
    for item in items:
        if item.type == "message" and item.role != "assistant":
            if item.role != "user" and not said:
                system.append(item.said)
            else:
                said.append({"role": "user", "content": item.said})
        elif item.type.endswith("_output"):
            said.append(item.result)
        else:
            if not said or said[-1]["role"] != "assistant":
                said.append({"role": "assistant", "content": ""})
            _add_to_turn(said[-1], item)
    return [*([{"role": "system", "content": join_texts(system)}] if system else []), *said]


def _add_to_turn(turn: dict[str, Any], item: Item) -> None:
    if item.type == "message":
        turn["content"] = join_texts([turn["content"], item.said]) if turn["content"] else item.said
    elif item.type != "reasoning":
        turn.setdefault("tool_calls", []).append(item.call)
    elif thought := item.thought:
        turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
