"""A model that chooses at random, and random JSON schemas whose values are so short that it comes to their end."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fakes import ScriptedModel

NAMES = st.sampled_from(["a", "b", "city", "tag s", "größe", "x/y", "_"])
_BOUNDS = st.tuples(st.integers(-99, 99), st.integers(0, 300)).map(lambda b: {"minimum": b[0], "maximum": b[0] + b[1]})
_LENGTHS = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda b: {"minLength": b[0], "maxLength": b[0] + b[1]})
_WORDS = st.sampled_from(["red", "a b", "", 'say "x"', "line\nend", "</b>", "ü", "\\d", "null", "3"])
_SCALARS = st.one_of(_WORDS, st.integers(-5, 5), st.booleans(), st.none())
LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    _BOUNDS.map(lambda b: {"type": "integer", **b}),
    _LENGTHS.map(lambda b: {"type": "string", **b}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
    st.lists(_WORDS, min_size=1, max_size=3, unique=True).map(lambda words: {"type": "string", "enum": words}),
    st.lists(_SCALARS, min_size=1, max_size=4, unique_by=repr).map(lambda values: {"enum": values}),
    _SCALARS.map(lambda value: {"const": value}),
    st.just({"type": ["string", "null"], "maxLength": 2}),
    st.just({"type": "string", "pattern": "^[a-c]{2}[0-9]$"}),
)


class DiceModel(ScriptedModel):
    """To this one all tokens are alike."""

    def row(self, ids: list[int]) -> Tensor:
        return torch.zeros(self.config.vocab_size)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """A schema of any value."""
    return st.recursive(LEAVES, _combine, max_leaves=6)


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A closed schema of objects, some of whose properties are required."""

    def build(properties: dict[str, Any], required: int) -> dict[str, Any]:
        names = [name for i, name in enumerate(properties) if required >> i & 1]
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}

    return st.builds(build, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 7))


def _combine(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    lists = st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 2))
    either = st.lists(inner, min_size=1, max_size=2).map(lambda branches: {"anyOf": branches})
    return st.one_of(objects(inner), lists, either)
