"""Routing: conversations come back to where they were, everything else spreads, and nobody drowns."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hadal.server.routing import Routes, marks

tokens = st.lists(st.integers(0, 3), max_size=300)
loads = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 30), min_size=1)


@given(tokens, tokens, tokens, st.sampled_from(["", "t"]))
def test_marks_agree_exactly_as_far_as_prompts_do(
    shared: list[int], one: list[int], other: list[int], who: str
) -> None:
    a, b = shared + one, shared + other
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first, second = marks(a, who), marks(b, who)
    assert [m for m in first if m in second] == [m for m in first if m[0] <= common]
    assert not set(first) & set(marks(a, who + "x"))


def test_marks_are_few_and_lie_close() -> None:
    found = [length for length, _ in marks(range(1 << 20))]
    assert found[0] == 32 and len(found) < 100 and found[-1] > (1 << 20) * 8 / 9
    assert all(b - a <= max(32, b / 8) for a, b in itertools.pairwise(found))


@given(loads, st.lists(st.tuples(tokens, st.sampled_from("abcd")), max_size=5), tokens)
def test_a_rank_names_every_engine_once_and_none_that_is_much_busier_first(
    under_way: dict[str, int], past: list[tuple[list[int], str]], prompt: list[int]
) -> None:
    routes = Routes(slack=4)
    for ids, name in past:
        routes.note(marks(ids), name)
    ranked = routes.rank(marks(prompt), len(prompt), under_way)
    assert sorted(ranked) == sorted(under_way)
    assert under_way[ranked[0]] <= min(under_way.values()) + 4


@given(st.lists(st.integers(0, 9), min_size=64, max_size=200), st.lists(st.integers(0, 9), max_size=20), loads)
def test_the_next_turn_comes_back_until_others_are_much_idler(
    prompt: list[int], more: list[int], under_way: dict[str, int]
) -> None:
    routes, (home, *_) = Routes(slack=3), sorted(under_way)
    routes.note(marks(prompt), home)
    turn = prompt + more
    seen = max(length for length, _ in marks(prompt))
    chosen = routes.rank(marks(turn), len(turn), under_way)[0]
    idle = min(under_way.values())
    if 2 * seen >= len(turn) and under_way[home] <= idle + 3:
        assert chosen == home
    else:
        assert under_way[chosen] == idle or chosen == home


@given(st.integers(1, 8), st.integers(1, 40))
def test_unrelated_prompts_take_turns(engines: int, rounds: int) -> None:
    routes, idle = Routes(), {str(i): 0 for i in range(engines)}
    got = dict.fromkeys(idle, 0)
    for i in range(engines * rounds):
        prompt = [i] * 100
        chosen = routes.rank(marks(prompt), len(prompt), idle)[0]
        routes.note(marks(prompt), chosen)
        got[chosen] += 1
    assert set(got.values()) == {rounds}


def test_a_short_common_beginning_binds_nobody() -> None:
    routes, idle = Routes(), {"a": 0, "b": 0}
    system, chosen = [7] * 64, []
    for i in range(4):
        prompt = system + [i + 10] * 100
        chosen.append(routes.rank(marks(prompt), len(prompt), idle)[0])
        routes.note(marks(prompt), chosen[-1])
    assert sorted(chosen) == ["a", "a", "b", "b"]


def test_of_two_who_know_it_the_one_who_knows_more_is_asked_and_who_is_gone_is_forgotten() -> None:
    routes, idle = Routes(), {"a": 0, "b": 2}
    long = list(range(200))
    routes.note(marks(long[:128]), "a")
    routes.note(marks(long), "b")
    assert routes.rank(marks(long), 200, idle) == ["b", "a"]
    assert routes.rank(marks(long), 200, {"a": 0}) == ["a"]
    routes.forget({"b"})
    assert routes.rank(marks(long), 200, idle) == ["a", "b"]


@given(st.lists(tokens, max_size=30))
def test_no_more_marks_are_kept_than_may_be(prompts: list[list[int]]) -> None:
    routes = Routes(most=10)
    for prompt in prompts:
        routes.note(marks(prompt), "a")
    assert len(routes._seen) <= 10
    if prompts and 32 <= len(prompts[-1]) < 200:
        assert routes._known(marks(prompts[-1]), {"a": 0, "b": 0})
