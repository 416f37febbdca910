"""The text room: token ids <-> text, messages -> prompt, generated text -> reply. It imports no other room."""

from hadal.text.chat import ChatError, Prompt, encode_fim, encode_messages
from hadal.text.prompts import PromptTextError, PromptTexts, own_prompt_texts, read_prompt_texts
from hadal.text.sampled import SAMPLED_KEY, SampledTurn, find_sampled
from hadal.text.stops import StopStrings
from hadal.text.stream import Content, Event, OutputParser, Reasoning, ToolCall
from hadal.text.tokenizer import IncrementalDecoder, Tokenizer, TokenizerError, train_tokenizer

__all__ = [
    "SAMPLED_KEY",
    "ChatError",
    "Content",
    "Event",
    "IncrementalDecoder",
    "OutputParser",
    "Prompt",
    "PromptTextError",
    "PromptTexts",
    "Reasoning",
    "SampledTurn",
    "StopStrings",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "encode_fim",
    "encode_messages",
    "find_sampled",
    "own_prompt_texts",
    "read_prompt_texts",
    "train_tokenizer",
]
