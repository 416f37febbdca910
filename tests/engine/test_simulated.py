from __future__ import annotations

import shutil
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.simulate import Life


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_to_requests_each_says_what_its_own_ids_give(seed: int, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "prefixes", ignore_errors=True)
    life = Life(seed, tmp_path / "prefixes")
    try:
        life.run()
    finally:
        life.engine.close()
    life.verify()


def test_the_lives_are_eventful(tmp_path: Path) -> None:
    preemptions = hits = accepted = 0
    for seed in range(12):
        life = Life(seed, tmp_path / str(seed))
        life.run()
        preemptions += life.preemptions
        hits += sum((r.cached_tokens or 0) > 0 for r in life.requests)
        accepted += life.engine.stats.accepted
    assert preemptions > 2 and hits > 2 and accepted > 50
