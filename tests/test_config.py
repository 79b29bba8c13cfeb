"""Settings: YAML as people write it, and what a person gets told when it is wrong."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from bwlm.config import Experiment, Recipe, Settings
from bwlm.errors import UserError, nearest
from bwlm.format import WHOLE_NUMBERS
from bwlm.plan.spec import Grid
from bwlm.settings_file import (
    Document,
    dump_yaml,
    field_names,
    integer_fields,
    load_yaml,
    override,
    parse_setting,
    parse_yaml,
    validate,
    with_whole_numbers,
)


def value_of(text: str) -> object:
    return parse_yaml(f"value: {text}", "g.yaml").content["value"]


def complaint(text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "g.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- scalars ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("6E4", 6e4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2.5e+1", -25.0),
        ("+7", 7),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("nan", "nan"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'010'", "010"),
        ('"6e-4"', "6e-4"),
        ("[6e-4, 010, yes]", [6e-4, 10, "yes"]),
        ("{a: 1, b: [true]}", {"a": 1, "b": [True]}),
        ("!!python/object/apply:os.system [id]", ["id"]),
    ],
)
def test_scalars_are_read_as_people_mean_them(text: str, value: object) -> None:
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


def test_nan_and_infinity_are_read_so_that_validation_can_refuse_them() -> None:
    assert math.isnan(value_of(".nan"))  # type: ignore[arg-type]
    assert value_of("-.inf") == -math.inf


@settings(deadline=None)
@given(st.one_of(st.floats(allow_nan=False), st.integers(-(10**400), 10**400)))
def test_numbers_survive_being_written_and_read(number: float) -> None:
    text = {math.inf: ".inf", -math.inf: "-.inf"}.get(number, repr(number))
    found = value_of(text)
    assert found == number
    assert type(found) is type(number)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_.-1", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True), _VALUES, max_size=4))
def test_what_is_dumped_is_read_back(content: dict[str, object]) -> None:
    assert parse_yaml(dump_yaml(content), "dumped").content == content


def test_words_that_look_like_numbers_are_dumped_as_words() -> None:
    content = {"a": ["1e5", "010", "yes", "true", "~", "", "0x1F", ".5", "1:2", "=", "a: b", "tab\tnewline\n"]}
    assert parse_yaml(dump_yaml(content), "dumped").content == content


# ---- files ----


def test_duplicate_keys_are_refused_with_both_lines() -> None:
    message = complaint("name: a\nmodel:\n  head_dim: 32\n  sequence_length: 64\n  head_dim: 64\n")
    assert message == "g.yaml:5: model.head_dim: appears twice (first on line 3): keep one"
    assert "first on line 1" in complaint("name: a\n\nname: b\n")


def test_merge_keys_and_keys_that_are_no_words_are_refused() -> None:
    assert complaint("a: 1\n<<: {b: 2}\n") == "g.yaml:2: the name of a field must be a plain word: write name: value"
    assert complaint("a: 1\n? [b, c]\n: 2\n") == "g.yaml:2: the name of a field must be a plain word: write name: value"


def test_aliases_are_refused() -> None:
    """A file of 300 bytes can ask for billions of nodes, and one of ten for a list that holds itself."""
    assert complaint("a: &x [1, 2]\nb: *x\n").startswith("g.yaml:2: not valid YAML (aliases (*x) are not allowed:")
    assert "write the value out" in complaint("a: &x [*x]\n")
    laughs = "\n".join(["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)])
    assert "g.yaml:2" in complaint(laughs)


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "a list"), ("just words\n", "a string"), ("5\n", "5")])
def test_a_file_must_be_a_mapping(text: str, kind: str) -> None:
    assert f"must hold fields (name: value), not {kind}" in complaint(text)


def test_an_empty_file_holds_nothing() -> None:
    assert parse_yaml("", "g.yaml").content == {}
    assert parse_yaml("# only a comment\n", "g.yaml").content == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\naxes: {direction: [forward\n", 3),
        ("name: a\n\tb: 1\n", 2),
        ("a: 1\nb: c: d\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: 'open\n", 2),
    ],
)
def test_bad_syntax_is_told_with_its_line(text: str, line: int) -> None:
    assert complaint(text).startswith(f"g.yaml:{line}: not valid YAML (")


@pytest.mark.parametrize("text", ["a: \x00\n", "a: \x07b\n", "a: " + "[" * 5000])
def test_other_unreadable_text_is_one_line_too(text: str) -> None:
    assert complaint(text).startswith("g.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    for name, words in (("latin.yaml", "not UTF-8 text"), ("absent.yaml", "no such file"), (".", "cannot be read")):
        with pytest.raises(UserError, match=words) as caught:
            load_yaml(tmp_path / name)
        assert str(tmp_path) in str(caught.value)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfname: a\n")
    assert load_yaml(tmp_path / "bom.yaml").content == {"name": "a"}


# ---- --set ----


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("seed=3", "seed", 3),
        ("axes.seed=[0,1]", "axes.seed", [0, 1]),
        ("lr=6e-4", "lr", 6e-4),
        ("data.source=s3://bucket/a=b.parquet", "data.source", "s3://bucket/a=b.parquet"),
        ("data.source=builtin:pydocs", "data.source", "builtin:pydocs"),
        ("model.kv_heads=", "model.kv_heads", None),
        ("also=[{direction: [forward], depth: [2]}]", "also", [{"direction": ["forward"], "depth": [2]}]),
    ],
)
def test_settings_are_read_as_yaml(setting: str, field: str, value: object) -> None:
    assert parse_setting(setting) == (field, value)


@pytest.mark.parametrize("setting", ["seed", "=3", "model.head dim=3", "seed:3", "", "a..b=1", ".a=1", "a.=1"])
def test_a_setting_is_a_field_an_equals_sign_and_a_value(setting: str) -> None:
    with pytest.raises(UserError, match=r"^--set .*: write it as field=value"):
        parse_setting(setting)


def test_a_setting_of_bad_yaml_is_told_as_such() -> None:
    with pytest.raises(UserError, match=r"^--set axes\.seed:1: not valid YAML") as caught:
        parse_setting("axes.seed=[0,1")
    assert "\n" not in str(caught.value)


def overridden(text: str, *changes: str) -> Document:
    return override(parse_yaml(text, "g.yaml"), list(changes))


def test_settings_lie_over_the_file() -> None:
    document = overridden("model: {head_dim: 32}\nseed: 1\n", "model.head_dim=64", "seed=2", "model.kv_heads=1")
    assert document.content == {"model": {"head_dim": 64, "kv_heads": 1}, "seed": 2}


def test_a_later_setting_of_the_same_field_wins() -> None:
    assert overridden("seed: 1", "seed=2", "seed=3").content == {"seed": 3}


def test_a_horizon_replaces_the_files_but_two_are_two() -> None:
    file = "budget: {steps: 5, batch_tokens: 64}"
    assert overridden(file, "budget.tokens=100").content == {"budget": {"tokens": 100, "batch_tokens": 64}}
    both = overridden(file, "budget.tokens=100", "budget.flops=1e9")
    with pytest.raises(UserError, match="found tokens and flops"):
        validate(Recipe, both.content, both)


def test_an_axis_of_a_dotted_field_is_one_name() -> None:
    document = overridden("axes: {seed: [0]}", "axes.optim.kind=[muon, adamw]")
    assert document.content == {"axes": {"seed": [0], "optim.kind": ["muon", "adamw"]}}


def test_the_file_is_left_as_it_was() -> None:
    document = parse_yaml("model: {head_dim: 32}", "g.yaml")
    override(document, ["model.head_dim=64"])
    assert document.content == {"model": {"head_dim": 32}}


def test_a_field_below_a_plain_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"--set model\.head_dim: 'model' is a value and holds no fields: set 'model'"):
        overridden("model: 5", "model.head_dim=64")


def test_dotted_fields_in_a_file() -> None:
    document = parse_yaml("model.head_dim: 32\nmodel: {kv_heads: 1}\n", "g.yaml")
    assert document.content == {"model": {"head_dim": 32, "kv_heads": 1}}
    assert document.where("model.head_dim") == "g.yaml:1: model.head_dim"
    for text in ("model: {head_dim: 64}\nmodel.head_dim: 32", "model.head_dim: 32\nmodel: {head_dim: 64}"):
        assert "model.head_dim: appears twice, dotted and in its section" in complaint(text)
    assert "holds no fields" in complaint("model: 5\nmodel.head_dim: 32")


# ---- validation ----


def refusal(text: str, *changes: str) -> str:
    document = overridden(text, *changes)
    with pytest.raises(UserError) as caught:
        validate(Recipe, document.content, document)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nmodle: {}", "g.yaml:2: modle: unknown field (did you mean 'model'?)"),
        ("model:\n  hed_dim: 8", "g.yaml:2: model.hed_dim: unknown field (did you mean 'head_dim'?)"),
        ("model: {head_dim: 33}", "g.yaml:1: model.head_dim: input should be a multiple of 2 (found 33)"),
        ("model: {head_dim: true}", f"g.yaml:1: model.head_dim: must be {WHOLE_NUMBERS} (found True)"),
        ("model: {head_dim: 64.5}", f"g.yaml:1: model.head_dim: must be {WHOLE_NUMBERS} (found 64.5)"),
        ("optim: {kind: muonn}", "'muonn' is not one of 'muon' or 'adamw' (did you mean 'muon'?)"),
        ("optim: {weight_decay: .nan}", "optim.weight_decay: input should be a finite number (found nan)"),
        ("optim: {weight_decay: 1e999}", "optim.weight_decay: input should be a finite number (found inf)"),
        ("budget: {steps: 5, tokens: 5}", "g.yaml:1: budget: needs exactly one of steps, tokens, flops,"),
        ("budget: {batch_tokens: 64}", "(found none)"),
        ("budget: {tokens: " + "9" * 400 + "}", "budget.tokens: input should be less than or equal"),
        ("budget: {tokens: " + "9" * 9000 + "}", f"budget.tokens: must be {WHOLE_NUMBERS} (found inf)"),
        ("checkpoint: {every: 4, keep_every: 6}", "g.yaml:1: checkpoint.keep_every: must be a multiple of"),
        ("checkpoint: {every: 0, keep_every: 6}", "checkpoint.every (found 6 and 0)"),
        ("checkpoint: {every: 4, keep_best: true}\nevaluation: {every: 3}", "of evaluation.every (found 4 and 3)"),
        ("checkpoint: {keep_best: true}\nevaluation: {every: 0}", "g.yaml:1: checkpoint.keep_best: checkpoints need"),
        ("model: 5", "g.yaml:1: model: "),
        ("data: {source: ''}", "g.yaml:1: data.source: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(text: str, message: str) -> None:
    assert message in refusal(text)


INTEGERS = sorted(integer_fields(Grid))
MILLION = ["1000000", "1e6", "1E+6", "1.0e6", "1000000.0", "1_000_000", "'1e6'", "'1000000'", "'1_000_000'"]


def test_the_integer_fields_are_those_of_the_json_schema() -> None:
    schema = Grid.model_json_schema()

    def below(properties: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, one in properties.items():
            if "$ref" in one:
                yield from below(schema["$defs"][one["$ref"].rpartition("/")[2]]["properties"], f"{prefix}{name}.")
            elif "integer" in [kind.get("type") for kind in one.get("anyOf", [one])]:
                yield prefix + name

    assert sorted(below(schema["properties"])) == INTEGERS
    assert {"seed", "depth", "budget.tokens", "rl.top_k", "launch.retries", "scheduler.grace_steps"} < set(INTEGERS)


def nested(content: Any, field: str) -> Any:
    return functools.reduce(lambda inner, name: inner[name], field.split("."), content)


@pytest.mark.parametrize("field", INTEGERS)
def test_every_integer_field_takes_a_whole_number_in_any_form(field: str) -> None:
    for written in MILLION:
        for document in (parse_yaml(f"{field}: {written}", "g.yaml"), overridden("", f"{field}={written}")):
            value = nested(with_whole_numbers(document, Grid).content, field)
            assert (value, type(value)) == (1_000_000, int), written
    for written in ("1.5", "1e-3", "many", "true", ".inf", "'1.5'", "1e999", "1__0"):
        document = with_whole_numbers(parse_yaml(f"{field}: {written}\nname: g\naxes: {{}}", "g.yaml"), Grid)
        with pytest.raises(UserError, match=rf"^g\.yaml:1: {re.escape(field)}: must be a whole number, such as 2000"):
            validate(Grid, document.content, document)


def test_a_number_in_a_field_of_another_kind_stays_as_it_is() -> None:
    text = "name: 2024_01\nlr: 1e0\ndata: {source: '1e3'}\naxes: {data.source: ['1e3'], lr: [1.0], seed: ['1e0']}"
    content = with_whole_numbers(parse_yaml(text, "g.yaml"), Grid).content
    assert content["axes"] == {"data.source": ["1e3"], "lr": [1.0], "seed": [1]}
    assert (content["name"], content["data"]["source"], type(content["lr"])) == ("2024_01", "1e3", float)


def test_an_unknown_field_with_no_near_name_lists_the_known_ones() -> None:
    assert refusal("optim: {zzz: 1}").endswith(
        "unknown field (known: init_lr_frac, kind, weight_decay, warmup_steps, warmdown_ratio, final_lr_frac, "
        "grad_clip)"
    )


def test_a_misspelt_field_is_told_before_the_field_that_is_missing_for_it() -> None:
    document = parse_yaml("dept: 4\ndirection: forward\n", "e.yaml")
    with pytest.raises(UserError, match=r"^e\.yaml:1: dept: unknown field \(did you mean 'depth'\?\)$"):
        validate(Experiment, document.content, document)


def test_a_fault_on_the_command_line_is_not_blamed_on_the_file() -> None:
    file = "model:\n  head_dim: 32\n"
    assert refusal(file, "model.head_dim=x").startswith("--set model.head_dim: must be a whole number")
    assert refusal(file, "model.hed_dim=3") == "--set model.hed_dim: unknown field (did you mean 'head_dim'?)"
    assert refusal(file, "modle.head_dim=3") == "--set modle.head_dim: modle: unknown field (did you mean 'model'?)"
    assert refusal("model:\n  head_dim: 33\n", "model.kv_heads=1").startswith("g.yaml:2: model.head_dim: ")


def test_a_missing_field_is_told() -> None:
    document = parse_yaml("depth: 4\n", "e.yaml")
    with pytest.raises(UserError, match=r"^e\.yaml: direction: missing: add it$"):
        validate(Experiment, document.content, document)


def test_settings_cannot_be_changed() -> None:
    experiment = Experiment(direction="forward", depth=2)
    with pytest.raises(ValueError, match="frozen"):
        experiment.depth = 3  # type: ignore[misc]


def test_every_settings_class_is_strict() -> None:
    def below(model: type[BaseModel]) -> set[type[BaseModel]]:
        inner = [info.annotation for info in model.model_fields.values()]
        found = {i for i in inner if isinstance(i, type) and issubclass(i, BaseModel)}
        return found | {model} | {deeper for i in found for deeper in below(i)}

    sections = below(Experiment)
    assert len(sections) > 8
    for section in sections:
        assert issubclass(section, Settings)
        expected = {"frozen": True, "strict": True, "extra": "forbid", "allow_inf_nan": False}
        assert expected.items() <= section.model_config.items()


def test_field_names_are_dotted() -> None:
    names = list(field_names(Experiment))
    assert {"direction", "depth", "model", "model.head_dim", "budget.batch_tokens"} <= set(names)
    assert len(names) == len(set(names))


def test_nearest() -> None:
    assert nearest("sed", ["seed", "depth"]) == " (did you mean 'seed'?)"
    assert nearest("zzz", ["seed", "depth"]) == ""
    assert nearest("seed", []) == ""
