"""Log-probabilities in the shapes of answers: OpenAI's for chat, OpenAI's for completions, vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hadal.engine import Logprob
from hadal.text import IncrementalDecoder, Tokenizer

LEAST = -9999.0  # what stands for anything less likely, as at DeepSeek; JSON has no infinity

Entry = Mapping[int, Logprob]  # the chosen token first


def chat_logprobs(entries: Sequence[Entry], top: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One object for each token, with its `top` likeliest."""
    out = []
    for entry in entries:
        shown = {
            i: {"token": tokenizer.decode([i]), "logprob": _floor(p), "bytes": list(tokenizer.token_bytes(i))}
            for i, p in entry.items()
        }
        best = [shown[i] for i in _likeliest(entry, top)]
        out.append(shown[next(iter(entry))] | {"top_logprobs": best})
    return out


def prompt_logprobs(entries: Sequence[Entry | None], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each token of a prompt, by its id, None where nothing foretells it."""
    return [
        None
        if entry is None
        else {
            str(i): {"logprob": _floor(p), "rank": p.rank, "decoded_token": tokenizer.decode([i])}
            for i, p in entry.items()
        }
        for entry in entries
    ]


class CompletionLogprobs:
    """OpenAI's four lists, token by token; offsets count characters from the start of the first token's text.

    With `as_ids` tokens are spelled as vLLM spells ids, since texts of different tokens may look alike.
    """

    def __init__(self, top: int, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._top, self._as_ids = top, as_ids
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._offset = 0

    def lists(self, ids: Sequence[int], entries: Sequence[Entry | None]) -> dict[str, list[Any]]:
        """The lists for the next tokens."""
        out = _empty()
        for i, entry in zip(ids, entries, strict=True):
            out["tokens"].append(self._spell(i))
            out["token_logprobs"].append(None if entry is None else _floor(entry[i]))
            best = None if entry is None else {self._spell(k): _floor(entry[k]) for k in _likeliest(entry, self._top)}
            out["top_logprobs"].append(best)
            out["text_offset"].append(self._offset)
            self._offset += len(self._decoder.feed([i]))
        return out

    def _spell(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokenizer.decode([token])


def join_lists(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """The lists of several pieces, end to end."""
    return {name: [value for part in parts for value in part[name]] for name in _empty()}


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _likeliest(entry: Entry, top: int) -> list[int]:
    return [i for _, i in sorted((p.rank, i) for i, p in entry.items() if p.rank <= top)]


def _floor(p: Logprob) -> float:
    return max(p.logprob, LEAST)
