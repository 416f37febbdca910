"""Thinking: every spelling of the thinking switch that clients use, folded into one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hadal.server.body import Body
from hadal.server.errors import APIError
from hadal.server.settings import Settings


@dataclass(frozen=True, slots=True)
class Thinking:
    """Whether an answer starts with reasoning, and how much of it: low, high or max."""

    enabled: bool
    effort: str

    def to_dict(self) -> dict[str, str | None]:
        """As responses echo it."""
        return {"type": "enabled" if self.enabled else "disabled", "effort": self.effort if self.enabled else None}


class ThinkingType(Body):
    """DeepSeek's and Anthropic's switch; `adaptive` and `auto` leave the choice to the default."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class TemplateKwargs(Body):
    """The switches that chat templates of V4 take at other servers."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    thinking_mode: Literal["thinking", "chat"] | None = None
    reasoning_effort: str | None = None


class Reasoning(Body):
    """OpenRouter's and OpenAI's object."""

    effort: str | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    exclude: bool | None = None
    summary: str | None = None


def _bool_as_type(value: Any) -> Any:
    return {"type": "enabled" if value else "disabled"} if isinstance(value, bool) else value


class Switch(Body):
    """The spellings of a request; `decide` folds them."""

    thinking: Annotated[
        ThinkingType | None, BeforeValidator(_bool_as_type, json_schema_input_type=ThinkingType | bool | None)
    ] = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: str | None = None
    reasoning: Reasoning | None = None
    think: bool | str | None = None
    include_reasoning: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None

    def decide(self, settings: Settings, model: str) -> Thinking:
        """The setting in effect; APIError for an unknown model or spellings that contradict each other."""
        kwargs, reasoning = self.chat_template_kwargs or TemplateKwargs(), self.reasoning or Reasoning()
        kind = self.thinking.type if self.thinking else None
        think = "on" if self.think is True else "none" if self.think is False else self.think
        switches = {
            "thinking.type": {"enabled": True, "disabled": False}.get(kind or ""),
            "enable_thinking": self.enable_thinking,
            "chat_template_kwargs.thinking": kwargs.thinking,
            "chat_template_kwargs.enable_thinking": kwargs.enable_thinking,
            "chat_template_kwargs.thinking_mode": kwargs.thinking_mode and kwargs.thinking_mode == "thinking",
            "reasoning.enabled": reasoning.enabled,
            "think": None if think is None else think != "none",
        }
        efforts = {
            "reasoning_effort": self.reasoning_effort,
            "chat_template_kwargs.reasoning_effort": kwargs.reasoning_effort,
            "reasoning.effort": reasoning.effort,
            "think": None if think in ("on", "none") else think,
        }
        return decide(
            settings,
            model,
            [(path, value) for path, value in switches.items() if value is not None],
            [(path, word) for path, word in efforts.items() if word is not None],
        )

    @property
    def shown(self) -> bool:
        """Whether the client wants to see the reasoning."""
        hidden = self.reasoning is not None and self.reasoning.exclude
        return not hidden and self.include_reasoning is not False

    def without_effect(self, thinking: Thinking) -> tuple[str, ...]:
        """Fields that were sent and change nothing; an effort does not where nothing is thought."""
        idle = {"budget_tokens", "display", "max_tokens", "summary"}
        sent = {"thinking": self.thinking, "reasoning": self.reasoning}
        names = [f"{path}.{key}" for path, part in sent.items() if part for key in sorted(part.model_fields_set & idle)]
        names += ["thinking_budget"] * (self.thinking_budget is not None)
        if self.reasoning_effort not in (None, "none") and not thinking.enabled:
            names.append("reasoning_effort")
        return tuple(names)


def decide(
    settings: Settings, model: str, switches: Sequence[tuple[str, bool]], efforts: Sequence[tuple[str, str]] = ()
) -> Thinking:
    """The setting in effect, from what fields (by their paths in the body) say; enabled and high where nothing is said.

    The habit of an alias counts where no field switches. Effort words are folded as the settings say, "none" switches
    thinking off. Raises APIError for an unknown model or word, and for fields that contradict each other.
    """
    name = settings.names.resolve(model)
    if name is None:
        known = ", ".join(settings.names.listed())
        raise APIError(
            400, f"model {model!r} does not exist; this server has {known}", param="model", code="model_not_found"
        )
    switches = [*switches, *((path, False) for path, word in efforts if word == "none")]
    folded = [(path, _fold(settings, path, word)) for path, word in efforts if word != "none"]
    _check_same(switches, ("switches thinking on", "switches thinking off"))
    _check_same(folded, None)
    default = True if name.thinking is None else name.thinking
    return Thinking(switches[0][1] if switches else default, folded[0][1] if folded else "high")


def _fold(settings: Settings, path: str, word: str) -> str:
    efforts = settings.efforts
    if word not in efforts:
        raise APIError(422, f"`{path}` is {word!r}; choose none, {', '.join(efforts)}", param=path)
    return efforts[word]


def _check_same(said: Sequence[tuple[str, bool | str]], words: tuple[str, str] | None) -> None:
    for path, value in said[1:]:
        first, before = said[0]
        if value != before:
            meanings = [f"asks for {v} effort" if words is None else words[not v] for v in (before, value)]
            raise APIError(422, f"`{first}` {meanings[0]} and `{path}` {meanings[1]}; send one of them", param=path)
