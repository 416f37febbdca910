from __future__ import annotations

from typing import Any

import pytest

from hadal.engine import Engine, RequestError, SamplingParams, StructuredOutput
from tests.engine.fake_model import FakeModel


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", True), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("temperature", -0.1),
        ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
        ("seed", 2**64), ("seed", "x"),
        ("stop", 5), ("stop", [""]), ("stop_token_ids", 5), ("stop", ["a"] * 17), ("stop_token_ids", [-1]),
        ("logprobs", 21), ("logprobs", True), ("ignore_eos", 1),
        ("prompt_logprobs", 21), ("prompt_logprobs", -1), ("structured", {"json_object": True}),
    ],
)  # fmt: skip
def test_out_of_range_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"`{field}` is") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_stop_ids_are_few() -> None:
    assert len(SamplingParams(stop_token_ids=[1] * 128).stop_token_ids or ()) == 128
    with pytest.raises(RequestError, match="at most 128 token ids"):
        SamplingParams(stop_token_ids=[1] * 129)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.0)  # type: ignore[call-arg]


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


@pytest.mark.parametrize(
    "fields",
    [{}, {"regex": "a", "json_object": True}, {"regex": ""}, {"choice": []}, {"choice": ["a", 3]}, {"grammar": 3},
     {"json_schema": [1]}, {"json_schema": {"a": float("nan")}}, {"json_object": 1}, {"regex": "a" * 70_000},
     {"json_schema": {"a": "x" * 270_000}}, {"regex": "\ud800"}],
    ids=lambda f: str(f)[:40],
)  # fmt: skip
def test_what_is_no_form_is_refused(fields: Any) -> None:
    with pytest.raises(RequestError):
        StructuredOutput(**fields)


def test_more_log_probabilities_of_a_prompt_than_memory_is_meant_for_are_refused() -> None:
    engine = Engine(FakeModel(context=60_000))
    with pytest.raises(RequestError, match="ask for fewer or shorten"):
        engine.prepare([5] * 50_000, SamplingParams(prompt_logprobs=20))
    engine.prepare([5] * 50_000, SamplingParams(prompt_logprobs=19))
