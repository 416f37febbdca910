"""The engine: token ids in, token ids out, many requests at once; it knows nothing of text or HTTP."""

from hadal.engine.engine import Engine, EngineBusy
from hadal.engine.memory import MemoryPlan, plan_memory
from hadal.engine.options import EngineOptions, engine_options
from hadal.engine.request import (
    MAX_SCHEMA,
    MAX_STOP_IDS,
    MAX_STOPS,
    FinishReason,
    Logprob,
    Request,
    RequestError,
    SamplingParams,
    StructuredOutput,
)
from hadal.engine.stats import EngineStats

__all__ = [
    "MAX_SCHEMA",
    "MAX_STOPS",
    "MAX_STOP_IDS",
    "Engine",
    "EngineBusy",
    "EngineOptions",
    "EngineStats",
    "FinishReason",
    "Logprob",
    "MemoryPlan",
    "Request",
    "RequestError",
    "SamplingParams",
    "StructuredOutput",
    "engine_options",
    "plan_memory",
]
