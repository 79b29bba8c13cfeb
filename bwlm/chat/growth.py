"""The text of ids as they come: whole characters alone, at the end of the text or, read backward, at its front.

A token of a small vocabulary may be one byte of three. Bytes are held back until they are whole characters, whatever
comes next: forward by UTF-8's own rules; backward up to the first byte that begins a character, since bytes that only
continue one, put in the wrong place, decode to other characters that look right.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from bwlm.directions import BASELINE
from bwlm.text.tokenizer import Tokenizer

_MOST_CONTINUING = 3
"""Bytes that can follow the first byte of a character in UTF-8."""


class TextGrowth:
    """Text that grows with each id, up to a stop text, which is left out.

    `text` is what has been given out. Joined at its side, all that `add` and `close` return is the text of the ids,
    as `Tokenizer.decode` gives it, up to the stop text that is complete first.
    """

    def __init__(self, tokenizer: Tokenizer, reading: str, stops: Sequence[str] = ()) -> None:
        self.text = ""
        """Text in reading order."""
        self.stopped = False
        """True once a stop text came."""
        self.at_front = reading != BASELINE
        self._pieces = [*tokenizer.tokens, *(name.encode() for name in tokenizer.specials)]
        self._stops = [stop for stop in stops if stop]
        self._bytes = b""
        """Bytes read backward that may belong to a character that is not whole."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        """Text that may be a part of a stop text."""

    def add(self, id: int) -> str:
        """Return the text that an id adds, '' while a character or a stop text may be incomplete, or after a stop."""
        return "" if self.stopped else self._grow(self._whole(self._pieces[id]))

    def close(self) -> str:
        """Return what was held back, once no more ids come; bytes that are no character become U+FFFD."""
        if self.stopped:
            return ""
        rest = self._bytes.decode(errors="replace") if self.at_front else self._decoder.decode(b"", final=True)
        self._bytes = b""
        grown = self._grow(rest)
        last = "" if self.stopped else self._release(0)
        return last + grown if self.at_front else grown + last

    def _whole(self, new: bytes) -> str:
        """Return the characters that are whole, whatever bytes follow."""
        if not self.at_front:
            return self._decoder.decode(new)
        held = new + self._bytes
        begins = next((at for at, byte in enumerate(held) if byte & 0xC0 != 0x80), len(held))
        certain = min(begins, _MOST_CONTINUING)
        self._bytes = held[:certain]
        return held[certain:].decode(errors="replace")

    def _grow(self, new: str) -> str:
        """Take new characters; return those that cannot be part of a stop text."""
        self._held = new + self._held if self.at_front else self._held + new
        found = [span for stop in self._stops if (span := self._find(stop))]
        if found:
            self.stopped = True
            # the one that was complete first, however many characters came at once; of two, the longer one
            _, kept = min(found)
            return self._release(len(self._held) - kept)
        return self._release(max((self._overlap(stop) for stop in self._stops), default=0))

    def _find(self, stop: str) -> tuple[int, int] | None:
        """Return the characters of what is held up to the end of a stop text, and those that come before it."""
        at = self._held.rfind(stop) if self.at_front else self._held.find(stop)
        if at < 0:
            return None
        before = len(self._held) - at - len(stop) if self.at_front else at
        return before + len(stop), before

    def _overlap(self, stop: str) -> int:
        """Return the length of the longest part of a stop text at the growing side of what is held."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.startswith(stop[-length:]) if self.at_front else self._held.endswith(stop[:length]):
                return length
        return 0

    def _release(self, held: int) -> str:
        """Give out all but the `held` characters at the growing side."""
        cut = held if self.at_front else len(self._held) - held
        front, back = self._held[:cut], self._held[cut:]
        released, self._held = (back, front) if self.at_front else (front, back)
        self.text = released + self.text if self.at_front else self.text + released
        return released
