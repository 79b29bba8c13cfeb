"""Settings of what a model writes, as a person gives them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bwlm.errors import UserError, nearest
from bwlm.format import WHOLE_NUMBERS, whole_number
from bwlm.model.sampling import Sampling

_WHOLE = ("top_k", "max_tokens", "seed")
_OFF = ("off", "none")


@dataclass(frozen=True)
class Settings:
    """Settings of a model's messages; temperature and `top_k` are nanochat's. Raises `UserError` for a wrong value."""

    temperature: float = 0.6
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {self.max_tokens}")
        try:
            self.sampling(frozenset())
        except ValueError as error:
            raise UserError(str(error)) from None

    def sampling(self, banned: frozenset[int]) -> Sampling:
        """Return how ids are chosen; those that are `banned` never are."""
        of_ids = {name: value for name, value in asdict(self).items() if name not in ("max_tokens", "seed")}
        return Sampling(**of_ids, banned=banned)

    def changed(self, name: str, text: str) -> Settings:
        """Return the settings with one of them as typed: `temperature 0.7`, `top-k off`. Raises `UserError`."""
        known, name = [field.name for field in fields(self)], name.replace("-", "_")
        if name not in known:
            raise UserError(f"{name[:40]}: no such setting{nearest(name, known)}: set one of {', '.join(known)}")
        return replace(self, **{name: _read(name, text)})

    @property
    def words(self) -> str:
        """Return all settings in a line."""
        return ", ".join(f"{name} {'off' if value is None else value}" for name, value in asdict(self).items())


def _read(name: str, text: str) -> Any:
    if name == "top_k" and text.lower() in _OFF:
        return None
    return _whole(name, text) if name in _WHOLE else _number(name, text)


def _whole(name: str, text: str) -> int:
    number = whole_number(text)
    if not isinstance(number, int):
        raise UserError(f"{name}: must be {WHOLE_NUMBERS} (found {text[:40]!r})")
    return number


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name}: must be a number, such as 0.5 (found {text[:40]!r})") from None
