"""The pre-training stage: a corpus folder in, a quantised model in the official layout out; recipes call `run`.

Top of the training room. The run's working files lie beside the output folder in `NAME.run`: tokenizer, token cache,
`state.pt` and `metrics.jsonl`, enough to resume.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from hadal import device as devices
from hadal.checkpoint import load_model, save_model
from hadal.config import ModelConfig, preset
from hadal.model import Model, Numerics
from hadal.text import Tokenizer, encode_messages, own_prompt_texts, train_tokenizer
from hadal.train.card import write_card
from hadal.train.corpus import Document, corpus_files, generate_documents, is_held_out, read_attributions, read_corpus
from hadal.train.data import Batch, Mix, Sampler, Store, assemble, build_store
from hadal.train.loop import LoopConfig, Report, TrainingError, check_start, evaluate, train
from hadal.train.memory import keep_freed_memory
from hadal.train.optim import OptimConfig, Optimizer

_TOKENIZER_BYTES = 3_000_000  # per source: a small vocabulary settles long before, and no source drowns the others
DEFAULT_MIXES = (
    Mix(0.0, {"books-children": 0.42, "stories": 0.2, "made-stories": 0.16, "persona": 0.12, "tldr-pages-en": 0.05,
              "gsm8k": 0.05}),
    Mix(0.55, {"made-chats": 0.4, "persona": 0.16, "stories-chat": 0.12, "gsm8k": 0.1, "books-children": 0.1,
               "tools": 0.05, "stories": 0.05, "made-stories": 0.02}),
)  # fmt: skip


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run. `scale` 1 is nano; larger values widen and deepen it. Fractions and lengths in tokens."""

    corpus: Path
    out: Path
    loop: LoopConfig = field(default_factory=LoopConfig)
    scale: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)
    device: str = "auto"
    seed: int = 0
    context: int = 1024
    held_out: float = 0.03
    held_out_packs: int = 4
    fim_rate: float = 0.1
    made_stories: int = 12_000
    made_chats: int = 40_000
    mixes: tuple[Mix, ...] = DEFAULT_MIXES
    resume: bool = False


def scaled_config(scale: int) -> ModelConfig:
    """Nano for 1; for N: N times the width, heads, ranks and experts' width, one CSA/HCA pair more for each step.

    Every quantised matrix keeps sides that FP4 groups divide, and `index_topk` stays below the entries of a context.
    """
    if scale < 1:
        raise TrainingError(f"scale is {scale}; give 1 for nano or a larger integer")
    c = preset("nano")
    if scale == 1:
        return c
    pairs = scale
    return c.replace(
        vocab_size=min(c.vocab_size * scale, 16384),
        hidden_size=c.hidden_size * scale,
        num_hidden_layers=2 + 2 * pairs,
        compress_ratios=(0, 0, *(4, 16) * pairs, 0),
        num_attention_heads=c.num_attention_heads * scale,
        q_lora_rank=c.q_lora_rank * scale,
        o_lora_rank=c.o_lora_rank * scale,
        index_n_heads=c.index_n_heads * scale,
        moe_intermediate_size=c.moe_intermediate_size * scale,
        n_routed_experts=min(c.n_routed_experts + 2 * (scale - 1), 32),
    )


def run(config: PretrainConfig, say: Callable[[str], None] = print) -> Report:
    """Tokenizer, data, training, export and model card; returns what the loop reports.

    Raises CorpusError for a bad corpus and TrainingError for a run that cannot start, resume or go on.
    """
    began = time.monotonic()
    work = config.out.with_name(config.out.name + ".run")
    further = _settings(config)
    check_start(work, config.loop, config.resume, further)
    device = devices.resolve(config.device)
    keep_freed_memory()
    loop = _with_workers(config.loop, device)
    model_config = scaled_config(config.scale)
    credits = read_attributions(config.corpus)
    documents = read_corpus(config.corpus) | generate_documents(config.made_stories, config.made_chats, config.seed)
    if config.resume:
        tokenizer = Tokenizer.from_directory(work)
    else:
        say(f"training a tokenizer of {model_config.vocab_size} tokens")
        tokenizer = train_tokenizer(_sample(documents), model_config.vocab_size)
        tokenizer.save(work)
    training, held_out = _stores(work, documents, tokenizer, config, say)
    sampler = Sampler(training, _mixes(config.mixes, training), config.context, config.seed)
    batches = _held_out_batches(held_out, config)
    model = Model(model_config, Numerics())
    model.init_weights(torch.Generator().manual_seed(config.seed))
    model.to(device)
    optimizer = Optimizer(model.named_parameters(), config.optim, {"wo_a": model_config.o_groups})
    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{size:.1f}M parameters, prepared in {time.monotonic() - began:.0f} s")
    report = train(model, optimizer, sampler, batches, loop, work, resume=config.resume, further=further, say=say)
    export(model, tokenizer, config.out)
    modes = _measure(config.out, batches, config.device)
    modes = {"as trained (float32 weights)": report.held_out} | modes
    write_card(config.out, model_config, report, modes, _command(), credits)
    for mode, losses in modes.items():
        say(f"{mode}: " + " ".join(f"{k} {v:.3f}" for k, v in losses.items()))
    return report


def export(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    """Write the official layout: FP4 experts, FP8 dense matrices, tokenizer and generation defaults."""
    save_model(model, out, quantize="fp4")
    tokenizer.save(out)
    defaults = {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "do_sample": True, "temperature": 0.7,
        "top_p": 0.95,
    }  # fmt: skip
    (out / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n", "utf-8")


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """What decides the result besides the loop's own settings: with another value it would be another run."""
    free = ("corpus", "out", "loop", "device", "resume", "held_out_packs")
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in free}
    return settings | {"corpus": [(p.name, p.stat().st_size) for p in corpus_files(config.corpus)]}


def _with_workers(loop: LoopConfig, device: torch.device) -> LoopConfig:
    """Unless told, a CPU computes a step's micro-batches side by side: worth more than threads in operators."""
    workers = loop.workers or (min(loop.micro_batches, os.cpu_count() or 1) if device.type == "cpu" else 1)
    if workers > 1 and device.type == "cpu":
        torch.set_num_threads(1)
    return replace(loop, workers=workers)


def _mixes(mixes: tuple[Mix, ...], stores: dict[str, Store]) -> list[Mix]:
    """The mixes over sources that hold something; sources in no mix join every one in proportion to their tokens."""
    tokens = {name: store.offsets[-1] for name, store in stores.items() if len(store)}
    own = tokens.keys() - {name for mix in mixes for name in mix.weights}
    mixed_tokens = sum(n for name, n in tokens.items() if name not in own)
    out = []
    for mix in mixes:
        weights = {name: weight for name, weight in mix.weights.items() if name in tokens}
        per_token = sum(weights.values()) / mixed_tokens if weights else 1.0
        weights |= {name: per_token * tokens[name] for name in sorted(own)}
        if not weights:
            raise TrainingError(f"the mix from {mix.start:.0%} of the run on has nothing to train on; add documents")
        out.append(Mix(mix.start, weights))
    return out


def _command() -> str:
    """The command line of this process as it starts the run anew from the repository's root."""
    script = Path(sys.argv[0])
    start = ["python", "/".join(script.resolve().parts[-2:])] if script.suffix == ".py" else [script.name]
    return shlex.join([*start, *(a for a in sys.argv[1:] if a != "--resume")])


def _sample(documents: dict[str, list[Document]]) -> Iterable[str]:
    for listed in documents.values():
        taken = 0
        for document in listed:
            for text in [document.text, *(str(m["content"]) for m in document.messages)]:
                taken += len(text)
                yield text
            if taken > _TOKENIZER_BYTES:
                break


def render_ids(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Ids of a chat document as the chat codec writes it."""
    prompt = encode_messages(list(document.messages), own_prompt_texts(), thinking=document.thinking)
    return tokenizer.encode_pieces(prompt.pieces)


def _stores(
    work: Path, documents: dict[str, list[Document]], tokenizer: Tokenizer, config: PretrainConfig,
    say: Callable[[str], None],
) -> tuple[dict[str, Store], dict[str, Store]]:  # fmt: skip
    training: dict[str, Store] = {}
    held_out: dict[str, Store] = {}
    for source, listed in documents.items():
        for split, stores in ((False, training), (True, held_out)):
            chosen = [d for d in listed if is_held_out(d, config.held_out) == split]
            stores[source] = build_store(
                work / "tokens" / f"{source}-{'held-out' if split else 'train'}",
                chosen,
                tokenizer,
                lambda d: render_ids(d, tokenizer),
                context=config.context,
                fim_rate=0.0 if split else config.fim_rate,
                seed=config.seed,
            )
        say(f"{source}: {training[source].offsets[-1]} tokens, {held_out[source].offsets[-1]} held out")
    return training, held_out


def _held_out_batches(stores: dict[str, Store], config: PretrainConfig) -> dict[str, list[Batch]]:
    """For each source up to `held_out_packs` batches of about a context each, the same for every run."""
    out: dict[str, list[Batch]] = {}
    for source, store in stores.items():
        start, batches = 0, []
        for end in range(1, len(store) + 1):
            if end == len(store) or store.offsets[end + 1] - store.offsets[start] > config.context:
                batches.append(assemble([(store, range(start, end))]))
                start = end
        if batches:
            step = max(len(batches) // config.held_out_packs, 1)
            out[source] = batches[::step][: config.held_out_packs]
    return out


def _measure(out: Path, batches: dict[str, list[Batch]], device: str) -> dict[str, dict[str, float]]:
    """Held-out losses of the exported files, without and with the official quantisers of activations."""
    modes = {"exported, exact (float32)": False, "exported, official quantisers (float32)": True}
    return {
        name: evaluate(
            load_model(out, device=device, dtype="float32", fake_quant=quant, weights="dense"), batches, dense=False
        )
        for name, quant in modes.items()
    }
