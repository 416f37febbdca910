from __future__ import annotations

import pytest

from hadal.engine import RequestError, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", True), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("temperature", -0.1),
        ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
        ("seed", 2**64), ("seed", "x"),
        ("stop", 5), ("stop", [""]), ("stop_token_ids", 5), ("stop", ["a"] * 17), ("stop_token_ids", [-1]),
        ("logprobs", 21), ("logprobs", True), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_out_of_range_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"`{field}` is") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.0)  # type: ignore[call-arg]


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
