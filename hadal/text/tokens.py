"""The control tokens of DeepSeek-V4, spelled once for the tokenizer, the chat codec and the output parser.

`｜` is U+FF5C and `▁` is U+2581 (spec 7.1).
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
NOISE = "<｜place▁holder▁no▁799｜>"  # fills the slots that DSpark drafts

TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

# Ids of a tokenizer trained here are positions in this tuple: BOS 0, EOS 1 and pad 2 as in V4, the rest in one block.
CONTROL_TOKENS = (
    BOS,
    EOS,
    PAD,
    NOISE,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    THINK_OPEN,
    THINK_CLOSE,
    DSML,
    LATEST_REMINDER,
    *TASKS.values(),
    "<｜extracted_url｜>",
)
# The official files flag only these: skipping "special" tokens must not strip <think> or DSML from an answer.
FLAGGED_SPECIAL = (BOS, EOS, PAD, NOISE)
