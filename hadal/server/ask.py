"""Ask: what a client wants, in one neutral form that every API's body becomes before anything else looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation, or texts to continue, and how to answer.

    Either `messages` (OpenAI's shape) or `prompts` (each a text or token ids; a text may have a `suffix` to fill the
    middle in front of) is given. `sampling` holds fields of SamplingParams; what is absent is the model's own default.
    `ignored` names parameters of the body that are accepted for compatibility and have no effect.
    """

    model: str  # as the client spelled it; answers echo it
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    suffix: str | None = None
    thinking: bool = False
    effort: str = "high"  # low, high or max
    tools: tuple[Mapping[str, Any], ...] = ()  # OpenAI's shape
    tool_choice: str | Mapping[str, Any] = "auto"  # OpenAI's shape
    parallel_tool_calls: bool = True  # else one call at most
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    user_id: str | None = None
    priority: int = 0  # higher runs first
    strict_history: bool = False  # refuse what DeepSeek refuses in earlier turns; else it is repaired
    ignored: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return int(self.sampling.get("n") or 1)
