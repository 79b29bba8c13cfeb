"""Identity: everything that changes a run's result is in it, and nothing that says where or how fast it runs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from bwlm.config import Experiment, TaskSettings
from bwlm.record.fingerprint import differences, fingerprint, identity, inherited
from bwlm.record.lineage import ParentLink

# validated where it is saved, so that every rule of what is kept may be asked for
BASE = Experiment.model_validate({"direction": "forward", "depth": 2, "evaluation": {"every": 50}})
CHILD = Experiment.model_validate(
    {"phase": "rl", "direction": "forward", "depth": 2, "parent": "p", "data": {"mixture": {"builtin:arithmetic": 1.0}}}
)
GIVEN: dict[str, Any] = {"data": "d1", "tokenizer": "t1", "precision": "float32", "steps": 100}

# Every field of an experiment, with a value that is not the default's. A new field must be put into one of these.
CHANGES_THE_RESULT: dict[str, Any] = {
    "direction": "backward",
    "depth": 3,
    "lr": 0.5,
    "seed": 1,
    "tokenizer.vocab_size": 512,
    "model.sequence_length": 64,
    "model.head_dim": 32,
    "model.kv_heads": 1,
    "model.document_mask": False,
    "optim.init_lr_frac": 0.5,
    "optim.kind": "adamw",
    "optim.weight_decay": 0.1,
    "optim.warmup_steps": 3,
    "optim.warmdown_ratio": 0.2,
    "optim.final_lr_frac": 0.0,
    "optim.grad_clip": 0.0,
    "budget.batch_tokens": 4096,
    "evaluation.every": 7,
    "evaluation.tokens": 99,
}
OF_RL: dict[str, Any] = {
    "rl.prompts": 3,
    "rl.samples": 4,
    "rl.new_tokens": 5,
    "rl.temperature": 0.5,
    "rl.top_k": 6,
    "rl.validation": 7,
}
SAYS_WHERE_OR_HOW_FAST: dict[str, Any] = {
    "data.source": "elsewhere",  # its digest is what counts
    "data.text_column": "content",
    "data.validation": "held-out",
    "data.shuffle": False,
    "tokenizer.path": "elsewhere",
    "budget.steps": 5,  # the resolved steps are what counts
    "budget.tokens": 5,
    "budget.flops": 5.0,
    "budget.tokens_per_parameter": 5.0,
    "evaluation.tasks": ["arc_easy"],  # they score what was trained
    "evaluation.max_examples": 5,
    "checkpoint.every": 3,
    "checkpoint.keep": 9,
    "research_log.scalars": 2,
    "research_log.tokens": 2,
    "research_log.gradients": 2,
    "research_log.activations": 2,
    "research_log.validation": False,
    "research_log.attention": False,
    "research_log.representations": 2,
    "compute.precision": "float32",  # the resolved precision is what counts
    "compute.device_batch_size": 3,
    "resources.workers": 4,
    "resources.cpus_per_worker": 2,
    "resources.gpus_per_worker": 1,
    "compute.attention": "sdpa",
    "compute.fused_loss": False,
    "compute.compile": True,
    "checkpoint.keep_best": True,
    "checkpoint.keep_every": 300,
    "data.mixture": {"gsm8k": 1.0},  # its digest is what counts
    "data.skip_invalid": True,  # of conversations; their digest is what counts
    "data.reversal": "turns",  # of conversations, which a base run has none of
    "tasks": {"gsm8k": TaskSettings(path="elsewhere")},
    "parent": "another",  # its weights are what counts
    "differs": ["direction"],  # the direction itself is what counts
}


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= leaves(inner, f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def changed(field: str, value: Any, base: Experiment = BASE) -> Experiment:
    content = base.model_dump()
    section, _, name = field.rpartition(".")
    part = content[section] if section else content
    if section == "budget" and name != "batch_tokens":
        part["tokens_per_parameter"] = None
    assert part[name] != value, "not a change"
    part[name] = value
    return Experiment.model_validate(content)


def print_of(experiment: Experiment, **given: Any) -> str:
    return fingerprint(identity(experiment, **GIVEN | given))


def test_every_field_has_been_decided() -> None:
    decided = CHANGES_THE_RESULT.keys() | SAYS_WHERE_OR_HOW_FAST.keys() | OF_RL.keys() | {"phase"}
    assert leaves(Experiment) == decided
    assert "phase" in identity(BASE, **GIVEN)
    assert not CHANGES_THE_RESULT.keys() & SAYS_WHERE_OR_HOW_FAST.keys()


@pytest.mark.parametrize(("field", "value"), CHANGES_THE_RESULT.items())
def test_what_changes_the_result_changes_the_fingerprint(field: str, value: Any) -> None:
    other = changed(field, value)
    assert print_of(other) != print_of(BASE)
    told = differences(identity(BASE, **GIVEN), identity(other, **GIVEN))
    assert f"{value}" in " ".join(told)


@pytest.mark.parametrize(("field", "value"), SAYS_WHERE_OR_HOW_FAST.items())
def test_what_says_where_or_how_fast_does_not(field: str, value: Any) -> None:
    of_children = field in ("data.mixture", "parent", "differs")
    base = CHILD if of_children else BASE
    if field == "data.mixture":  # of RL, whose rewards are its tasks' code, it counts
        assert print_of(changed(field, value, base)) != print_of(base)
        base = Experiment.model_validate(base.model_dump() | {"phase": "sft"})
    assert print_of(changed(field, value, base)) == print_of(base)


@pytest.mark.parametrize(("field", "value"), OF_RL.items())
def test_what_rl_is_changes_the_fingerprint_of_rl_alone(field: str, value: Any) -> None:
    assert print_of(changed(field, value, CHILD)) != print_of(CHILD)
    assert print_of(changed(field, value)) == print_of(BASE)


def test_a_childs_identity_holds_its_parents_weights_and_how_they_were_made() -> None:
    parents = {
        name: identity(Experiment.model_validate({"depth": 2, **settings}), **GIVEN)
        for name, settings in {
            "forward": {"direction": "forward"},
            "backward": {"direction": "backward", "lr": 2.0},
            "other seed": {"direction": "forward", "seed": 1},
            "other text": {"direction": "forward", "model": {"head_dim": 32}},
        }.items()
    }
    links = {name: ParentLink(name, "base", "step_000100", 100, f"sha of {name}") for name in parents}
    of = {name: inherited(parent, links[name]) for name, parent in parents.items()}
    assert len({print_of(CHILD, parent=fields) for fields in of.values()}) == 4
    assert differences(of["forward"], of["backward"]) == ["parent: sha of forward -> sha of backward"]
    assert [line.split(":")[0] for line in differences(of["forward"], of["other seed"])] == ["parent", "parent_seed"]
    assert [line.split(":")[0] for line in differences(of["forward"], of["other text"])] == ["parent", "parent_recipe"]
    assert print_of(changed("data.reversal", "turns", CHILD)) != print_of(CHILD)


def test_runs_are_compared_where_they_began_from_the_same_checkpoint_or_each_from_its_best() -> None:
    """The rule counts, as for learning rates: the best ones of two directions may be of different steps."""
    parent = identity(BASE, **GIVEN)

    def begun(step: int, best: bool = False) -> dict[str, Any]:
        return inherited(parent, ParentLink("p", "base", f"step_{step:06d}", step, "sha", best=best))

    assert begun(100).keys() == {"parent", "parent_seed", "parent_recipe"}, "as in earlier versions"
    assert differences(begun(50, best=True), begun(75, best=True)) == []
    assert differences(begun(50), begun(75)) == ["parent_checkpoint: step 50 -> step 75"]
    assert differences(begun(100), begun(100, best=True)) == ["parent_checkpoint: None -> best"]


@pytest.mark.parametrize("name", GIVEN)
def test_resolved_things_change_it(name: str) -> None:
    assert print_of(BASE, **{name: 101 if name == "steps" else "other"}) != print_of(BASE)


def test_it_is_the_same_in_every_process() -> None:
    fields = {"b": 1, "a": [1.5, None, True], "c": "é"}
    # the start of: printf '{"a": [1.5, null, true], "b": 1, "c": "\\u00e9"}' | sha256sum
    assert fingerprint(fields) == fingerprint(dict(reversed(fields.items()))) == "16d13ff115ab4cc4"
    assert print_of(BASE) == print_of(Experiment.model_validate_json(BASE.model_dump_json()))


def test_it_refuses_what_it_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint({"a": float("nan")})
    with pytest.raises(TypeError):
        fingerprint({"a": object()})


def test_differences_name_field_old_and_new() -> None:
    old, new = {"lr": 0.5, "depth": 2, "gone": 1}, {"lr": 1.0, "depth": 2, "added": None}
    assert differences(old, new) == ["gone: 1 -> None", "lr: 0.5 -> 1.0"]
    assert differences(old, dict(old)) == []
