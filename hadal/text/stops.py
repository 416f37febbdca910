"""StopStrings: ends a text stream at the first stop string, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopStrings:
    """Passes text through until a stop string is complete; nothing of the stop string, or after it, comes out.

    The stop string that is complete first wins; of two that end together, the longer. No stop string may be empty.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that cannot belong to a stop string any more; "" once `matched` is set."""
        if self.matched is not None:
            return ""
        text, self._held = self._held + text, ""
        places = [(text.find(stop), stop) for stop in self._stops]
        hits = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if hits:
            _, start, self.matched = min(hits)
            return text[:start]
        keep = partial_suffix(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text held back, when the stream ends without a stop string."""
        text, self._held = self._held, ""
        return text


def partial_suffix(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `markers` without completing it."""
    longest = max((len(marker) for marker in markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        suffix = text[-size:]
        if any(len(marker) > size and marker.startswith(suffix) for marker in markers):
            return size
    return 0
