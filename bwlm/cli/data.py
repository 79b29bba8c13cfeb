"""`bwlm data` and `bwlm tokenizer`: tokenize and pack text, or print the rows that a model is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.app import App
from bwlm.cli.positions import LEGEND, show_positions
from bwlm.cli.terminal import (
    Json,
    Set,
    Storage,
    marked_spans,
    print_json,
    say,
    show,
    show_heading,
    show_table,
    show_text,
    whole_option,
)
from bwlm.directions import is_marked
from bwlm.errors import UserError, nearest
from bwlm.phases import FIRST, PHASES
from bwlm.progress import working

if TYPE_CHECKING:
    from bwlm.config import Recipe
    from bwlm.text.conversation import Conversation
    from bwlm.text.prepare import Prepared
    from bwlm.text.tokenizer import Tokenizer

tokenizer_app = App(help="Train or show a tokenizer.", no_args_is_help=True)
data_app = App(help="Tokenize and pack text, or print the rows that a model reads.", no_args_is_help=True)


def _recipe(
    settings: list[str] | None,
    storage: str | None,
    filled: Callable[[dict[str, Any]], dict[str, Any]] = lambda content: content,
) -> tuple[Recipe, Path]:
    from bwlm.config import Recipe
    from bwlm.paths import check_writable
    from bwlm.settings_file import override, parse_yaml, validate, with_whole_numbers
    from bwlm.storage.opened import open_storage

    document = with_whole_numbers(override(parse_yaml("", "--set"), settings or []), Recipe)
    root = open_storage(storage)
    check_writable(root)
    return validate(Recipe, filled(document.content), document), root


def _prepared(settings: list[str] | None, storage: str | None) -> Prepared:
    """Return the corpus that the settings ask for; start Ray only if it must be prepared."""
    from bwlm.record.bucket import push_text
    from bwlm.text.prepare import prepare

    recipe, root = _recipe(settings, storage)

    def pack(*arguments: Any) -> Any:
        from bwlm.cluster.session import open_cluster
        from bwlm.plan.spec import LaunchSettings
        from bwlm.text.stream import pack_corpus

        with open_cluster([recipe.resources], LaunchSettings(), 1, "bwlm data"):
            return pack_corpus(*arguments)

    prepared = prepare(recipe, root, pack, say)
    push_text(prepared.folder)
    return prepared


@contextmanager
def _prepared_or_head(settings: list[str] | None, storage: str | None, rows: int) -> Iterator[Prepared]:
    """Yield the corpus that the settings ask for if it is prepared, else the first rows of its first shard."""
    from tempfile import TemporaryDirectory

    from bwlm.record.bucket import fetch_text
    from bwlm.text.corpus import find_corpus
    from bwlm.text.prepare import find_prepared, prepare_head

    recipe, root = _recipe(settings, storage)
    corpus = find_corpus(recipe.data, root / "cache", say)
    if (prepared := find_prepared(recipe, corpus, root / "cache")) is not None:
        fetch_text(prepared.folder)
        yield prepared
        return
    head = Path(corpus.train[0].uri).name
    say(f"a preview: the first documents of {head}; a run shuffles its rows")
    with TemporaryDirectory(prefix="bwlm-head-") as folder:
        yield prepare_head(recipe, corpus, root / "cache", rows, Path(folder))


@data_app.command("prepare")
def data_prepare(set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """Tokenize and pack a corpus, so that the first grid on it starts at once.

    Example: `bwlm data prepare --set data.source=corpus/ --set model.sequence_length=512`
    """
    prepared = _prepared(set_, storage)
    width = prepared.manifest.sequence_length
    splits = {}
    for name in ("train", "validation"):
        split = getattr(prepared.manifest, name)
        counts = {k: split.total(k) for k in ("documents", "empty_documents", "rows", "segments", "tokens", "bytes")}
        splits[name] = {"shards": len(split.shards), **counts, "padding_share": split.padding_share(width)}
        assert prepared.manifest.overlap is not None, "counted whenever rows are packed"
        splits[name]["in_both_splits"] = getattr(prepared.manifest.overlap, name)
    content = {"folder": str(prepared.folder), "digest": prepared.manifest.digest, "sequence_length": width, **splits}
    if as_json:
        return print_json(content)
    rows = [[key.replace("_", " "), *(_figure(splits[name][key]) for name in splits)] for key in splits["train"]]
    show_table(["", *splits], rows, f"{prepared.folder}")
    return None


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2%}"


@data_app.command("inspect")
def data_inspect(
    direction: Annotated[
        str | None,
        typer.Option(
            help="Show only this direction. Default: all but permuted, or that of --parent.", show_default=False
        ),
    ] = None,
    rows: Annotated[int, whole_option("Number of rows, or of conversations.", 1, 10_000)] = 2,
    phase: Annotated[
        str,
        typer.Option(
            help="base: rows of documents. mid, sft, rl: conversations, with the tokens that count in the loss marked."
        ),
    ] = FIRST,
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="With --phase mid, sft or rl: use the tokenizer of this run. Default: the one of data.source.",
            show_default=False,
        ),
    ] = None,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Print training rows, `read -> target` at each position. With --phase mid, sft or rl: conversations.

    If the corpus is prepared, these are the first rows that a run with seed 0 reads. Else they are the first rows of
    the first shard, and only its head is read; if there is no tokenizer yet, one is trained on that head alone.

    --json always shows the first rows that a run with seed 0 reads. They depend on the shuffle and on the number of
    all rows, so it prepares the corpus first, into the cache, with its progress on stderr.

    Example: `bwlm data inspect --direction backward --rows 1`

    Example: `bwlm data inspect --phase sft --parent mine --rows 1 --set data.reversal=turns`
    """
    from bwlm.directions import DIRECTIONS
    from bwlm.phases import PHASES
    from bwlm.text.direction import check_direction
    from bwlm.text.inspect import inspect_rows

    if phase not in PHASES:
        raise UserError(f"--phase: {phase!r} is not one of {', '.join(PHASES)}{nearest(phase, PHASES)}")
    if parent is not None and PHASES[phase].is_first:
        raise UserError(f"--parent: rows of {phase} have none: leave it out, or name a later --phase")
    wanted = [check_direction(direction)] if direction else [n for n, one in DIRECTIONS.items() if not one.is_control]
    if as_json and direction is None:
        raise UserError("--json: shows one direction: name it with --direction")
    if not PHASES[phase].reads_documents:
        recipe, tokenizer, own = _for_conversations(phase, parent, set_, storage)
        ways = wanted if direction or own is None else [own]
        return _inspect_conversations(ways, rows, recipe, phase, tokenizer, as_json)
    if as_json:
        return print_json(inspect_rows(_prepared(set_, storage), wanted[0], rows))
    with _prepared_or_head(set_, storage, rows) as prepared:
        shown = {name: inspect_rows(prepared, name, rows)["rows"] for name in wanted}
    show(LEGEND)
    for index in range(rows):
        for name in wanted:
            show_positions(f"row {index}, {name}", shown[name][index], prepared.tokenizer)
    return None


def _for_conversations(
    phase: str, parent: str | None, settings: list[str] | None, storage: str | None
) -> tuple[Recipe, Tokenizer, str | None]:
    """Return the settings of a phase and a tokenizer; of a parent its own ones, and its direction."""
    from bwlm.plan.inherit import with_defaults
    from bwlm.record.experiment import open_experiment
    from bwlm.storage.opened import open_storage
    from bwlm.text.prepare import get_tokenizer
    from bwlm.text.tokenizer import Tokenizer

    if parent is None:
        recipe, root = _recipe(settings, storage, lambda content: with_defaults(content, phase))
        with working("preparing a tokenizer"):
            return recipe, get_tokenizer(recipe, root / "cache", lambda _: None)[2], None
    config = open_experiment(open_storage(storage), parent).config()
    experiment = config.experiment

    def filled(content: dict[str, Any]) -> dict[str, Any]:
        if PHASES[experiment.phase].reads_documents:  # it has no reversal: the child may choose
            return with_defaults(content, phase)
        data = {"reversal": experiment.data.reversal} | content.get("data", {})
        return with_defaults(content | {"data": data}, phase)

    tokenizer = Tokenizer.load(Path(config.tokenizer), config.identity["tokenizer"])
    return _recipe(settings, storage, filled)[0], tokenizer, experiment.direction


def _inspect_conversations(
    directions: list[str], count: int, recipe: Recipe, phase: str, tokenizer: Tokenizer, as_json: bool
) -> None:
    from bwlm.text.inspect import inspect_conversation

    with working("reading conversations"):
        chosen = _first_conversations(recipe, count)
    supervised = PHASES[phase].supervised == "written"
    shown = [
        (
            title,
            {way: inspect_conversation(one, way, recipe.data.reversal, supervised, tokenizer) for way in directions},
        )
        for title, one in chosen
    ]
    if as_json:
        return print_json([readings[directions[0]] for _, readings in shown])
    show(f"{marked_spans()}: what a model is trained to write")
    for title, readings in shown:
        for name, reading in ((name, reading) for name, of in readings.items() for reading in of):
            marked = f", marked {reading['reading']}" if is_marked(name) else ""
            show_heading(f"{title}, {name}{marked}")
            _show_supervised(reading["text"], reading["supervised"])
    return None


def _first_conversations(recipe: Recipe, count: int) -> list[tuple[str, Conversation]]:
    """Return the first `count` training conversations, from the sources of the mixture in turn, each with a title."""
    from itertools import chain, islice, repeat, zip_longest

    from bwlm.text.conversation import check_conversation
    from tasks.sources import sources_of

    sources = sources_of(recipe)
    for source in sources:
        source.check(say)
    numbered = [zip(repeat(source.name), enumerate(source.read("train"))) for source in sources]
    in_turn = filter(None, chain.from_iterable(zip_longest(*numbered)))
    return [
        (f"{name} {index}", check_conversation(messages, f"{name}: train conversation {index}: messages"))
        for name, (index, messages) in islice(in_turn, count)
    ]


def _show_supervised(texts: list[str], supervised: list[bool]) -> None:
    """Print texts of tokens, spans that are targets marked."""
    from itertools import groupby

    spans = groupby(zip(texts, supervised, strict=True), key=lambda pair: pair[1])
    show_text(("".join(text for text, _ in group), is_target) for is_target, group in spans)


@tokenizer_app.command("train")
def tokenizer_train(
    output: Annotated[
        Path | None,
        typer.Option(help="Write a copy of the tokenizer to this folder, besides the cache.", show_default=False),
    ] = None,
    set_: Set = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Train the tokenizer that a grid with these settings would use.

    Example: `bwlm tokenizer train --set data.source=corpus/ --set tokenizer.vocab_size=8192`
    """
    _tokenizer(set_, storage, as_json, output)


@tokenizer_app.command("show")
def tokenizer_show(set_: Set = None, storage: Storage = None, as_json: Json = False) -> None:
    """Show a tokenizer's vocabulary size, bytes per token on the validation text, and digest.

    Example: `bwlm tokenizer show --set tokenizer.path=my-tokenizer`
    """
    _tokenizer(set_, storage, as_json, None)


def _tokenizer(settings: list[str] | None, storage: str | None, as_json: bool, output: Path | None) -> None:
    from bwlm.text.prepare import bytes_per_token, get_tokenizer

    recipe, root = _recipe(settings, storage)
    corpus, folder, tokenizer = get_tokenizer(recipe, root / "cache", say)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output)
        folder = output
    content = {
        "folder": str(folder),
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": bytes_per_token(tokenizer, corpus),
        "digest": tokenizer.digest,
    }
    if as_json:
        return print_json(content)
    for key, value in content.items():
        show(f"{key:16} {value}")
    return None
