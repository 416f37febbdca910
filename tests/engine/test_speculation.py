"""How many tokens a request guesses ahead, from how its guesses have fared and what they cost."""

from __future__ import annotations

from itertools import pairwise

from hadal.engine.speculation import DraftDepth


def test_guesses_that_stand_are_followed_by_more_and_those_that_fail_by_fewer() -> None:
    good, bad = DraftDepth(), DraftDepth()
    for _ in range(60):
        good.observe(3, 3)
        bad.observe(3, 0)
    assert good.acceptance > 0.95 and bad.acceptance < 0.05
    assert good.next(8, 1, 0.1) == 8
    assert good.next(2, 1, 0.1) == 2
    assert bad.next(8, 1, 0.1) == 0


def test_what_costs_more_is_guessed_less() -> None:
    depth = DraftDepth(acceptance=0.7)
    depths = [depth.next(8, 1, cost) for cost in (0.01, 0.1, 0.3, 0.5, 0.9)]
    assert depths == sorted(depths, reverse=True) and depths[0] > depths[2] > depths[-1] == 0
    assert depth.next(8, 12, 0.1) < depth.next(8, 1, 0.1)  # a full step leaves less room for guesses


def test_who_has_given_up_tries_again_less_and_less_often() -> None:
    depth = DraftDepth(acceptance=0.0)
    tried, followed = [], []
    for token in range(1200):
        if depth.next(4, 1, 0.1):
            tried.append(token)
            depth.observe(1, 0)
        followed.append(depth.follows)
    gaps = [b - a for a, b in pairwise(tried)]
    assert gaps == sorted(gaps) and 3 <= len(tried) <= 8 and gaps[-1] >= 250
    assert sum(followed) < 200 and all(followed[token - 1] for token in tried)
    assert DraftDepth(acceptance=1.0).next(0, 1, 0.1) == 0


def test_every_guess_up_to_the_first_that_fails_counts() -> None:
    one, three = DraftDepth(acceptance=0.5), DraftDepth(acceptance=0.5)
    one.observe(4, 0)
    three.observe(4, 2)
    assert one.acceptance < 0.5 < three.acceptance
