"""The engine: token ids in, token ids out, many requests at once; it knows nothing of text or HTTP."""

from hadal.engine.engine import Engine
from hadal.engine.request import FinishReason, Logprob, Request, RequestError, SamplingParams

__all__ = ["Engine", "FinishReason", "Logprob", "Request", "RequestError", "SamplingParams"]
