"""Tokenizer: text <-> token ids for an official `tokenizer.json` or one trained here; the ground of the text room.

Control tokens are matched by this module and everything between them by a BPE that does not know them. That gives the
official ids for trusted text, and lets a prompt hold a user's words in which `<｜User｜>` is harmless characters.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hadal.text.tokens import BOS, CONTROL_TOKENS, EOS, FLAGGED_SPECIAL

# A text and how it is encoded: True if control tokens in it count, False if they are characters, or the ids it has.
Piece = tuple[str, bool | Sequence[int]]

# Splits of the V3 vocabulary, each isolated: digits by threes, runs of CJK and kana, then the alternation of
# punctuation + Latin letters, one leading mark + letters, punctuation with its line ends, line ends, spaces (spec 7.1).
_DIGITS = r"\p{N}{1,3}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_WORDS = "|".join(
    (
        _ASCII_PUNCTUATION + "[A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TokenizerError(ValueError):
    """A tokenizer file, a text or a token id that cannot be used; the message names it and the remedy."""


class Tokenizer:
    """Encodes and decodes with the V4 byte-level BPE; it never adds BOS or any other token by itself (spec 7.1)."""

    def __init__(self, source: str, *, origin: str = "tokenizer") -> None:
        """Builds from the JSON text of a `tokenizer.json`; `origin` names it in TokenizerError."""
        self._source = source
        try:
            spec: dict[str, Any] = json.loads(source)
            added = {token["content"]: int(token["id"]) for token in spec["added_tokens"]}
            vocabulary: dict[str, int] = spec["model"]["vocab"]
            kinds = spec["model"]["type"], spec["decoder"]["type"]
            trims = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in spec["added_tokens"])
            self._bytes = _byte_table(vocabulary, added)
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}, ensure_ascii=False))
        except Exception as error:  # the tokenizers library raises plain Exception for a bad file
            raise TokenizerError(f"{origin} is not a tokenizer.json ({error}); copy the official file again") from error
        if kinds != ("BPE", "ByteLevel") or trims:
            raise TokenizerError(f"{origin} is not a byte-level BPE as DeepSeek-V4 uses; give the file of a V4 model")
        for text in (BOS, EOS):
            if text not in added:
                raise TokenizerError(f"{origin} has no token {text}; give the tokenizer.json of a V4 model")
        self._added = added
        self._control = _compile_alternation(added)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` of a model directory; raises TokenizerError when it is missing or unusable."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} does not exist; copy tokenizer.json of the model into its directory")
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 text ({error.reason}); copy the official file again") from error
        return cls(source, origin=str(path))

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and the `tokenizer_config.json` other libraries read beside it."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._source, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1048576,
        }
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @property
    def source(self) -> str:
        """The JSON text of the `tokenizer.json` this was built from."""
        return self._source

    @property
    def vocab_size(self) -> int:
        """Number of ids, counting added tokens (129,280 for the official file)."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int:
        return self._added[BOS]

    @property
    def eos_id(self) -> int:
        return self._added[EOS]

    def token_id(self, token: str) -> int:
        """The id of a control token spelled as in `hadal.text.tokens`; raises TokenizerError when it is not one."""
        if token not in self._added:
            raise TokenizerError(f"this tokenizer has no control token {token!r}; take one of hadal.text.tokens")
        return self._added[token]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, maybe part of a UTF-8 character; raises TokenizerError outside the vocabulary."""
        if not 0 <= token_id < len(self._bytes):
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary of {len(self._bytes)}; "
                "the model and the tokenizer do not belong together"
            )
        return self._bytes[token_id]

    def encode(self, text: str, *, control: bool = True) -> list[int]:
        """Ids of `text`; with `control` False, a control token spelled in it is encoded as ordinary characters."""
        return self.encode_pieces([(text, control)])

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of the joined pieces, where only pieces marked True may contain control tokens.

        BPE runs across the borders of pieces, so without control tokens in the False pieces the ids are those of
        `encode(joined text)`, which is what the official encoder gives. Pieces that bring their ids are taken as these.
        """
        ids: list[int] = []
        plain: list[str] = []
        for text, control in pieces:
            if not isinstance(control, bool):
                ids += self._encode_plain("".join(plain))
                ids += control
                plain = []
                continue
            start = 0
            if control:
                for match in self._control.finditer(text):
                    plain.append(text[start : match.start()])
                    ids += self._encode_plain("".join(plain))
                    ids.append(self._added[match.group()])
                    plain, start = [], match.end()
            plain.append(text[start:])
        return ids + self._encode_plain("".join(plain))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(token_id) for token_id in ids).decode("utf-8", errors="replace")

    def _encode_plain(self, text: str) -> list[int]:
        try:  # as a batch, for that lets other threads run meanwhile, and without offsets it takes half the time
            return list(self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids) if text else []
        except TypeError:
            message = "the text holds half of a surrogate pair, which is no character; send whole ones"
            raise TokenizerError(message) from None


class IncrementalDecoder:
    """Turns ids into text as they come, holding back unfinished UTF-8; its pieces join to `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        """The text that became certain with these ids; may be empty."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(token_id) for token_id in ids))

    def finish(self) -> str:
        """What an unfinished character at the end decodes to; the decoder is fresh afterwards."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with V4's splits and control tokens (ids 0.. in the order of `tokens.CONTROL_TOKENS`).

    Raises TokenizerError when `texts` do not hold enough different words for `vocab_size` ids.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(CONTROL_TOKENS) + len(alphabet):
        least = len(CONTROL_TOKENS) + len(alphabet)
        raise TokenizerError(
            f"vocab_size {vocab_size} cannot hold all bytes and control tokens; ask for {least} or more"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    splits: list[Any] = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in (_DIGITS, _CJK, _WORDS)
    ]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(CONTROL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise TokenizerError(
            f"the training text gives only {bpe.get_vocab_size()} tokens, not {vocab_size}; "
            "give more text or ask for fewer tokens"
        )
    spec = json.loads(bpe.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in FLAGGED_SPECIAL
        token["normalized"] = not token["special"]
    return Tokenizer(json.dumps(spec, ensure_ascii=False), origin="the trained tokenizer")


def _compile_alternation(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches the leftmost and there the longest token; grouped by two characters so that plain `<` stays cheap."""
    groups: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        groups.setdefault(token[:2], []).append(re.escape(token[2:]))
    return re.compile("|".join(f"{re.escape(head)}(?:{'|'.join(tails)})" for head, tails in groups.items()))


def _byte_table(vocabulary: dict[str, int], added: dict[str, int]) -> list[bytes]:
    """Bytes of every id; ids that no token has are empty."""
    # Byte-level BPE writes printable Latin-1 bytes as themselves and the other bytes, in order, from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    table = [b""] * (max([*vocabulary.values(), *added.values()]) + 1)
    for token, token_id in vocabulary.items():
        if token not in added:
            table[token_id] = bytes(byte_of[character] for character in token)
    for token, token_id in added.items():
        table[token_id] = token.encode("utf-8")
    return table
