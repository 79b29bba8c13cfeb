"""Settings from YAML files and `--set`; each field knows its line, so that an error names file, line, field and fix."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bwlm.config import HORIZONS, Settings
from bwlm.errors import UserError, nearest
from bwlm.format import WHOLE_NUMBERS, json_kind, whole_number


@dataclass(frozen=True)
class Document:
    """YAML mapping, and the place where each dotted field was given."""

    name: str
    content: dict[str, Any]
    places: Mapping[str, str]
    """Place of each field: `file:line`, or `--set field`."""

    def place(self, field: str) -> str:
        """Return the place where the field, or else its nearest enclosing field, was given."""
        while field and field not in self.places:
            field = field.rpartition(".")[0]
        return self.places.get(field, self.name)

    def where(self, field: str) -> str:
        """Return `file:line: field`, `--set field` or `--field`, to begin an error message."""
        place = self.place(field)
        if place == "--set":  # not given: a setting of `bwlm train` that has no flag
            return f"--set {field}"
        return place if place in (f"--set {field}", f"--{field}") else f"{place}: {field}"


_MOST_DIGITS = 1000
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    "true": True,
    "false": False,
    "null": None,
    "~": None,
    "": None,
    ".nan": float("nan"),
    ".inf": float("inf"),
    "-.inf": float("-inf"),
}


def _scalar(node: yaml.ScalarNode) -> Any:
    """Return the value of a scalar by YAML 1.2's core schema: 6e-4 is a float, 010 is ten, yes is a word."""
    text = node.value
    if node.style is not None:
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text) and len(text) < _MOST_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


class _Loader(yaml.SafeLoader):
    """Loader that builds nodes only, and refuses aliases: with them a small file can ask for billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"aliases (*{event.anchor}) are not allowed: write the value out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


def _build(node: yaml.Node, path: str, name: str, lines: dict[str, int]) -> Any:
    if path:
        lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(child, f"{path}.{index}" if path else str(index), name, lines)
            for index, child in enumerate(node.value)
        ]
    assert isinstance(node, yaml.MappingNode)
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            raise UserError(f"{name}:{line}: the name of a field must be a plain word: write name: value")
        key = key_node.value
        field = f"{path}.{key}" if path else key
        if key in content:
            raise UserError(f"{name}:{line}: {field}: appears twice (first on line {lines[field]}): keep one")
        content[key] = _build(value_node, field, name, lines)
        lines[field] = line
    return content


def parse_yaml(text: str, name: str) -> Document:
    """Return the document of a YAML text.

    Raises `UserError` naming file and line on bad syntax, duplicate keys or content that is not a mapping.
    """
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        content = {} if node is None else _build(node, "", name, lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise UserError(f"{name}{line}: not valid YAML ({problem})") from None
    except RecursionError:
        raise UserError(f"{name}: not valid YAML (nested too deeply)") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: must hold fields (name: value), not {json_kind(content)}")
    document = Document(name, content, {field: f"{name}:{line}" for field, line in lines.items()})
    _spread_dotted(document)
    return document


def _spread_dotted(document: Document) -> None:
    """Move `model.head_dim: 32` into the section `model`, as if it stood there.

    Raises `UserError` if a field is given both ways.
    """
    dotted = {key: document.content.pop(key) for key in list(document.content) if "." in key}
    for field, value in dotted.items():
        if holds(document.content, field):
            raise UserError(f"{document.where(field)}: appears twice, dotted and in its section: keep one")
        assign(document.content, field, value, document.where(field))


def holds(content: Any, field: str) -> bool:
    """Return whether nested dictionaries hold a dotted field."""
    first, _, rest = field.partition(".")
    return isinstance(content, dict) and first in content and (not rest or holds(content[first], rest))


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes the words that `parse_yaml` would otherwise read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def word(self, text: str) -> yaml.ScalarNode:
        is_word = text.isprintable() and isinstance(_scalar(yaml.ScalarNode("", text)), str)
        style = None if is_word else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.word)


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Return a YAML text that `parse_yaml` reads as `content`."""
    return str(yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def load_yaml(path: Path) -> Document:
    """Read a YAML file. Raises `UserError` naming it if it is missing, unreadable or not UTF-8."""
    try:
        return parse_yaml(path.read_text("utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check its path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a YAML file that you can read") from None


def parse_setting(setting: str) -> tuple[str, Any]:
    """Return `a.b=c` as (`a.b`, value); YAML's rules give the value its type. Raises `UserError` for any other form."""
    field, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", field):
        raise UserError(f"--set {setting}: write it as field=value, for instance --set model.sequence_length=256")
    return field, parse_yaml(f"value: {text}" if text.strip() else "value:", f"--set {field}").content["value"]


_BELOW_AXES = re.compile(r"((?:phases\.\w+\.)?axes)\.(.+)")


def assign(content: dict[str, Any], field: str, value: Any, where: str) -> None:
    """Set a dotted field in nested dictionaries. Below `axes` the rest of the field is one name.

    Raises `UserError` if a section on the way holds a value instead.
    """
    parents, last = field.split(".")[:-1], field.rpartition(".")[2]
    if below_axes := _BELOW_AXES.fullmatch(field):
        parents, last = below_axes[1].split("."), below_axes[2]
    for parent in parents:
        below = content.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"{where}: '{parent}' is a value and holds no fields: set '{parent}' itself")
        content = below
    content[last] = value


def override(document: Document, settings: list[str]) -> Document:
    """Return the document with `--set` settings laid over it; a horizon given there replaces the file's."""
    content, places = copy.deepcopy(document.content), dict(document.places)
    parsed = [parse_setting(setting) for setting in settings]
    horizons = {f"budget.{name}" for name in HORIZONS}
    if any(field in horizons for field, _ in parsed) and isinstance(content.get("budget"), dict):
        content["budget"] = {name: value for name, value in content["budget"].items() if name not in HORIZONS}
    for field, value in parsed:
        assign(content, field, value, f"--set {field}")
        places = {known: place for known, place in places.items() if not f"{known}.".startswith(f"{field}.")}
        above = field
        while above and above not in places:
            places[above] = f"--set {field}"
            above = above.rpartition(".")[0]
    return Document(document.name, content, places)


def with_whole_numbers(document: Document, model: type[BaseModel]) -> Document:
    """Return the document with an integer wherever `model` takes one and a whole number is written otherwise.

    So `1e9`, `1_000_000` and "1e9" in quotes are 10^9, in sections, in axes and in the blocks of phases. Any other
    value stays for `validate` to refuse.
    """
    return Document(document.name, _whole(document.content, "", integer_fields(model)), document.places)


_BLOCK = re.compile(r"(axes|also|phases\.\w+(\.axes)?)\.")
"""Fields of a grid file that hold fields of an experiment, or lists of their values."""


def _whole(content: Any, field: str, integers: set[str]) -> Any:
    if isinstance(content, dict):
        return {name: _whole(value, f"{field}.{name}".lstrip("."), integers) for name, value in content.items()}
    if isinstance(content, list):
        return [_whole(value, field, integers) for value in content]
    return whole_number(content) if _BLOCK.sub("", field, count=1) in integers else content


_PLAIN = re.compile(r"[\w./-]+(:[\w./-]+)*")
"""Text that YAML reads as itself unless it is one of YAML's words or numbers."""


def written_settings(content: Mapping[str, Any], section: str = "") -> list[str]:
    """Return nested settings in the form that `--set` takes: `a.b=c`."""
    written = []
    for name, value in content.items():
        field = f"{section}{name}"
        if isinstance(value, Mapping) and all(map(str.isidentifier, value)):
            written += written_settings(value, f"{field}.")
        else:
            is_plain = isinstance(value, str) and _PLAIN.fullmatch(value) and parse_setting(f"f={value}")[1] == value
            written.append(f"{field}={value if is_plain else json.dumps(value)}")
    return written


# ---- validating ----

T = TypeVar("T", bound=Settings)

_KINDS = {
    "list_type": "a list, such as [1, 2]",
    "dict_type": "fields (name: value)",
    "float_type": "a number, such as 0.5",
    "bool_type": "true or false",
    "string_type": "a word or a text",
}
"""Words for pydantic's types of errors."""
_SYNONYMS = {
    "depth": ("layers", "n_layer", "n_layers", "num_layers"),
    "model.sequence_length": ("context", "context_length", "block_size", "max_seq_len"),
    "budget.batch_tokens": ("total_batch_size", "tokens_per_batch"),
    "budget.steps": ("iterations", "max_steps", "num_iterations"),
    "data.source": ("dataset", "corpus"),
}
"""Names that other programs give to fields."""


def meant_field(name: str, model: type[BaseModel], beside: Sequence[str] = ()) -> str:
    """Return the dotted field that a person may mean by an unknown name; '' if none is near.

    It is the field with this synonym or these initials (`learning_rate`: `lr`), else one of the fields `beside` it,
    else the one with the nearest name.
    """
    fields = list(field_names(model))
    settings = [field for field in fields if not any(other.startswith(f"{field}.") for other in fields)]
    by_name = {field.rpartition(".")[2]: field for field in reversed(settings)} | {field: field for field in settings}
    synonyms = {other: field for field, others in _SYNONYMS.items() if field in settings for other in others}
    initials = "".join(word[:1] for word in name.split("_"))
    if exact := synonyms.get(name) or by_name.get(initials):
        return exact
    for known in ({field: field for field in beside}, by_name):
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
            return known[near[0]]
    return ""


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted field of a settings class, sections included."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield from field_names(info.annotation, f"{prefix}{name}.")


def integer_fields(model: type[BaseModel]) -> set[str]:
    """Return the dotted fields of a settings class that take an integer."""
    found = set()
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            found |= {f"{name}.{inner}" for inner in integer_fields(info.annotation)}
        elif _takes_integer(info.annotation):
            found.add(name)
    return found


def _takes_integer(annotation: Any) -> bool:
    """Return whether an annotation is `int`, `int | None`, or one of them with bounds."""
    inner = get_args(annotation) if get_origin(annotation) in (Annotated, Union, UnionType) else ()
    return annotation is int or any(map(_takes_integer, inner))


def validate(model: type[T], content: Mapping[str, Any], document: Document) -> T:
    """Return the content as validated settings.

    Raises `UserError`: one line with file, line, field, what is wrong and the nearest valid name.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(explain(error, model, document)) from None


def explain(error: ValidationError, model: type[BaseModel], document: Document) -> str:
    """Return a validation error in one line: file, line, field, what is wrong and the nearest valid name.

    All unknown fields are named, else the first error: a misspelt field counts as missing too, and the hint at its
    spelling helps more.
    """
    errors = error.errors()
    unknown = [one for one in errors if one["type"] == "extra_forbidden"]
    return "; ".join(_explain(one, model, document) for one in unknown or errors[:1])


_FORMS = ("constrained-int", "WorkerRange")
"""Parts that pydantic adds to the place of an error where a value may have several forms."""


def _explain(first: Any, model: type[BaseModel], document: Document) -> str:
    field = ".".join(part for part in map(str, first["loc"]) if part not in _FORMS)
    message = first["msg"].removeprefix("Value error, ")
    if not field:  # a check over several sections names the field in its message
        field, _, message = message.partition(": ")
    where = document.where(field)
    if first["type"] == "extra_forbidden":
        section, _, name = field.rpartition(".")
        siblings = [f.rpartition(".")[2] for f in field_names(model) if f.rpartition(".")[0] == section]
        meant = meant_field(name, model, siblings)
        hint = f"did you mean '{meant}'?" if meant else f"known: {', '.join(siblings)}"
        return f"{where}: unknown field ({hint})"
    if first["type"] == "int_type":
        return f"{where}: must be {WHOLE_NUMBERS} (found {first['input']!r})"
    if first["type"] in _KINDS:
        return f"{where}: must be {_KINDS[first['type']]} (found {first['input']!r})"
    if first["type"] == "missing":
        return f"{where}: missing: add it"
    if first["type"] == "literal_error":
        choices = first["ctx"]["expected"]
        guess = nearest(str(first["input"]), re.findall(r"'([^']*)'", choices))
        return f"{where}: {first['input']!r} is not one of {choices}{guess}"
    shown = "" if isinstance(first["input"], dict) else f" (found {first['input']!r})"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"
