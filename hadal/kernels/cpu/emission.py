"""All kernels that a model needs, emitted and compiled; what was compiled once is found again without being emitted.

Emitting takes longer than loading: a compiled object is kept under the text of this folder's sources and the shapes.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from hadal.kernels.cpu import attention, compress, draft, indexer, int8, matmul, route, rows
from hadal.kernels.cpu.layout import STEP, Shapes
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.target import Isa, Library, cache_folder, keep, kept
from hadal.kernels.cpu.weights import Plan


def compiled_kernels(isa: Isa, shapes: Shapes, plan: Plan) -> tuple[dict[str, list[str]], Library]:
    """The words of each kernel's jobs, and the compiled kernels."""
    needed = sorted({(m.form, epilogue_of(m.name)) for m in plan.matrices.values()})
    parts = sorted({part for part in (".compressor", ".indexer.", ".h_proj") for name in plan.matrices if part in name})
    key = hashlib.sha256(f"{source_digest()}{isa}{shapes}{needed}{parts}".encode()).hexdigest()[:32]
    place = cache_folder() / "kernels" / f"{key}.json"
    words = kept(place)
    if words is not None and Library.kept(key):
        return json.loads(words), Library(None, isa, key)
    module = emit_kernels(isa, shapes, plan)
    keep(place, json.dumps(module.arguments).encode())
    return module.arguments, Library(module.text(), isa, key)


@cache
def source_digest() -> str:
    """Changes whenever a kernel may compute something else."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def emit_kernels(isa: Isa, shapes: Shapes, plan: Plan) -> KernelModule:
    """All kernels that a model of these shapes and matrices needs."""
    module = KernelModule(isa, STEP)
    rows.emit_rows(module, shapes)
    draft.emit_tap(module, shapes)
    route.emit_route(module, shapes)
    route.emit_group(module, shapes)
    route.emit_gather(module, shapes)
    attention.emit_attention(module, shapes)
    if any(".compressor" in name for name in plan.matrices):
        compress.emit_compress(module, shapes, "entries")
        compress.emit_keep_tail(module)
    if any(".indexer." in name for name in plan.matrices):
        compress.emit_compress(module, shapes, "keys")
        indexer.emit_index_query(module, shapes)
        indexer.emit_index_score(module, shapes)
        indexer.emit_index_select(module, shapes)
    if any(".h_proj" in name for name in plan.matrices):
        draft.emit_draft(module, shapes)
    for form, epilogue in sorted({(m.form, epilogue_of(m.name)) for m in plan.matrices.values()}):
        if form == "fp4" and not isa.amx:
            int8.emit_products_int8(module, epilogue)
        else:
            matmul.emit_products(module, form, epilogue)
    if "product_int8_f32" in module.arguments:
        int8.emit_quantise(module)
    return module


def epilogue_of(name: str) -> matmul.Epilogue:
    """What becomes of a matrix's products, told by its name."""
    return "swiglu" if name.endswith(".in") else "bf16" if name.endswith("wo_a") else "f32"
