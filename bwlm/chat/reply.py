"""The reply of a model while it is written: its request to the engine, and its text so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bwlm.chat.engine import Event, Request
from bwlm.chat.growth import TextGrowth
from bwlm.chat.settings import Settings
from bwlm.text.conversation import Prompt
from bwlm.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "interrupted"]


class Reply:
    """Text that grows with the events of its request, always of whole characters."""

    def __init__(
        self,
        id: str,
        prompt: Prompt,
        reading: str,
        tokenizer: Tokenizer,
        settings: Settings,
        seed: int,
        stops: Sequence[str] = (),
    ) -> None:
        self.tokens = 0
        """Number of generated ids."""
        self.finish: Finish = "interrupted"
        self._growth = TextGrowth(tokenizer, reading, stops)
        banned = frozenset(tokenizer.specials.values()) - {prompt.stop}
        self.request = Request(
            id,
            prompt.ids,
            settings.max_tokens,
            settings.sampling(banned),
            seed,
            frozenset({prompt.stop}),
            self._is_over,
        )

    def _is_over(self, id: int) -> bool:
        self._growth.add(id)
        return self._growth.stopped

    @property
    def text(self) -> str:
        """Return the text so far, in reading order."""
        return self._growth.text

    def take(self, event: Event) -> None:
        """Take an event of the request."""
        self.tokens += event.token is not None
        if event.finish:
            self._growth.close()
            self.finish = "stop" if self._growth.stopped else event.finish

    @property
    def usage(self) -> dict[str, int]:
        """Return the tokens of the prompt and of the reply, under the names of OpenAI's protocol."""
        read = len(self.request.ids)
        return {"prompt_tokens": read, "completion_tokens": self.tokens, "total_tokens": read + self.tokens}
