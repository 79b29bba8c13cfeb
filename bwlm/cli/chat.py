"""`bwlm chat` and `bwlm sample`: talk to a trained model, and let it write documents."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bwlm.cli.terminal import (
    Json,
    Storage,
    number_option,
    print_json,
    say,
    show,
    show_heading,
    show_sentences,
    show_table,
    whole_option,
)
from bwlm.directions import BASELINE, DIRECTIONS, TEXT_READINGS
from bwlm.errors import UserError, nearest
from bwlm.format import counted, visible
from bwlm.phases import PHASES
from bwlm.progress import loading, working
from bwlm.remote import address_of

if TYPE_CHECKING:
    from bwlm.chat.dialogue import Voice
    from bwlm.chat.sample import Samples
    from bwlm.chat.settings import Settings
    from bwlm.chat.talk import Talk
    from bwlm.chat.talkable import Talkable
    from bwlm.config import Experiment
    from bwlm.trained.load import LoadedModel

_AUTO = "auto"
_READINGS = (_AUTO, *TEXT_READINGS)

Temperature = Annotated[float | None, number_option("0: the likeliest token; above 1: more random.")]
TopK = Annotated[int | None, whole_option("Draw from this many likeliest tokens; 0: from all.", 0)]
TopP = Annotated[float | None, number_option("Draw from the fewest tokens whose probabilities reach this sum.")]
MinP = Annotated[float | None, number_option("Draw from tokens with at least this share of the best probability.")]
Seed = Annotated[
    int | None, whole_option("Seed of the draws; each further text has the next one. Default: a random one.", 0)
]


def chat(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID[@STEP]]",
            help="Run to talk to. Without it, the runs that can be talked to are listed. ID@400 or ID@best: another "
            "checkpoint than its newest.",
            show_default=False,
        ),
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help=f"Instead of ID: talk to the newest run of a phase ({', '.join(PHASES)}).")
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            help="With ID: the direction in which it writes first. Without: talk to the newest run of this direction."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this message alone, and end.")] = None,
    max_tokens: Annotated[int | None, whole_option("Most tokens of an answer. Default: 256.", 1)] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Talk to a trained model, forward or backward: its checkpoint says what it can do (docs/chat.md).

    A model of conversations answers you; read backward, it writes the message that yours answers. A model of
    documents goes on with your text, or writes what came before it. A bidirectional model does both: /forward and
    /backward switch. /help lists all commands. By default temperature is 0.6 and top-k 50.

    Example: `bwlm chat mine-sft`

    Example: `bwlm chat --phase sft --direction backward --prompt 12 --json`
    """
    from bwlm.chat.talkable import newest, talkable_runs
    from bwlm.storage.opened import open_storage

    root = open_storage(storage)
    _check_one_of("--phase", phase, tuple(PHASES))
    _check_one_of("--direction", direction, tuple(DIRECTIONS))
    reading = direction
    if checkpoint is None:
        runs, left_out = talkable_runs(root)
        for line in left_out:
            say(line)
        if phase is None and direction is None:
            if prompt is not None:
                raise UserError("--prompt: which run is to answer? give its ID, or --phase and --direction")
            return _list(root, runs, as_json)
        checkpoint, reading = newest(runs, phase, direction).id, None
        say(f"the newest such run: {checkpoint}")
    elif phase is not None:
        raise UserError("--phase: chooses a run, as ID does: give one of them")
    if as_json and prompt is None:
        raise UserError("--json: prints one answer: give the message with --prompt")
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "min_p": min_p, "seed": seed}
    talk, loaded = _talk(root, checkpoint, reading, given, top_k)
    return _one_answer(talk, loaded, prompt, as_json) if prompt is not None else _converse(talk, loaded)


def _check_one_of(option: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise UserError(f"{option}: {value[:40]!r} is not one of {', '.join(known)}{nearest(value, known)}")


def _list(root: Path, runs: list[Talkable], as_json: bool) -> None:
    if as_json:
        return print_json([run.to_json() for run in runs])
    rows = [[run.id, run.phase, run.direction, f"{run.depth}", "; ".join(run.does.values())] for run in runs]
    if rows:
        show_table(["id", "phase", "direction", "depth", "does"], rows, names=("id",))
        show_sentences(f"Talk to the newest one: bwlm chat {runs[0].id}")
    else:
        show_sentences(f"No run in {address_of(root)} can be talked to yet: bwlm train trains one")
    return None


def _load(root: Path, checkpoint: str) -> tuple[LoadedModel, Voice]:
    """Return a model with its voice; mistakes are reported before torch is loaded."""
    from bwlm.chat.dialogue import Voice
    from bwlm.record.experiment import find_checkpoint

    folder, _ = find_checkpoint(root, checkpoint)
    voice = Voice.from_experiment(folder.config().experiment)
    with loading():
        from bwlm.trained.load import best_device, load_model
    with working(f"loading {checkpoint}"):
        loaded = load_model(root, checkpoint, best_device())
    if loaded.step < loaded.config.steps:
        say(f"{checkpoint}: step {loaded.step:,} of {loaded.config.steps:,}: the model has not finished training")
    return loaded, voice


def _settings(base: Settings, given: dict[str, Any], top_k: int | None) -> Settings:
    """Return settings with what was given in the place of the defaults."""
    from dataclasses import replace

    changed = {name: value for name, value in given.items() if value is not None}
    if top_k is not None:
        changed["top_k"] = top_k or None
    return replace(base, **{"seed": secrets.randbelow(2**31), **changed})


# ---- chat ----


def _talk(
    root: Path, checkpoint: str, reading: str | None, given: dict[str, Any], top_k: int | None
) -> tuple[Talk, LoadedModel]:
    loaded, voice = _load(root, checkpoint)
    from bwlm.chat.dialogue import Dialogue
    from bwlm.chat.settings import Settings
    from bwlm.chat.talk import About, Talk

    experiment, length = loaded.config.experiment, loaded.model.config.sequence_length
    about = About(
        loaded.config.id, loaded.step, experiment.phase, experiment.depth, voice.direction, voice.reversal, length
    )
    first = voice.check(reading or voice.readings[0])
    dialogue = Dialogue(voice, loaded.tokenizer)
    return Talk(about, dialogue, _settings(Settings(), given, top_k), first), loaded


def _converse(talk: Talk, loaded: LoadedModel) -> None:
    from bwlm.chat.engine import Engine
    from bwlm.chat.terminal import Pipe, Screen, converse

    face = Screen() if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()
    face.tell(talk.greeting)
    if isinstance(face, Screen):
        face.tell("/help lists the commands, Ctrl-D leaves.")
    converse(talk, Engine(loaded.model, slots=2), face)


def _one_answer(talk: Talk, loaded: LoadedModel, prompt: str, as_json: bool) -> None:
    from bwlm.chat.engine import Engine
    from bwlm.chat.terminal import Pipe, Screen, answer

    talk.dialogue.say(prompt, talk.reading)
    face = Screen() if sys.stdout.isatty() and not as_json else Pipe(quiet=as_json)
    reply, dropped = answer(talk, Engine(loaded.model, slots=1), face)
    if as_json:
        print_json(
            {
                "id": talk.about.id,
                "direction": talk.reading,
                "rendered_as": "document" if talk.dialogue.voice.on_documents else "conversation",
                "prompt": prompt,
                "text": reply.text,
                "finish_reason": reply.finish,
                "dropped": dropped,
                "seed": talk.settings.seed,
                "usage": reply.usage,
            }
        )


# ---- sample ----


def sample(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="ID[@STEP]",
            help="Base run. ID@400 or ID@best: another checkpoint than its newest.",
            show_default=False,
        ),
    ],
    reading: Annotated[
        str,
        typer.Option(
            help=f"Direction in which it writes: {', '.join(_READINGS)}. {_AUTO} is the one of its training; of two, "
            f"{BASELINE}."
        ),
    ] = _AUTO,
    num_samples: Annotated[int, whole_option("Number of texts.", 1)] = 4,
    prompt: Annotated[
        str, typer.Option(help="Text that it goes on with, or backward writes before. Default: none.")
    ] = "",
    max_tokens: Annotated[int | None, whole_option("Most tokens of a text. Default: 256.", 1)] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a text at this one, which is left out. Repeatable.")
    ] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Let a base model write texts, forward or backward, decoded as one batch.

    By default tokens are drawn from the model's own distribution: temperature 1, no filter. A text ends where the
    model ends the document, at --stop, or after --max-tokens.

    Example: `bwlm sample mine --num-samples 2 --prompt 'The end.' --max-tokens 40`
    """
    from bwlm.record.experiment import find_checkpoint
    from bwlm.storage.opened import open_storage

    root = open_storage(storage)
    _check_one_of("--reading", reading, _READINGS)
    chosen = _reading(checkpoint, find_checkpoint(root, checkpoint)[0].config().experiment, reading)
    loaded, voice = _load(root, checkpoint)
    from bwlm.chat.engine import Engine
    from bwlm.chat.sample import sample as write
    from bwlm.chat.settings import Settings

    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "min_p": min_p, "seed": seed}
    settings = _settings(Settings(temperature=1.0, top_k=None), given, top_k)
    engine = Engine(loaded.model, slots=min(num_samples, _SLOTS), waiting=num_samples)
    with working("writing"):
        samples = write(engine, voice, loaded.tokenizer, prompt, chosen, settings, num_samples, stop or [])
    if samples.dropped:
        told = counted(samples.dropped, "token")
        say(f"{told} of the prompt left out: the model reads {engine.config.sequence_length} at once")
    if as_json:
        return print_json({"id": loaded.config.id, "direction": chosen, "prompt": prompt, **_as_json(samples)})
    return _show_samples(samples, chosen, prompt)


def _reading(checkpoint: str, experiment: Experiment, asked: str) -> str:
    """Return the reading in which a base model writes. Raises `UserError` if it cannot write so."""
    if not PHASES[experiment.phase].reads_documents:
        raise UserError(f"{checkpoint}: a model of conversations ({experiment.phase}): use bwlm chat {checkpoint}")
    readings = DIRECTIONS[experiment.direction].readings
    if asked != _AUTO and asked not in readings:
        raise UserError(f"--reading {asked}: {checkpoint} was trained {experiment.direction} and cannot write {asked}")
    return readings[0] if asked == _AUTO else asked


def _as_json(samples: Samples) -> dict[str, Any]:
    texts = [
        {"text": reply.text, "finish_reason": reply.finish, "seed": reply.request.seed, "usage": reply.usage}
        for reply in samples.replies
    ]
    return {"rendered_as": "document", "dropped": samples.dropped, "samples": texts}


def _show_samples(samples: Samples, reading: str, prompt: str) -> None:
    for number, reply in enumerate(samples.replies, start=1):
        show_heading(f"sample {number}: {reading}, seed {reply.request.seed}, {_ENDS[reply.finish]}")
        show(visible(prompt + reply.text if reading == BASELINE else reply.text + prompt), "")


_ENDS = {"stop": "ended", "length": "cut at the length limit"}
"""Words for the end of a text."""
_SLOTS = 64
"""Most texts that are decoded together."""
