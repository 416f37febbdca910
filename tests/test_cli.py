from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hadal.cli import app
from tests.fakes import scripted_llm, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


def run(*args: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, args, input=input)


def run_json(*args: str) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_help_answers_at_once() -> None:
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        made = subprocess.run([sys.executable, "-m", "hadal.cli", "--help"], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert "serve" in made.stdout and best < 0.5


def test_hadal_offers_its_names_and_no_others() -> None:
    import hadal

    assert hadal.SamplingParams.__name__ == "SamplingParams" and hadal.quant.__name__ == "hadal.quant"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hadal.nonsense  # noqa: B018


def test_verbs_are_exactly_those_that_work() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    assert names == {"serve", "chat", "generate", "inspect", "convert", "verify", "bench", "train", "doctor", "usage"}
    assert [group.name for group in app.registered_groups] == ["keys"]


def test_bench_measures_what_it_is_asked_for(model: str) -> None:
    made = run_json("bench", model, "--phase", "decode", "--phase", "prefill", "--tokens", "16", "--threads", "1")
    assert [(f["phase"], f["tokens"]) for f in made["figures"]] == [("decode", 16), ("prefill", 16)]
    assert all(f["fraction"] > 0 for f in made["figures"])


def test_generate_prints_text_or_json(model: str) -> None:
    options = ("the cat", "--model", model, "--max-tokens", "5", "--temperature", "0")
    made = run_json("generate", *options)
    assert len(made["token_ids"]) <= 5 and made["finish_reason"] in ("length", "stop")
    plain = run("generate", *options)
    assert plain.exit_code == 0 and plain.stdout == made["text"] + "\n"


def test_a_parameter_out_of_range_is_named(model: str) -> None:
    made = run("generate", "x", "--model", model, "--temperature", "-1")
    assert made.exit_code == 2 and made.stderr.startswith("error: `temperature` is -1.0")


def test_chat_keeps_the_conversation_and_tells_the_speed(model: str) -> None:
    made = run("chat", model, "--max-tokens", "4", "--temperature", "0", input="hello\n\nagain\n/exit\n")
    assert made.exit_code == 0, made.output
    assert made.stdout.count("tokens/s") == 2


def test_a_model_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import hadal.cli

    llm = scripted_llm({"hello": "fine</think>a\x1b[31mb\x07c"})
    monkeypatch.setattr(hadal.cli.talk, "load_llm", lambda *args, **options: llm)
    made = run("chat", "--temperature", "0", input="hello\n")
    assert made.exit_code == 0 and "fine\n\na[31mbc\n" in made.stdout
    assert "\x1b" not in made.stdout and "\x07" not in made.stdout


def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import hadal.cli

    llm = scripted_llm({"hello": "a\x1b[31mb"})
    monkeypatch.setattr(hadal.cli.talk, "load_llm", lambda *args, **options: llm)
    for terminal, shown in ((True, "a[31mb\n"), (False, "a\x1b[31mb\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        hadal.cli.talk.generate("hello", temperature=0.0)
        assert capsys.readouterr().out == shown


@pytest.mark.parametrize("bad", ["broken", "long " * 9000, "\udcff"])
def test_a_turn_that_cannot_be_answered_is_dropped_and_chat_goes_on(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    import hadal.cli
    import hadal.terminal

    llm = scripted_llm({"broken": None, "hello": "fine</think>yes"})
    lines = iter([bad, "hello"])
    monkeypatch.setattr(hadal.cli.talk, "load_llm", lambda *args, **options: llm)
    monkeypatch.setattr(hadal.terminal, "ask", lambda console: next(lines, None))
    made = run("chat", "--temperature", "0")
    assert made.exit_code == 0, made.output
    assert made.stdout.count("error: ") == 1 and "fine\n\nyes\n" in made.stdout


def test_a_line_that_is_no_text_is_asked_for_again(model: str) -> None:
    command = [sys.executable, "-m", "hadal.cli", "chat", model, "--max-tokens", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    made = subprocess.run(command, input=b"\xff\n", capture_output=True, env=environment)
    assert made.returncode == 0 and b"not utf-8 text; type it again" in made.stdout


def test_a_destination_that_cannot_be_written_is_named(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = run("convert", model, str(tmp_path / "file" / "out"))
    assert made.exit_code == 2 and made.stderr.startswith("error: ") and str(tmp_path / "file") in made.stderr
    assert made.stderr.count("\n") == 1


def test_a_missing_embedded_model_is_told_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hadal.llm import llm

    monkeypatch.setattr(llm, "locate_model", lambda name: tmp_path / "nano")
    made = run("generate", "x")
    assert made.exit_code == 2
    assert made.stderr == "error: this installation has no embedded model; give a model directory\n"


def test_chat_ends_with_its_input(model: str) -> None:
    assert run("chat", model, input="").exit_code == 0


def test_inspect_describes_a_directory(model: str) -> None:
    facts = run_json("inspect", model)
    assert facts["layers"] == {"swa": 2, "csa": 1, "hca": 1} and facts["draft"] == "mtp"
    shown = run("inspect", model)
    assert shown.exit_code == 0 and "2 swa, 1 csa, 1 hca" in shown.stdout


def test_convert_writes_a_model_that_generates(model: str, tmp_path: Path) -> None:
    made = run_json("convert", model, str(tmp_path / "out"), "--quantize", "fp8")
    assert made["dst"] == str(tmp_path / "out")
    assert run_json("inspect", made["dst"])["expert_format"] == "fp8"
    assert run_json("generate", "the cat", "--model", made["dst"], "--max-tokens", "2")["finish_reason"]


@pytest.mark.parametrize("ok", [True, False])
def test_verify_shows_the_report_and_its_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ok: bool) -> None:
    seen: list[Any] = []

    def run_recorded(golden: Path | None, write: Path | None, progress: Any) -> Any:
        progress("a stage")
        seen.append((golden, write))
        rows = [["round trip", "0", "0", "ok" if ok else "FAILED"]]
        return SimpleNamespace(ok=ok, rows=lambda: rows, to_dict=lambda: {"ok": ok})

    monkeypatch.setitem(sys.modules, "hadal.verify", SimpleNamespace(run=run_recorded))
    shown = run("verify", "--golden", str(tmp_path))
    assert shown.exit_code == (0 if ok else 1) and "round trip" in shown.stdout
    assert json.loads(run("verify", "--json").stdout) == {"ok": ok}
    assert seen == [(tmp_path, None), (None, None)]


def test_train_runs_the_pretraining_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from hadal.train import pretrain
    from hadal.train.loop import Report

    seen: list[Any] = []

    def run_recorded(config: Any, say: Any) -> Report:
        say("a line of progress")
        seen.append(config)
        return Report(7, 1000, 1.0, {"stories": 2.5}, {"stories": 0.1})

    monkeypatch.setattr(pretrain, "run", run_recorded)
    made = run_json("train", "there", "--steps", "7", "--scale", "2", "--resume")
    assert made["steps"] == 7 and made["held_out"] == {"stories": 2.5}
    assert (seen[0].out, seen[0].loop.steps, seen[0].loop.minutes, seen[0].scale) == (Path("there"), 7, None, 2)
    shown = run("train", "there")
    assert "2.500" in shown.stdout and "a line of progress" in shown.stderr and seen[1].loop.minutes == 55


def test_doctor_names_versions_and_memory() -> None:
    facts = run_json("doctor")
    assert "cpu" in facts["devices"] and facts["free_memory_cpu"] > 0
    assert "torch" in run("doctor").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "x", "--model", "/no/such/place"), "/no/such/place"),
        (("generate", "x", "--device", "abacus"), "unknown device 'abacus'"),
        (("chat", "--mode", "exact"), "unknown mode 'exact'"),
        (("chat", "{model}", "--effort", "furious"), "this model knows high, max"),
        (("inspect", "/no/such/place"), "/no/such/place"),
        (("convert", "/no/such/place", "never"), "/no/such/place"),
        (("train", "never", "--corpus", "/no/such/place"), "/no/such/place"),
        (("train", "never", "--steps", "1", "--minutes", "1"), "either"),
    ],
)
def test_errors_are_one_sentence_with_exit_code_2(model: str, args: tuple[str, ...], words: str) -> None:
    made = run(*(arg.format(model=model) for arg in args))
    assert made.exit_code == 2
    assert made.stderr.startswith("error: ") and words in made.stderr and made.stderr.count("\n") == 1
    assert made.stdout == ""


def test_serve_says_where_it_listens_and_refuses_a_taken_port(model: str, tmp_path: Path) -> None:
    code = "from hadal.cli import app; app()"
    command = [sys.executable, "-c", code, "serve", model, "--port", "0", "--data", str(tmp_path / "a")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line.startswith("Hadal serves tiny at http://127.0.0.1:") and line.endswith("/v1\n")
        port = line.rsplit(":", 1)[1].removesuffix("/v1\n")
        made = run("serve", model, "--port", port, "--data", str(tmp_path / "b"))
        assert made.exit_code == 2 and f"cannot listen on 127.0.0.1:{port}" in made.stderr
    finally:
        server.terminate()
        assert server.wait(timeout=30) in (0, -15)
