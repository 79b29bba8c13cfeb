"""Tiny runs that any test may train, in this process or in others."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bwlm.config import Experiment
from bwlm.model.compute import Compute
from bwlm.record.checkpoint import load_newest
from bwlm.record.experiment import ExperimentFolder
from bwlm.record.fingerprint import identity, inherited
from bwlm.record.journal import read_journal
from bwlm.record.parent import link_to
from bwlm.record.run_config import RunConfig
from bwlm.settings_file import Document
from bwlm.text.batches import Batch, DirectedPlan
from bwlm.text.mixture import ConversationSource, prepare_mixture
from bwlm.text.prepare import Prepared
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from tasks import TASKS

STEPS = 12
NewRun = Callable[..., ExperimentFolder]
NewFamily = Callable[[str], ExperimentFolder]
NewChild = Callable[..., ExperimentFolder]
Answering = Callable[[str, str], ExperimentFolder]


def in_process(plan: DirectedPlan, first: int, last: int) -> Iterator[Batch]:
    return plan.batches(first, last)


def compute_of(experiment: Experiment) -> Compute:
    asked = experiment.compute
    return Compute(
        "float32" if asked.precision == "auto" else asked.precision,
        "sdpa" if asked.attention == "auto" else asked.attention,
        0 if asked.fused_loss is False else 64,
        bool(asked.compile),
        asked.device_batch_size or 8,
        1,
    )


def make_run(prepared: Prepared, storage: Path, name: str, **settings: Any) -> ExperimentFolder:
    """Makes `storage/name`, waiting, with settings over a tiny default; `section__field` sets one of a section."""
    content: dict[str, Any] = {
        "direction": "forward",
        "depth": 1,
        "lr": 1.0,
        "seed": 0,
        "tokenizer": {"vocab_size": prepared.tokenizer.vocab_size},
        "model": {"sequence_length": prepared.manifest.sequence_length, "head_dim": 32},
        "budget": {"steps": STEPS, "batch_tokens": 512},
        "evaluation": {"every": 5, "tokens": 1024},
        "checkpoint": {"every": 4, "keep": 3},
        "research_log": {},
    }
    for field, value in settings.items():
        section, _, inner = field.partition("__")
        content[section] = content[section] | {inner: value} if inner else value
    experiment = Experiment.model_validate(content)
    steps = experiment.budget.steps
    assert steps is not None
    compute = compute_of(experiment)
    digests = {"data": prepared.manifest.digest, "tokenizer": prepared.tokenizer.digest}
    folder = ExperimentFolder(storage, name)
    folder.keep_tokenizer(prepared.tokenizer_folder)
    folder.create(
        RunConfig(
            id=name,
            experiment=experiment,
            identity=identity(experiment, **digests, precision=compute.precision, steps=steps),
            steps=steps,
            compute=compute,
            corpus=str(prepared.folder),
            tokenizer=str(prepared.tokenizer_folder),
        )
    )
    return folder


@pytest.fixture
def new_run(prepared: Prepared, tmp_path: Path) -> NewRun:
    """(name, **settings) -> a run that waits, in this test's own storage."""

    def make(name: str = "run", **settings: Any) -> ExperimentFolder:
        return make_run(prepared, tmp_path, name, **settings)

    return make


# ---- runs that begin from others ----

CHILD: dict[str, Any] = {
    "lr": 4.0,
    "optim": {"init_lr_frac": 1.0},
    "budget": {"steps": STEPS},
    "evaluation": {"every": 5, "tokens": 1024},
    "checkpoint": {"every": 4, "keep": 3},
    "rl": {"prompts": 2, "samples": 4, "new_tokens": 6, "validation": 5},
}


def make_child(
    parent: ExperimentFolder, phase: str, mixture: Prepared, name: str = "", at: str = "", **settings: Any
) -> ExperimentFolder:
    """Makes a run of `phase` beside the finished run that it begins from, as a launch would; waiting.

    Settings go over a tiny default, as in `make_run`. It begins from the last checkpoint, or from `parent@at`.
    """
    from bwlm.plan.inherit import inherit, with_defaults  # the room sets this process' environment for Ray

    content: dict[str, Any] = dict(CHILD) | {"phase": phase}
    content["data"] = {"mixture": {source.name: source.weight for source in mixture.manifest.sources}}
    for field, value in settings.items():
        section, _, inner = field.partition("__")
        content[section] = content.get(section, {}) | {inner: value} if inner else value
    above, named = parent.config(), f"{parent.id}@{at}" if at else parent.id
    document = Document("test", content, {})
    experiment = Experiment.model_validate(inherit(with_defaults(content, phase), named, above.experiment, document))
    steps, compute = experiment.budget.steps, compute_of(experiment)
    assert steps is not None
    folder = ExperimentFolder(parent.path.parent, name or f"{parent.id}-{phase}")
    link = link_to(parent.path.parent, named, phase, folder.id)
    fields = identity(
        experiment,
        data=mixture.manifest.digest,
        tokenizer=mixture.tokenizer.digest,
        precision=compute.precision,
        steps=steps,
        parent=inherited(above.identity, link),
    )
    corpus, tokenizer = str(mixture.folder), str(mixture.tokenizer_folder)
    folder.keep_tokenizer(mixture.tokenizer_folder)
    folder.create(RunConfig(folder.id, experiment, fields, steps, compute, corpus, tokenizer), link)
    return folder


@pytest.fixture(scope="session")
def trained_base(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> NewFamily:
    """(direction) -> a finished base run, trained once. Read only."""
    storage = tmp_path_factory.mktemp("bases")
    trained: dict[str, ExperimentFolder] = {}

    def base(direction: str) -> ExperimentFolder:
        if direction not in trained:
            folder = make_run(prepared, storage, direction, direction=direction, lr=4.0)
            assert run_phase(folder, LocalSession(), in_process).state == "finished"
            trained[direction] = folder
        return trained[direction]

    return base


@pytest.fixture
def new_family(trained_base: NewFamily, tmp_path: Path) -> NewFamily:
    """(direction) -> a finished base run in this test's own storage, for children beside it."""

    def copied(direction: str) -> ExperimentFolder:
        folder = ExperimentFolder(tmp_path, direction)
        if not folder.exists():
            shutil.copytree(trained_base(direction).path, folder.path)
        return folder

    return copied


def exchanges(words: Callable[[random.Random, int], str], seed: int, count: int) -> list[list[dict[str, str]]]:
    """Conversations of one or two exchanges."""
    rng = random.Random(seed)
    roles = [("user", "assistant") * rng.randint(1, 2) for _ in range(count)]
    return [[{"role": role, "content": words(rng, rng.randint(1, 5))} for role in talk] for talk in roles]


@pytest.fixture(scope="session")
def mixture_for(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    """(phase) -> conversations: of words as in the tests' corpus, and sums, differences and products; for rl these.

    Read only.
    """
    from tests.conftest import english, run_here  # which reads this module

    held = {"train": exchanges(english, 0, 120), "validation": exchanges(english, 1, 40)}
    arithmetic = TASKS["builtin:arithmetic"]
    talks = ConversationSource("talks.jsonl", 1.0, "7a1c50" + "0" * 10, lambda split: iter(held[split]))
    sums = ConversationSource("builtin:arithmetic", 0.5, arithmetic.key(), arithmetic.conversations)
    storage = tmp_path_factory.mktemp("mixtures")

    def mixture(phase: str) -> Prepared:
        sources = [sums] if phase == "rl" else [talks, sums]
        width, folder = prepared.manifest.sequence_length, prepared.tokenizer_folder
        return prepare_mixture(sources, folder, width, phase != "mid", storage, run_here, lambda _: None)

    return mixture


@pytest.fixture
def new_child(mixture_for: Callable[[str], Prepared]) -> NewChild:
    """(parent, phase, name, **settings) -> a run that waits, on the tests' conversations."""

    def make(parent: ExperimentFolder, phase: str, name: str = "", **settings: Any) -> ExperimentFolder:
        return make_child(parent, phase, mixture_for(phase), name, **settings)

    return make


_QUESTIONS = ["the", "river", "stone", "window", "letter", "morning", "captain", "garden", "answer", "shadow"]
"""Words of the questions, of one to six of them, that all have one answer."""
ANSWER = "the river"


def one_answer(seed: int, count: int) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)
    questions = [" ".join(rng.choices(_QUESTIONS, k=rng.randint(1, 6))) for _ in range(count)]
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": ANSWER}] for q in questions]


@pytest.fixture(scope="session")
def answering(trained_base: NewFamily, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Answering:
    """(direction, reversal) -> a finished SFT that has learnt `ANSWER`, or to ask for it, trained once. Read only."""
    from tests.conftest import run_here  # which reads this module

    held = {"train": one_answer(0, 200), "validation": one_answer(1, 40)}
    source = ConversationSource("talks.jsonl", 1.0, "7a1c51" + "0" * 10, lambda split: iter(held[split]))
    width, folder = prepared.manifest.sequence_length, prepared.tokenizer_folder
    mixtures = tmp_path_factory.mktemp("talks")
    mixture = prepare_mixture([source], folder, width, True, mixtures, run_here, lambda _: None)

    def trained(direction: str, reversal: str) -> ExperimentFolder:
        base = trained_base(direction)
        child = ExperimentFolder(base.path.parent, f"{direction}-{reversal}")
        if not child.exists():
            given = {"differs": ["reversal"]} if reversal == "turns" else {}
            make_child(
                base, "sft", mixture, child.id, data__reversal=reversal, budget__steps=60, budget__batch_tokens=1024,
                **given,
            )  # fmt: skip
            status = run_phase(child, LocalSession(), in_process)
            assert status.state == "finished", status.reason
        return child

    return trained


def losses(folder: ExperimentFolder) -> list[float]:
    return [entry.metrics["train_loss"] for entry in read_journal(folder.path)]


def weights_digest(folder: ExperimentFolder) -> str:
    checkpoint = load_newest(folder.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    digest = hashlib.sha256()
    for tensors in (checkpoint.model, checkpoint.optimizer):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()
