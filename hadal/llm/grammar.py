"""Grammars: what an answer must be -> a Constraint of its tokens, with llguidance.

A constraint rules from the end of thinking on, or from the first DSML token where tool calls come of themselves; what
stands before is free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import llguidance
import numpy as np

from hadal.engine import RequestError, StructuredOutput
from hadal.engine.constraint import ConstraintError
from hadal.llm.tools import Bound, SchemaError, write_calls
from hadal.text import Tokenizer
from hadal.text.tokens import DSML, THINK_CLOSE

ToolChoice = str | Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

_KEPT = 16  # compiled grammars; the tools of a conversation come back with each of its turns
# What a first mask may cost: the default admits grammars of a few bytes that take seconds and hundreds of megabytes.
_LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=100_000)
_START = json.dumps("\n\n<")  # what opens a block of calls, before the first DSML token
# Whitespace in JSON: none, a blank, or a line end with its indentation, so that a model cannot go on with it for ever.
_STYLE = {"whitespace_pattern": r"[ \t]?|\r?\n[ \t]{0,64}"}
_FIELDS = ("json_schema", "json_object")  # of StructuredOutput that callers know as `response_format`


@dataclass(frozen=True)
class _Rules:
    """What all samples of a request share: the grammars of the answer and of a block behind its first DSML token."""

    tokenizer: Tokenizer
    answer: llguidance.LLMatcher | None
    calls: llguidance.LLMatcher | None
    thinking: bool
    free: np.ndarray | None  # the mask before a grammar rules
    think_close: int
    dsml: int


class Guide:
    """The Constraint of one answer."""

    def __init__(self, rules: _Rules) -> None:
        self._rules = rules
        self._seen = 0  # tokens
        self._last = -1
        self._over = False  # the answer ended, and yet goes on
        self._matcher: llguidance.LLMatcher | None = None  # once a grammar rules
        self._matched = 0  # tokens that it took

    @property
    def rules(self) -> bool:
        """Whether the answer must have a form."""
        return self._rules.answer is not None

    def copy(self) -> Guide:
        """The same limits for another sample, before its first token."""
        return Guide(self._rules)

    def allowed(self, output_ids: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of `drafts` may follow `output_ids`; one that ends the answer is not counted."""
        return len(self._look_ahead(output_ids, drafts, cut=True)) - 1

    def masks(self, output_ids: Sequence[int], drafts: Sequence[int]) -> list[np.ndarray | None]:
        """Which ids may follow `output_ids` and each of the `drafts`; raises ConstraintError when there is none."""
        return self._look_ahead(output_ids, drafts, cut=False)

    def _look_ahead(self, output_ids: Sequence[int], drafts: Sequence[int], cut: bool) -> list[np.ndarray | None]:
        if self._seen == 0 and not self._rules.thinking:  # only now: what waits for its turn holds no copy
            self._begin(self._rules.answer)
        for i in range(self._seen, len(output_ids)):
            self._take(output_ids[i])
        before = self._seen, self._last, self._matcher, self._matched
        masks = [None if cut else self._mask()]
        for token in drafts:
            if cut and not self._admits(token):
                break
            self._take(token)
            masks.append(None if cut else self._mask())
        matched = self._matched
        self._seen, self._last, self._matcher, self._matched = before
        if self._matcher is not None and matched > self._matched:
            self._matcher.rollback(matched - self._matched)
        return masks

    def _begin(self, grammar: llguidance.LLMatcher | None) -> None:
        self._matcher = None if grammar is None else grammar.deep_copy()

    def _take(self, token: int) -> None:
        rules = self._rules
        if self._matcher is not None:
            self._over = self._over or token == rules.tokenizer.eos_id
            if not self._over:
                self._matcher.consume_token(token)
                self._matched += 1
        elif token == rules.think_close:
            self._begin(rules.answer)
        elif token == rules.dsml and self._opened():
            self._begin(rules.calls)
        self._seen, self._last = self._seen + 1, token

    def _opened(self) -> bool:
        return self._last >= 0 and self._rules.tokenizer.token_bytes(self._last).endswith(b"<")

    def _admits(self, token: int) -> bool:
        if token == self._rules.tokenizer.eos_id:
            return False
        if self._matcher is not None:
            return self._over or self._matcher.validate_tokens([token]) == 1
        free = self._rules.free
        return free is None or bool(free[token // 8] >> token % 8 & 1)

    def _mask(self) -> np.ndarray | None:
        if self._matcher is None:
            return self._rules.free
        if self._over:
            return None
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: -(-self._rules.tokenizer.vocab_size // 8)]
        if self._matcher.is_error():
            raise ConstraintError(f"the answer cannot go on within its grammar ({_reason(self._matcher)}); simplify it")
        return mask


class _Unusable(Exception):
    """A grammar that cannot be compiled or admits nothing; the message says why."""


class Grammars:
    """Compiles what answers must be for one tokenizer; any thread may call it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=tokenizer.vocab_size
        )
        self._dsml = tokenizer.token_id(DSML)
        self._compile = lru_cache(_KEPT)(self._compile_afresh)
        self._fault = lru_cache(4 * _KEPT)(self._fault_afresh)

    def for_text(self, structured: StructuredOutput | None) -> Guide | None:
        """The constraint of a text to be continued; raises RequestError for a grammar that cannot be used."""
        return self.for_chat(structured, None, None, thinking=False)

    def for_chat(
        self,
        structured: StructuredOutput | None,
        tools: Tools | None,
        tool_choice: ToolChoice | None,
        *,
        thinking: bool,
        parallel: bool = True,
    ) -> Guide | None:
        """The constraint of an answer that begins with `thinking` or without; None when all is allowed.

        Calls of `tools` are held to their schemas whenever they come; a schema that no grammar can express leaves a
        function's arguments free unless it is strict or the choice forces a call. A forced call is the whole answer
        behind the thinking. Without `parallel` an answer has one call at most, as where the choice names a function.
        Raises RequestError for a choice, a schema or a grammar that cannot be used.
        """
        tools = tools or ()
        mode, chosen = _choose(tools, tool_choice)
        parts = {} if structured is None else {"answer": self._answer(structured)}
        if chosen:
            single, forced = mode == "named" or not parallel, mode != "auto"
            parts["calls"] = self._calls(tools, chosen, single=single, forced=forced)
        block = self._compile(_join(None, calls=parts["calls"])) if chosen else None
        start = None
        if mode in ("required", "named"):
            start = self._combine(f"start: {_START} <[{self._dsml}]> @calls", calls=parts["calls"])
        elif structured is not None:
            either = f"start: @answer | {_START} <[{self._dsml}]> @calls" if chosen else None
            start = self._combine(either, **parts)
        elif not tools:
            return None
        banned = [self._dsml] * (block is None)
        banned += [self._tokenizer.eos_id] * (start is not None)  # or it would end without an answer
        close = self._tokenizer.token_id(THINK_CLOSE)
        return Guide(_Rules(self._tokenizer, start, block, thinking, self._all_but(banned), close, self._dsml))

    def _answer(self, structured: StructuredOutput) -> dict[str, Any]:
        """The grammar of the answer's text."""
        kind = structured.kind
        if kind in _FIELDS:
            schema = structured.json_schema or {"type": "object"}
            part: dict[str, Any] = {"json_schema": {**schema, "x-guidance": _STYLE}}
        elif structured.choice is not None:
            part = {"lark_grammar": f"start: {' | '.join(json.dumps(word) for word in structured.choice)}"}
        else:
            part = {"lark_grammar": structured.grammar or f"start: /{_as_lark(structured.regex or '')}/"}
        if reason := self._fault(_join(None, answer=part)):
            param = "response_format" if kind in _FIELDS else kind
            raise RequestError(f"`{kind}` cannot be compiled: {reason}; change it", param)
        return part

    def _calls(self, tools: Tools, chosen: Sequence[int], *, single: bool, forced: bool) -> dict[str, Any]:
        """The grammar of a block of calls of the functions `chosen`."""
        functions = [(tools[i]["function"], True) for i in chosen]
        write = partial(self._write_calls, single=single, forced=forced)
        part, fault = write(functions)
        if not fault:
            return part
        for place, (i, (function, _)) in enumerate(zip(chosen, functions, strict=True)):
            own = write([(function, True)])[1]
            if own and (forced or function.get("strict") is True):
                raise RequestError(
                    f"function {function['name']!r} cannot be held to its schema: {own}; change the schema",
                    f"tools[{i}].function.parameters",
                )
            functions[place] = (function, not own)
        part, fault = write(functions)
        if fault:
            raise RequestError(f"`tools` make no grammar together: {fault}; send fewer or simpler ones", "tools")
        return part

    def _write_calls(self, functions: Sequence[Bound], *, single: bool, forced: bool) -> tuple[dict[str, Any], str]:
        """The grammar of a block, and why it is of no use if so."""
        try:
            part = {"lark_grammar": write_calls(functions, self._dsml, single=single, forced=forced)}
        except SchemaError as error:
            return {}, str(error)
        except (TypeError, AttributeError, KeyError) as error:
            return {}, f"it is no JSON schema ({error})"
        return part, self._fault(_join(None, calls=part))

    def _combine(self, start: str | None, **parts: Any) -> llguidance.LLMatcher:
        try:
            return self._compile(_join(start, **parts))
        except _Unusable as error:
            raise RequestError(f"the form of the answer is too much together with `tools`: {error}; simplify") from None

    def _fault_afresh(self, grammar: str) -> str:
        try:
            self._compile(grammar)
        except _Unusable as error:
            return str(error)
        return ""

    def _all_but(self, ids: Sequence[int]) -> np.ndarray | None:
        mask = np.full(-(-self._tokenizer.vocab_size // 8), 255, np.uint8)
        for i in ids:
            mask[i // 8] &= ~np.uint8(1 << i % 8)
        return mask if ids else None

    def _compile_afresh(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=_LIMITS)
        matcher.compute_bitmask()  # finds grammars that admit nothing, and copies begin warm
        if matcher.is_error():
            raise _Unusable(_reason(matcher))  # so that it is not kept
        return matcher


class _Vocabulary:
    """A tokenizer in the form that llguidance reads; control tokens match no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [token["id"] for token in json.loads(tokenizer.source)["added_tokens"]]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, control=False)


def _choose(tools: Tools, choice: ToolChoice | None) -> tuple[str, list[int]]:
    """What a tool choice asks for ("none", "auto", "required" or "named"), and the places of the tools it admits."""
    everything = list(range(len(tools)))
    if choice is None or choice == "auto":
        return "auto", everything
    if choice == "none":
        return "none", []
    if choice == "required":
        mode, chosen = "required", everything
    else:
        function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if name is None:
            raise RequestError(
                f"`tool_choice` is {choice!r}; give none, auto, required or a function as "
                '{"type": "function", "function": {"name": ...}}',
                "tool_choice",
            )
        mode, chosen = "named", [i for i in everything if tools[i]["function"]["name"] == name]
    if not chosen:
        asked = "a function" if mode == "required" else f"the function {name!r}"
        raise RequestError(f"`tool_choice` asks for {asked} and `tools` has none; give it there", "tool_choice")
    return mode, chosen


def _join(start: str | None, **parts: Any) -> str:
    """One grammar of named parts; `start` says in Lark how they combine."""
    top = [] if start is None else [{"lark_grammar": start}]
    return json.dumps({"grammars": [*top, *({"name": name, **part} for name, part in parts.items())]})


def _as_lark(regex: str) -> str:
    try:
        return llguidance.regex_to_lark(regex, "")
    except ValueError as error:
        raise RequestError(f"the regex is not understood ({error}); change it", "regex") from None


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Why a matcher is of no use, in one line."""
    error = matcher.get_error()
    if error.startswith("NoExtension"):
        return "it admits nothing"
    line = " ".join(re.split(r"\n<state>|\n\s+\d+ \| ", error)[0].split())
    return line.rpartition("failed to compile JSON schema: ")[2].rstrip(".:; ")[:300]
