"""SampledTurn: an answer token for token, so that the prompt of a later turn repeats exactly what the model wrote.

Text that is encoded again may get other ids than were sampled, and calls may be spelled in more ways than one; either
would part the prompt from the prefix that is kept. Between the parsed answer and the chat codec.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from hadal.text.tokenizer import Tokenizer
from hadal.text.tokens import THINK_CLOSE

SAMPLED_KEY = "sampled_turn"  # of an assistant message; its value is an object, so no JSON can bring one


@dataclass(frozen=True, slots=True, eq=False)
class SampledTurn:
    """What stands before and after the end of thought; `answer` holds the calls as the model spelled them.

    The texts are those of the ids. The tokens that ended the thought and the answer are not among them.
    """

    reasoning: str
    reasoning_ids: Sequence[int]
    answer: str
    answer_ids: Sequence[int]


def find_sampled(
    ids: Sequence[int], tokenizer: Tokenizer, *, thinking: bool, reasoning: str, content: str, calls: bool
) -> SampledTurn | None:
    """The turn that `ids` are, without the token that ended it, if they say what was shown; else None.

    `thinking` says that it began inside a think span. It is None when the thought did not end with its token, held
    calls or markers, when an end-of-sequence or a further end of thought was passed over, and when the content is cut
    at a stop string.
    """
    close = tokenizer.token_id(THINK_CLOSE)
    end = (list(ids).index(close) if close in ids else len(ids)) if thinking else 0
    thought, answer = array("i", ids[:end]), array("i", ids[end + thinking :])
    said = tokenizer.decode(answer)
    if tokenizer.eos_id in ids or close in answer:
        return None
    if tokenizer.decode(thought) != reasoning or (said != content and not calls):
        return None
    return SampledTurn(reasoning, thought, said if calls else content, answer)
