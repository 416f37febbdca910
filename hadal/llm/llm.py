"""LLM: a model with its tokenizer and engine, driven in vLLM's names; the composition root of the library."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from hadal import device as devices
from hadal.checkpoint import CheckpointError, inspect, load_model, locate_model
from hadal.engine import (
    Engine,
    EngineOptions,
    MemoryPlan,
    Request,
    RequestError,
    SamplingParams,
    engine_options,
    plan_memory,
)
from hadal.engine.constraint import Constraint
from hadal.kernels.pages import PAGE_TOKENS
from hadal.llm.answer import Delta, Generation, RequestOutput
from hadal.llm.grammar import Grammars, ToolChoice
from hadal.text import (
    Prompt,
    PromptTexts,
    Tokenizer,
    TokenizerError,
    encode_fim,
    encode_messages,
    own_prompt_texts,
    read_prompt_texts,
)
from hadal.text.tokens import USER

PromptLike = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Sampling = SamplingParams | Sequence[SamplingParams] | None

_OFFICIAL_USER_ID = 128803  # the user token's id in the vendor's vocabulary


class ChatOptions(TypedDict, total=False):
    """How a conversation is put to the model; `reasoning_effort` None is the default of the model's prompt rules."""

    thinking: bool
    reasoning_effort: str | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool


class LLM:
    """A model ready to answer; not thread-safe: one thread drives it.

    `model` is a directory in the official layout, a Hub repo id or "nano", the embedded one. `mode` "fast" skips the
    official fake-quantisation; "faithful" rounds where the official code rounds. `expert_memory` is how many bytes of
    experts stay in memory when they do not all fit. `progress` is told how memory is to be divided before anything is
    loaded, and what reading experts from disk will cost. The other options are those of `EngineOptions`.
    Raises a ValueError of the room concerned for a model, device or option that cannot be used.
    """

    _read_texts: Callable[[], PromptTexts]
    _defaults: dict[str, Any]

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        mode: str = "fast",
        device: str = "auto",
        expert_memory: int | None = None,
        progress: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> None:
        limits = engine_options(options)  # before a model is loaded for options that cannot be
        if mode not in ("fast", "faithful"):
            raise RequestError(f"unknown mode {mode!r}; choose fast or faithful", "mode")
        where = devices.resolve(device)
        directory = locate_model(model)
        if not directory.is_dir():
            raise CheckpointError("this installation has no embedded model; give a model directory")
        tokenizer = Tokenizer.from_directory(directory)
        forecast = _forecast(directory, where, limits)
        progress(f"{forecast}")
        faithful = mode == "faithful"
        dtype = "bfloat16" if faithful else "auto"
        loaded = load_model(directory, device=where, dtype=dtype, fake_quant=faithful, expert_memory=expert_memory)
        if tokenizer.eos_id != loaded.config.eos_token_id:
            raise TokenizerError(
                f"the tokenizer of {directory} ends answers with id {tokenizer.eos_id} and the model with "
                f"{loaded.config.eos_token_id}; take both from the same release"
            )
        if loaded.runner is not None and loaded.runner.residency is not None:
            progress(f"{loaded.runner.residency.estimate}")
        pending = loaded.runner.pending_bytes if loaded.runner is not None else 0
        engine = Engine(loaded, device=where, vocabulary=tokenizer.vocab_size, weights=pending, **options)
        self._compose(engine, tokenizer, name=Path(model).resolve().name)
        self._adopt(directory)

    @classmethod
    def from_parts(cls, engine: Engine, tokenizer: Tokenizer, texts: PromptTexts, *, name: str) -> LLM:
        """An LLM around an engine that exists already, for instance with a model in training."""
        llm = cls.__new__(cls)
        llm._compose(engine, tokenizer, name=name)
        llm._read_texts = lambda: texts
        return llm

    @classmethod
    def without_weights(cls, model: str | Path, make_engine: Callable[[Tokenizer], Any]) -> LLM:
        """An LLM whose engine needs no weights here; tokenizer, sentences and habits are those of a model's directory.

        Raises a ValueError of the room concerned for a directory that cannot be used.
        """
        directory = locate_model(model, weights=False)
        tokenizer = Tokenizer.from_directory(directory)
        llm = cls.__new__(cls)
        llm._compose(make_engine(tokenizer), tokenizer, name=Path(model).resolve().name)
        llm._adopt(directory)
        return llm

    def _adopt(self, directory: Path) -> None:
        tokenizer = self.tokenizer
        self._defaults = _own_sampling(directory / "generation_config.json")
        self._read_texts = lambda: _prompt_texts(directory, tokenizer)

    def _compose(self, engine: Engine, tokenizer: Tokenizer, *, name: str) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = name
        self._live: dict[Request, Generation] = {}
        self._defaults = {}

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer)

    @cached_property
    def _texts(self) -> PromptTexts:
        # Read when a conversation needs them: a base model without the vendor's sentences can still continue text.
        return self._read_texts()

    @property
    def efforts(self) -> tuple[str, ...]:
        """The reasoning efforts that this model's prompt rules know."""
        return tuple(self._texts.efforts)

    def default_params(self, **given: Any) -> SamplingParams:
        """SamplingParams with the model's own temperature and top_p (generation_config.json) where `given` has none."""
        return SamplingParams(**self._defaults | {name: value for name, value in given.items() if value is not None})

    def generate(
        self, prompts: PromptLike | Sequence[PromptLike], sampling_params: Sampling = None
    ) -> list[RequestOutput]:
        """Continue texts or token ids, all together; one RequestOutput per prompt, in order.

        A text gets the begin-of-sentence token in front unless it starts with it; token ids are taken as they are.
        Raises RequestError for a prompt or parameter that cannot be served, before anything is computed.
        """
        many = _as_list(prompts)
        params = self._spread(sampling_params, len(many))
        return self._run([self.prepare_prompt(prompt, p) for prompt, p in zip(many, params, strict=True)])

    def chat(
        self, messages: Messages | Sequence[Messages], sampling_params: Sampling = None, **options: Unpack[ChatOptions]
    ) -> list[RequestOutput]:
        """Answer one conversation or several, in OpenAI's message form; raises ChatError or RequestError."""
        many: Sequence[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        params = self._spread(sampling_params, len(many))
        return self._run([self.prepare_chat(m, p, **options) for m, p in zip(many, params, strict=True)])

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[Delta]:
        """As `generate` for one prompt and one answer, delta by delta; closing the iterator ends the request."""
        return self._follow(self.prepare_prompt(prompt, sampling_params or self.default_params()))

    def stream_chat(
        self, messages: Messages, sampling_params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> Iterator[Delta]:
        """As `chat` for one conversation and one answer, delta by delta; closing the iterator ends the request."""
        return self._follow(self.prepare_chat(messages, sampling_params or self.default_params(), **options))

    def prepare_chat(
        self,
        messages: Messages,
        params: SamplingParams,
        *,
        thinking: bool = True,
        reasoning_effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        tenant: str = "",
        priority: int = 0,
    ) -> list[Generation]:
        """The `n` checked answers-to-be, not queued yet; changes nothing here, so any thread may call it.

        `tool_choice` has OpenAI's shape: "none", "auto" (also None), "required" or a named function. What is forced, by
        it or by `params.structured`, begins where thinking ends; a JSON schema is told to the model as well. Without
        `parallel_tool_calls` an answer has one call at most.
        """
        structured = params.structured
        prompt = encode_messages(
            messages,
            self._texts,
            thinking=thinking,
            effort=reasoning_effort,
            tools=tools,
            response_format=structured.json_schema if structured is not None else None,
        )
        if prompt.end == "closed":
            raise RequestError("the last message leaves nothing to answer; end with a user or tool message", "messages")
        constraint = self._grammars.for_chat(
            structured, tools, tool_choice, thinking=prompt.end == "thinking", parallel=parallel_tool_calls
        )
        if constraint is not None and constraint.rules and prompt.end == "content" and messages[-1].get("prefix"):
            raise RequestError(
                "an answer of a given form cannot continue a `prefix`; leave out one of them", "messages"
            )
        ids = self.tokenizer.encode_pieces(prompt.pieces)
        return self._prepare(ids, params, prompt.text, prompt, constraint, tenant, priority)

    def prepare_prompt(
        self, prompt: PromptLike, params: SamplingParams, *, tenant: str = "", priority: int = 0
    ) -> list[Generation]:
        """As `prepare_chat`, for a text or token ids to be continued."""
        constraint = None if params.structured is None else self._grammars.for_text(params.structured)
        if not isinstance(prompt, str):
            return self._prepare(prompt, params, None, None, constraint, tenant, priority)
        ids = self.tokenizer.encode(prompt)
        if ids[:1] != [self.tokenizer.bos_id]:
            ids = [self.tokenizer.bos_id, *ids]
        return self._prepare(ids, params, prompt, None, constraint, tenant, priority)

    def prepare_infill(
        self, prompt: str, suffix: str, params: SamplingParams, *, tenant: str = "", priority: int = 0
    ) -> list[Generation]:
        """As `prepare_chat`, for the text that belongs between `prompt` and `suffix`."""
        pieces = encode_fim(prompt, suffix).pieces
        return self.prepare_prompt(self.tokenizer.encode_pieces(pieces), params, tenant=tenant, priority=priority)

    def submit(self, generation: Generation) -> None:
        """Queue a prepared answer; EngineBusy when as many wait as may."""
        self.engine.submit(generation.request)
        self._live[generation.request] = generation

    def abort(self, generation: Generation) -> None:
        """Drop an answer; nothing happens if it has ended."""
        if self._live.pop(generation.request, None) is not None:
            self.engine.abort(generation.request)

    def close(self) -> None:
        """End what is under way and write prefixes that wait for the disk; the LLM is of no use afterwards."""
        for generation in list(self._live.values()):
            self.abort(generation)
        self.engine.close()

    @property
    def busy(self) -> bool:
        """Whether any answer is under way."""
        return self.engine.busy

    def step(self) -> list[tuple[Generation, Delta]]:
        """One step of the engine, and what it added to each answer it touched."""
        advanced = []
        for request in self.engine.step():
            generation = self._live[request]
            delta = generation.advance()
            if delta.finish_reason is not None:
                self.engine.abort(request)  # a stop string ends a request that the engine would continue
                del self._live[request]
            if generation.inbox is not None:
                generation.inbox.append(delta)
            advanced.append((generation, delta))
        return advanced

    def _spread(self, params: Sampling, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params()] * count
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling parameters for {count} prompts; give one, or one for each")
        return list(params)

    def _prepare(
        self, ids: Sequence[int], params: SamplingParams, text: str | None, chat: Prompt | None,
        constraint: Constraint | None, tenant: str, priority: int,
    ) -> list[Generation]:  # fmt: skip
        requests: list[Request] = []
        for i in range(params.n):
            own = None if constraint is None else constraint.copy()
            leader = requests[0] if requests else None
            requests.append(
                self.engine.prepare(
                    ids, params, stream=i, priority=priority, tenant=tenant, leader=leader, constraint=own
                )
            )
        return [Generation(request, self.tokenizer, text, chat) for request in requests]

    def _run(self, groups: Sequence[Sequence[Generation]]) -> list[RequestOutput]:
        generations = [generation for group in groups for generation in group]
        try:
            for generation in generations:
                self.submit(generation)
            while any(generation.finish_reason is None for generation in generations):
                self.step()
        finally:
            for generation in generations:
                self.abort(generation)
        return [
            RequestOutput(
                request_id=str(group[0].request.id),
                prompt=group[0].prompt,
                prompt_token_ids=list(group[0].request.prompt_ids),
                outputs=[generation.output() for generation in group],
                num_cached_tokens=group[0].request.cached_tokens or 0,
                prompt_logprobs=group[0].prompt_logprobs(),
            )
            for group in groups
        ]

    def _follow(self, group: list[Generation]) -> Iterator[Delta]:
        if len(group) != 1:
            raise RequestError("`n` is more than 1; a stream carries a single answer", "n")
        return self._deltas(group[0])

    def _deltas(self, generation: Generation) -> Iterator[Delta]:
        # Whoever steps, steps every answer under way: what another stream's step added waits in the inbox.
        inbox = generation.inbox = deque()
        self.submit(generation)
        try:
            while inbox or generation.finish_reason is None:
                if inbox:
                    yield inbox.popleft()
                else:
                    self.step()
        finally:
            generation.inbox = None
            self.abort(generation)


def _forecast(directory: Path, device: torch.device, limits: EngineOptions) -> MemoryPlan:
    """How memory is going to be divided, from the headers of the files alone."""
    facts, free = inspect(directory), devices.memory_available(device)
    page = round((facts.kv_bytes_per_token or 0) * PAGE_TOKENS)
    weights = min(facts.bytes or 0, free * 3 // 4)  # experts beyond that stay on disk
    return plan_memory(limits, free=free, weights=weights, home=facts.state_bytes or 0, page=page)


def _prompt_texts(directory: Path, tokenizer: Tokenizer) -> PromptTexts:
    """A model with the vendor's vocabulary was taught the vendor's sentences; models trained here know our own."""
    if tokenizer.token_id(USER) != _OFFICIAL_USER_ID:
        return own_prompt_texts()
    return read_prompt_texts(directory)


def _own_sampling(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        raw = json.loads(file.read_text("utf-8"))
        own = {name: raw[name] for name in ("temperature", "top_p") if raw.get(name) is not None}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is no JSON object ({error}); fetch it again or remove it") from None
    return own if raw.get("do_sample", True) else {"temperature": 0.0}


def _as_list(prompts: Any) -> list[PromptLike]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)
