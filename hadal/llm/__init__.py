"""`hadal.LLM`: the composition root that joins checkpoint, text and engine; the server and the terminal stand on it."""

from hadal.llm.answer import CompletionOutput, Delta, Generation, RequestOutput, ToolCall
from hadal.llm.llm import LLM, ChatOptions

__all__ = ["LLM", "ChatOptions", "CompletionOutput", "Delta", "Generation", "RequestOutput", "ToolCall"]
