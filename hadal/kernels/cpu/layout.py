"""Where everything lies in memory: the words of a step, a sequence's home and pages, blocks of keys.

A sequence owns one *home*, bytes of fixed size, and pages of 128 source tokens each. Per layer the home holds the
window ring and the compressors' tails, a page the compressed entries and index keys of its tokens.

  key block   32 consecutive keys (aligned by position), twice: as rows [2][D/32][16 keys][32 d], the A tiles of
              keys x queries, and as pairs [D/16][16 pairs of keys][16 d][2], the B tiles of weights x keys
  ring        `ring_blocks` key blocks; position p lies in block (p // 32) % ring_blocks, key p % 32
  tail        `slots` rows of [kv | score] FP32, the position bias not yet added; position p lies in row p % slots
  entry       D - R E4M3 codes, R BF16 rotary values, one E8M0 byte per 64 codes padded to 8 bytes: 584 at V4's sizes
  key group   16 index keys: [Di/8][16 keys][4] bytes of E2M1 codes, of eight channels 0 to 3 in the low nibbles and the
              others in the high ones, then [Di/32][16 keys] E8M0 bytes: 68 bytes per key at V4's sizes
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels.pages import PAGE_TOKENS, SLACK

KEYS = 32  # keys of a block
HEADS = 16  # query heads of a group
QUANT_GROUP = 64  # channels per scale of an entry

# Words of a step. Row arrays hold one int64 per packed row.
STEP = [
    "rows",  # packed rows
    "spans",  # sequences
    "ids",  # row array: token ids
    "positions",  # row array
    "span_of",  # row array: index of the row's span
    "span_table",  # SPAN words per span
    "angles",  # per row and regime (0 plain, 1 scaled): R/2 cos, then R/2 sin, FP32
    "wanted",  # row array: rows whose logits are wanted
    "wanted_rows",  # how many
    "sources",  # row array, for the MTP block alone: the row of the last pass whose streams a row follows
]
SPAN = [
    "start",  # position of the first new token
    "length",  # new tokens
    "row",  # packed row of the first one
    "home",  # address
    "pages",  # address of the page addresses
    "window",  # address of key blocks for the window of long spans, 0: the ring is used in place
    "window_blocks",  # key blocks there; position p lies in block (p // 32) % window_blocks
    "entries",  # address of key blocks into which all visible entries are unpacked, per layer anew
]


@dataclass(frozen=True)
class Shapes:
    """Sizes that all layers share, fixed when the kernels are emitted."""

    hidden: int
    streams: int
    heads: int
    dim: int
    rotary: int
    window: int
    index_heads: int
    index_dim: int
    topk: int
    experts: int
    active: int
    vocabulary: int
    norm_eps: float
    hc_eps: float
    sinkhorn: int

    @classmethod
    def of(cls, c: ModelConfig) -> Shapes:
        """The shapes of a configuration."""
        return cls(
            c.hidden_size, c.hc_mult, c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.sliding_window,
            c.index_n_heads, c.index_head_dim, c.index_topk, c.n_routed_experts, c.num_experts_per_tok, c.vocab_size,
            c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters,
        )  # fmt: skip

    @property
    def head_groups(self) -> int:
        """Groups of 16 query heads, the last one padded with zeros."""
        return -(-self.heads // HEADS)

    @property
    def block_bytes(self) -> int:
        """Bytes of a key block, both forms; the pairs begin in the middle."""
        return 2 * KEYS * self.dim * 2

    @property
    def ring_blocks(self) -> int:
        """Key blocks of a ring: enough for the window of any span of up to 32 new tokens."""
        return self.window // KEYS + 2

    @property
    def entry_bytes(self) -> int:
        """Bytes of a compressed entry."""
        codes = self.dim - self.rotary
        return codes + 2 * self.rotary + -(-(codes // QUANT_GROUP) // 8) * 8

    @property
    def group_bytes(self) -> int:
        """Bytes of 16 index keys."""
        return 16 * (self.index_dim // 2 + self.index_dim // 32)


@dataclass(frozen=True)
class LayerPlace:
    """Byte offsets of one layer's parts: in a home (ring, tail, index_tail) and in a page (entries, keys)."""

    ring: int
    tail: int = 0
    index_tail: int = 0
    entries: int = 0
    keys: int = 0
    slots: int = 0  # rows of a tail


@dataclass(frozen=True)
class Places:
    """The layout of homes and pages of a model."""

    layers: list[LayerPlace] = field(default_factory=list)
    home_bytes: int = 0
    page_bytes: int = 0


def place_layers(config: ModelConfig, shapes: Shapes) -> Places:
    """Lay out homes and pages, an MTP block's ring last; every part begins on a cache line."""
    home = page = 0
    layers = []
    for layer in (*config.layers, *(config.draft_layers if config.draft == "mtp" else ())):
        ring, home = home, home + shapes.ring_blocks * shapes.block_bytes
        place = {"ring": ring}
        if layer.ratio:
            slots, width = tail_shape(layer, shapes.dim)
            place |= {"tail": home, "slots": slots, "entries": page}
            home += slots * 2 * width * 4
            page = _line(page + PAGE_TOKENS // layer.ratio * shapes.entry_bytes)
        if layer.attention == "csa":
            slots, width = tail_shape(layer, shapes.index_dim)
            place |= {"index_tail": home, "keys": page}
            home += slots * 2 * width * 4
            page = _line(page + PAGE_TOKENS // layer.ratio // 16 * shapes.group_bytes)
        layers.append(LayerPlace(**place))
        home = _line(home)
    return Places(layers, home, page)


def tail_shape(layer: LayerSpec, dim: int) -> tuple[int, int]:
    """Rows of a layer's tail, with those a rewound sequence needs again, and floats of kv (or score) in each.

    Blocks overlap in CSA layers.
    """
    overlap = layer.attention == "csa"
    rows, width = (2 * layer.ratio, 2 * dim) if overlap else (layer.ratio, dim)
    return rows + SLACK, width


def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
