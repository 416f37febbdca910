"""Readers from the corpus files and the generators to documents: prose, or a chat in OpenAI's message form.

Sits below hadal.train.data, which renders, tokenises and packs them. A document's key decides whether it is held out;
everything derived from one record has one key, so a held-out story is not seen as a chat either.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hadal.train.stories import generate_story
from hadal.train.synthetic import generate_chats

Message = dict[str, Any]
_OTHER_SOURCES = ("stories", "stories-chat", "gsm8k", "persona", "tools", "made-stories", "made-chats")
_SPLIT = "3"  # names the split; with it two whole books of the starter corpus are held out at 3 %


class CorpusError(ValueError):
    """A corpus folder or file that cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class Document:
    """One text or one chat; `learn_prompt` says whether a chat's user turns are targets besides the assistant's."""

    source: str
    key: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    thinking: bool = False
    learn_prompt: bool = True


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether the document belongs to the held-out split: a fixed function of its key, the same for every run."""
    digest = hashlib.sha256(f"{_SPLIT}:{document.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def corpus_files(folder: str | Path) -> list[Path]:
    """The files of a corpus folder but its notes (`*.md`); CorpusError when there is none."""
    paths = sorted(Path(folder).glob("[!.]*"))
    files = [p for p in paths if p.suffix != ".md"]
    if not files:
        raise CorpusError(f"{folder} holds no corpus file; point --corpus at the repository's corpus folder")
    return files


def read_corpus(folder: str | Path) -> dict[str, list[Document]]:
    """All documents of a corpus folder by source; CorpusError when it has no known file or an unknown one.

    Besides the starter corpus' files any `NAME.jsonl` or `NAME.jsonl.xz` with a `text` field per line is read as prose.
    """
    out: dict[str, list[Document]] = {}
    for path in corpus_files(folder):
        reader = _reader_for(path)
        with _naming(path):
            for document in reader(path):
                out.setdefault(document.source, []).append(document)
    return out


def generate_documents(stories: int, chats: int, seed: int) -> dict[str, list[Document]]:
    """Generated stories and chats; sources `made-stories` and `made-chats`."""
    random = Random(seed)
    made = [generate_story(random) for _ in range(stories)]
    return {
        "made-stories": [Document("made-stories", s.text, f"{s.title}\n\n{s.text}") for s in made],
        "made-chats": [
            Document("made-chats", json.dumps(messages), "", tuple(messages), thinking, learn_prompt=False)
            for messages, thinking in itertools.islice(generate_chats(seed), chats)
        ],
    }


def read_attributions(folder: str | Path) -> list[str]:
    """One credit line per story record, for the model card; empty when the corpus has no story file."""
    out = []
    for path in Path(folder).glob("stories-simple.jsonl*"):
        with _naming(path):
            out += [f"{r['title']} ({r['source']}): {r['attribution']}" for r in _lines(path)]
    return out


def _reader_for(path: Path) -> Callable[[Path], Iterator[Document]]:
    name = path.name.removesuffix(".xz")
    if name in _READERS:
        return _READERS[name]
    if not name.endswith(".jsonl"):
        raise CorpusError(f"{path} is not a known corpus file; give prose as NAME.jsonl with a `text` field per line")
    if name.removesuffix(".jsonl") in _OTHER_SOURCES:
        raise CorpusError(f"{path} has the name of another source of documents; rename it")
    return _read_prose


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Records of another shape than the reader's become a CorpusError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError, csv.Error) as error:
        raise CorpusError(
            f"{path} has a record of another shape than this file's ({error!r}); fetch it again"
        ) from error


def _open(path: Path) -> str:
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            return file.read().decode("utf-8")
    except (lzma.LZMAError, EOFError, UnicodeDecodeError, OSError) as error:
        raise CorpusError(f"{path} is not a readable text file ({error}); fetch it again") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_open(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{path} line {number} is not JSON ({error}); fetch the file again") from None


def _read_prose(path: Path) -> Iterator[Document]:
    source = path.name.removesuffix(".xz").removesuffix(".jsonl")
    for record in _lines(path):
        if not isinstance(record.get("text"), str):
            raise CorpusError(f"{path} has a record without a `text` field; every line needs one")
        yield Document(source, record.get("title") or record["text"], record["text"])


def _read_stories(path: Path) -> Iterator[Document]:
    """Each story once as prose and once as the answer to a request for it."""
    asks = (
        'Tell me the story "{t}".',
        "Tell me a story called {t}.",
        "Please tell me a story: {t}.",
        "Write a story: {t}",
    )
    for index, record in enumerate(_lines(path)):
        title, text = record["title"], record["text"]
        yield Document("stories", title, f"{title}\n\n{text}")
        name = title.strip(".!? ")
        answer = _turn("assistant", text)
        if index % 2:
            answer["reasoning_content"] = f"The user wants the story {name}."
        chat = (_turn("user", asks[index // 2 % len(asks)].format(t=name)), answer)
        yield Document("stories-chat", title, "", chat, thinking=bool(index % 2), learn_prompt=False)


def _read_gsm8k(path: Path) -> Iterator[Document]:
    """Alternately with the working as reasoning and a short answer, and with the working as the answer."""
    for index, record in enumerate(_lines(path)):
        working, _, result = re.sub(r"<<.*?>>", "", record["answer"]).partition("\n#### ")
        user = _turn("user", record["question"])
        if index % 2:
            reply = _turn("assistant", f"The answer is {result}.") | {"reasoning_content": working}
        else:
            reply = _turn("assistant", f"{working}\nThe answer is {result}.")
        yield Document("gsm8k", record["question"], "", (user, reply), thinking=bool(index % 2))


def _read_persona(path: Path) -> Iterator[Document]:
    """Two people chatting; every third conversation opens with the second one's persona as the system message."""
    for index, record in enumerate(csv.DictReader(io.StringIO(_open(path), newline=""))):
        messages: list[Message] = []
        if index % 3 == 0:
            messages.append(_turn("system", "You are this person: " + record["user 2 personas"].replace("\n", " ")))
        for line in record["Best Generated Conversation"].split("\n"):
            speaker, colon, said = line.partition(": ")
            if not colon or speaker not in ("User 1", "User 2") or not said.strip():
                continue
            role = "user" if speaker == "User 1" else "assistant"
            if messages and messages[-1]["role"] == role:
                messages[-1] = _turn(role, f"{messages[-1]['content']} {said.strip()}")
            elif messages or role == "user":
                messages.append(_turn(role, said.strip()))
        yield from _chat("persona", record["Best Generated Conversation"], messages, index % 2 == 1)


def _read_tools(path: Path) -> Iterator[Document]:
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    for index, record in enumerate(json.loads(_open(path))):
        functions = json.loads(record["tools"])
        messages: list[Message] = []
        if functions:
            messages.append(_turn("system", "") | {"tools": [{"type": "function", "function": f} for f in functions]})
        calls = 0
        for turn in record["conversations"]:
            if turn["from"] == "function_call":
                calls += 1
                messages.append(_turn("assistant", "") | {"tool_calls": [_tool_call(turn["value"], f"call_{calls}")]})
            elif turn["from"] == "observation":
                messages.append(_turn("tool", turn["value"]) | {"tool_call_id": f"call_{calls}"})
            else:
                messages.append(_turn(roles[turn["from"]], turn["value"]))
        yield from _chat("tools", json.dumps(record["conversations"]), messages, index % 2 == 1)


def _tool_call(value: str, identifier: str) -> Message:
    call = json.loads(value)
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {"id": identifier, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chat(source: str, key: str, messages: Iterable[Message], thinking: bool) -> Iterator[Document]:
    """A chat up to its last assistant turn; nothing when it has none. In thinking mode its think spans are empty."""
    kept = list(messages)
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    if kept:
        yield Document(source, key, "", tuple(kept), thinking, learn_prompt=source != "tools")


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "stories-simple.jsonl": _read_stories,
    "gsm8k-train.jsonl": _read_gsm8k,
    "spc_valid.csv": _read_persona,
    "glaive_toolcall_en_demo.json": _read_tools,
    "books-children.jsonl": _read_prose,
    "tldr-pages-en.jsonl": _read_prose,
}
