"""Standard output and error that take every character, whatever the encoding of the terminal or pipe."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import unicodedata

from bwlm.paths import readable

_HANDLER = "bwlm.transliterate"
_PLAIN = {
    "→": "->", "←": "<-", "–": "-", "—": "-", "·": ".", "±": "+-", "×": "x", "«": "<<", "»": ">>", "⏎": "|",
    "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "ß": "ss", "Δ": "delta", "█": "#", "␣": "_", "⇥": "|",
}  # fmt: skip


def tolerate_any_text() -> None:
    """Make standard output and error write what their encoding lacks in ASCII, instead of raising.

    Streams that are not files, such as a notebook's, take any text already.
    """
    codecs.register_error(_HANDLER, _transliterated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _transliterated(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError), "these streams are only written to"
    text = readable(error.object[error.start : error.end])
    if error.encoding.startswith("utf"):  # UTF lacks only lone surrogates, and the handler must give bytes for them
        return text.encode(error.encoding), error.end
    return "".join(map(_nearest_ascii, text)), error.end


def _nearest_ascii(character: str) -> str:
    name = unicodedata.name(character, "")
    if character in _PLAIN:
        return _PLAIN[character]
    if name.startswith("BOX DRAWINGS"):
        return "+" if " AND " in name else "-" if "HORIZONTAL" in name else "|"
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def finish_writing() -> bool:
    """Write what is still buffered; returns whether it was read. A reader that has gone (`| head`) is no mistake."""
    whole = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            whole = False
            with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor flushes nothing at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return whole
