"""Stand-ins for a model: a script that writes given texts after given prompts, and a real but tiny random V4."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hadal.checkpoint import save_model
from hadal.config import preset
from hadal.engine import Engine
from hadal.llm import LLM
from hadal.model import Model, Numerics
from hadal.text import PromptTexts, Tokenizer, own_prompt_texts, train_tokenizer
from tests.engine.fake_model import PagedModel

torch.set_num_threads(1)  # with matrices this small, threads only wait for each other


@cache
def small_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with hardly any merges, so that texts have many tokens and characters span several."""
    return train_tokenizer(["the cat sat on the mat and the dog ran away then " * 20], 300)


class ScriptedModel(PagedModel):
    """Continues a sequence whose text contains a key of `script` with its value and end-of-sequence, near certainly.

    Of several keys the one that comes last in the text counts. A value of None gives NaN logits, "<crash>" in the text
    raises, "<dice>" makes all tokens alike, and a text without any key is continued with "a" for ever.
    """

    def __init__(self, script: dict[str, str | None], context: int) -> None:
        self.tokenizer = small_tokenizer()
        super().__init__(self.tokenizer.vocab_size, context)
        self.script = script
        self.steps = 0

    def advance(self, *args: Any) -> Tensor:
        self.steps += 1
        return super().advance(*args)

    def row(self, ids: list[int]) -> Tensor:
        text = self.tokenizer.decode(ids)
        if "<crash>" in text:
            raise RuntimeError("the script crashes here")
        keys = [key for key in self.script if key in text]
        answer = self.script[max(keys, key=text.rfind)] if keys else "a"
        row = torch.zeros(self.config.vocab_size)
        if "<dice>" in text:
            return row
        if answer is None:
            return row + float("nan")
        planned = self.tokenizer.encode(answer) + [self.tokenizer.eos_id] * bool(keys)
        # What has been written is the longest start of the answer that the sequence ends with.
        written = next((n for n in range(len(planned) - 1, 0, -1) if ids[-n:] == planned[:n]), 0)
        row[planned[written]] = 20.0
        return row


def scripted_llm(
    script: dict[str, str | None],
    *,
    context: int = 4096,
    model: type[ScriptedModel] = ScriptedModel,
    texts: PromptTexts | None = None,
    **options: Any,
) -> LLM:
    engine = Engine(model(script, context), **options)
    return LLM.from_parts(engine, small_tokenizer(), texts or own_prompt_texts(), name="scripted")


def write_tiny_model(directory: Path) -> str:
    """A random model with every V4 part and the small tokenizer, in the official layout; returns the directory."""
    tokenizer = small_tokenizer()
    config = preset("nano").replace(
        vocab_size=tokenizer.vocab_size + 4, hidden_size=64, head_dim=32, qk_rope_head_dim=16, q_lora_rank=32,
        o_lora_rank=16, index_head_dim=32, index_topk=4, moe_intermediate_size=32, sliding_window=8,
        max_position_embeddings=512,
    )  # fmt: skip
    model = Model(config, Numerics())
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, directory, quantize="fp4")
    tokenizer.save(directory)
    return str(directory)
