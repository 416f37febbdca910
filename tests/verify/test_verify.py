"""Verification on the embedded vectors in every clone, and on the full set where it is present."""

import math
from pathlib import Path

import pytest
import torch

from hadal.checkpoint import load_model
from hadal.verify import VerifyError, embedded_golden, run
from hadal.verify.chat import check_chat
from hadal.verify.formulas import check_formulas
from hadal.verify.golden import MODES, case_names, judge, load_golden, replay
from hadal.verify.modules import check_modules
from hadal.verify.mutations import check_mutations
from hadal.verify.peers import check_transformers
from hadal.verify.report import Check, Report, within, worst
from hadal.verify.states import check_states

EMBEDDED = embedded_golden() / "flash_a"
CONFIGURATIONS = ("bf16_a", "dspark_a", "flash_a", "pro_a")


def assert_passed(checks: list[Check]) -> None:
    assert checks
    failed = [c for c in checks if c.passed is False]
    assert not failed, failed
    assert any(c.passed for c in checks)


def test_formulas_and_published_counts() -> None:
    assert_passed(check_formulas())


@pytest.mark.parametrize("mode", MODES)
def test_embedded_golden_vectors(mode: str) -> None:
    out = replay(load_golden(EMBEDDED, mode), EMBEDDED, case_names(EMBEDDED))
    assert_passed(judge(EMBEDDED, mode, out, case_names(EMBEDDED)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_full_golden_vectors(shared_dir: Path, name: str, mode: str) -> None:
    directory = shared_dir / "golden" / name
    cases = [case for case in case_names(directory) if case != "d"]
    assert_passed(judge(directory, mode, replay(load_golden(directory, mode), directory, cases), cases))


def test_single_modules_round_where_the_official_code_rounds() -> None:
    assert_passed(check_modules(load_golden(EMBEDDED, "ref"), EMBEDDED))


def test_a_module_without_quantisers_is_noticed() -> None:
    """The limits are tight enough: computed without the quantisers, attention and MoE must both fail."""
    model = load_model(EMBEDDED / "checkpoint", device="cpu", dtype="bfloat16", fake_quant=False)
    failed = {c.name for c in check_modules(model, EMBEDDED) if c.passed is False}
    assert failed >= {"layers.0 MoE", "layers.3 MoE", "layers.0 attention"}


def test_states_copies_and_files() -> None:
    assert_passed(check_states(EMBEDDED))


def test_every_mutation_is_caught() -> None:
    checks = check_mutations(EMBEDDED)
    assert len(checks) >= 21
    assert_passed(checks)


def test_transformers_agrees_where_it_is_right_and_fails_where_it_pads() -> None:
    pytest.importorskip("transformers")
    checks = check_transformers()
    assert_passed(checks)
    print(*checks, sep="\n")
    padded = next(c for c in checks if "padding" in c.detail)
    assert float(padded.detail.split()[-1]) > 0.1


def test_official_chat_vectors(shared_dir: Path) -> None:
    assert_passed(check_chat(shared_dir / "data" / "v4-format" / "tests"))


def test_a_wrong_output_fails_the_judge() -> None:
    out = replay(load_golden(EMBEDDED, "f32"), EMBEDDED, ["t"])
    out["t.logits_decode"] = out["t.logits_decode"] + 0.01 * torch.randn(
        out["t.logits_decode"].shape, generator=torch.Generator().manual_seed(0)
    )
    verdicts = {c.name: c.passed for c in judge(EMBEDDED, "f32", out, ["t"])}
    assert verdicts["t.logits_decode"] is False
    assert verdicts["t.logits_prefill"] is True


def test_a_nan_is_never_the_smaller_error() -> None:
    assert math.isnan(worst([0.0, float("nan"), 1.0]))
    assert worst([0.5, 2.0]) == 2.0
    assert within("g", "n", float("nan"), 1.0).passed is False


def test_a_report_without_verdicts_has_not_passed() -> None:
    assert not Report(()).ok
    assert not Report((Check("g", "n", None, None, None),)).ok
    assert Report((Check("g", "n", 0.0, 1.0, True),)).rows() == [["g: n", "0", "1", "ok"]]


def test_a_folder_without_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="golden configuration"):
        run(tmp_path)
