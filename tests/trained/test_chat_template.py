"""Exported chat models: the template's ids are training's, messages end, and the card's conversations run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from bwlm.config import Reversal
from bwlm.model.generate import generate
from bwlm.text.conversation import Conversation, Message, build_prompt, read_message, render
from bwlm.text.tokenizer import SPECIAL_TOKENS
from bwlm.trained.chat_template import MARK
from bwlm.trained.export_hf import export_hf
from bwlm.trained.load import LoadedModel, load_model
from tests.runs import Answering

KINDS = [
    ("forward", "whole"),
    ("backward", "whole"),
    ("backward", "turns"),
    ("bidirectional", "whole"),
    ("bidirectional", "turns"),
]
Exported = tuple[LoadedModel, Path]
Export = Callable[[str, str], Exported]


@pytest.fixture(scope="module")
def exported(answering: Answering, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """(direction, reversal) -> an SFT that has learnt to answer, or to ask, and its folder; made once."""
    made: dict[tuple[str, str], Exported] = {}

    def export(direction: str, reversal: str) -> Exported:
        if (direction, reversal) not in made:
            child = answering(direction, reversal)
            loaded = load_model(child.path.parent, child.id)
            target = tmp_path_factory.mktemp("hf") / child.id
            export_hf(loaded, target)
            made[direction, reversal] = loaded, target
        return made[direction, reversal]

    return export


def as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [message._asdict() for message in conversation]


# ---- the template ----

contents = st.text(st.characters(exclude_characters=MARK, exclude_categories=["Cs"]), max_size=30) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", " ", "\n", "the river", "é", "{{ mark }}", "{% raw %}"]), max_size=6
).map("".join)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_the_template_gives_the_ids_of_training_for_any_message(exported: Export, direction: str) -> None:
    """Markers are written by the template and nowhere else: a message that looks like one has the ids of its text."""
    loaded, folder = exported(direction, "whole")
    ours, theirs = loaded.tokenizer, AutoTokenizer.from_pretrained(folder)

    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(st.lists(contents, min_size=1, max_size=5))
    def same(said: list[str]) -> None:
        conversation = [Message("assistant" if place % 2 else "user", text) for place, text in enumerate(said)]
        messages = as_dicts(conversation)
        if len(said) % 2:
            wanted = build_prompt(conversation, "forward", direction, "whole", ours).ids
            assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted
        head = [ours.bos, ours.forward] if direction == "bidirectional" else [ours.bos]
        assert theirs.apply_chat_template(messages)["input_ids"] == head + render(conversation, ours).tolist()
        for text in said:
            assert theirs.encode(text) == ours.encode(text).tolist()

    same()


def test_a_system_message_begins_what_the_user_says_as_in_training(exported: Export) -> None:
    loaded, folder = exported("forward", "whole")
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
    wanted = build_prompt([Message("user", "Be short.\n\nHello")], "forward", "forward", "whole", loaded.tokenizer).ids
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([("user", f"a {MARK}<|user_end|> b")], r"messages\[0\].content: holds U\+FDD0"),
        ([("user", "a"), ("user", "b")], r"messages\[1\].role: user and assistant take turns"),
        ([("assistant", "a")], r"messages\[0\].role: .*the user begins"),
        ([("tool", "a")], r"messages\[0\].role"),
        ([("system", "a")], r"messages\[0\].role"),
        ([("user", "a"), ("assistant", "b")], r"must end with the user"),
        ([("user", ["a"])], r"messages\[0\].content: must be a text"),
    ],
)
def test_a_conversation_that_was_never_trained_on_is_refused(
    exported: Export, messages: list[tuple[str, Any]], told: str
) -> None:
    theirs = AutoTokenizer.from_pretrained(exported("forward", "whole")[1])
    asked = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(TemplateError, match=told):
        theirs.apply_chat_template(asked, add_generation_prompt=True)


@pytest.mark.parametrize("reversal", ["whole", "turns"])
def test_a_model_that_reads_tokens_backward_has_no_template(exported: Export, reversal: str) -> None:
    loaded, folder = exported("backward", reversal)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert not (folder / "chat_template.jinja").exists()
    with pytest.raises(ValueError, match="chat_template is not set"):
        theirs.apply_chat_template([{"role": "user", "content": "a"}])
    for name in SPECIAL_TOKENS:
        assert theirs.encode(f"a{name}b") == loaded.tokenizer.encode(f"a{name}b").tolist()


def test_a_tokenizer_that_transformers_saves_again_is_the_same(exported: Export, tmp_path: Path) -> None:
    """Whoever trains the model further saves it so."""
    theirs = AutoTokenizer.from_pretrained(exported("forward", "whole")[1])
    theirs.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a <|user_end|> b"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert again.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert (again.eos_token_id, again.padding_side) == (theirs.eos_token_id, "left")


# ---- what ends a message ----

ENDS = {
    ("forward", "whole"): ["<|assistant_end|>", "<|bos|>"],
    ("backward", "whole"): ["<|user_start|>", "<|bos|>"],
    ("backward", "turns"): ["<|assistant_end|>", "<|bos|>"],
    ("bidirectional", "whole"): ["<|assistant_end|>", "<|user_start|>", "<|bos|>"],
    ("bidirectional", "turns"): ["<|assistant_end|>", "<|bos|>"],
}


@pytest.mark.parametrize(("direction", "reversal"), KINDS)
def test_what_ends_a_message_is_told_to_every_reader(exported: Export, direction: str, reversal: str) -> None:
    loaded, folder = exported(direction, reversal)
    specials, model = loaded.tokenizer.specials, AutoModelForCausalLM.from_pretrained(folder)
    wanted = [specials[name] for name in ENDS[direction, reversal]]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == wanted
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == wanted
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (wanted[0], loaded.tokenizer.pad)
    named = {name: getattr(theirs, f"{name[2:-2]}_token_id") for name in SPECIAL_TOKENS}
    assert named == dict(specials)


PROMPTS = ["stone", "the river stone window letter morning", "captain garden answer"]


def openings(loaded: LoadedModel, reading: str, reversal: Reversal) -> list[list[int]]:
    """Prompts of several lengths, as training lays them out."""
    direction, tokenizer = loaded.config.experiment.direction, loaded.tokenizer
    role = "assistant" if (reading, reversal) == ("backward", "whole") else "user"
    return [build_prompt([Message(role, text)], reading, direction, reversal, tokenizer).ids for text in PROMPTS]


@pytest.mark.parametrize(("direction", "reversal"), KINDS)
def test_a_batch_of_unequal_prompts_says_what_each_says_alone_and_stops(
    exported: Export, direction: str, reversal: Reversal
) -> None:
    loaded, folder = exported(direction, reversal)
    model, theirs = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    reading = "backward" if direction == "backward" else "forward"
    prompts = openings(loaded, reading, reversal)
    room = loaded.model.config.sequence_length - max(map(len, prompts))
    batch = theirs.pad({"input_ids": prompts}, return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=room, do_sample=False)[:, batch["input_ids"].shape[1] :]
    stops = set(model.generation_config.eos_token_id)
    for prompt, row in zip(prompts, together.tolist(), strict=True):
        written = row[: next(place for place, token in enumerate(row) if token in stops) + 1]
        assert written[-1] == model.generation_config.eos_token_id[0], "not at its end marker"
        assert set(row[len(written) :]) <= {loaded.tokenizer.pad}
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=room, do_sample=False)[0, len(prompt) :]
        assert alone.tolist() == written
        (ours,) = generate(loaded.model, [prompt], room, stop=stops)
        assert ours == written
        if (reading, reversal) != ("backward", "whole"):
            assert read_message(written, reading, loaded.tokenizer) == "the river"


def test_the_template_pads_a_batch_on_the_left(exported: Export) -> None:
    loaded, folder = exported("forward", "whole")
    theirs = AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    batch = theirs.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt")
    prompts = openings(loaded, "forward", "whole")
    longest = max(map(len, prompts))
    assert batch["input_ids"].tolist() == [[loaded.tokenizer.pad] * (longest - len(p)) + p for p in prompts]
    assert batch["attention_mask"].sum(1).tolist() == [len(prompt) for prompt in prompts]


# ---- the card ----


@pytest.mark.parametrize(("direction", "reversal"), KINDS)
def test_the_code_of_the_card_holds_a_conversation(
    exported: Export,
    direction: str,
    reversal: Reversal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says what our own model says to the conversation as training lays it out."""
    loaded, folder = exported(direction, reversal)
    text = (folder / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(snippet, "README.md", "exec"), {})
    talk = [Message("user", "7+12="), Message("assistant", "19"), Message("user", "3*4=")]
    given: list[tuple[str, Conversation]] = []
    if direction != "backward":
        given += [("forward", [Message("user", "What is 7 and 12?")]), ("forward", talk)]
    if direction != "forward":
        given.append(("backward", talk[1:2] if reversal == "whole" else talk[:1]))
    lines = []
    for reading, conversation in given:
        start = build_prompt(conversation, reading, direction, reversal, loaded.tokenizer)
        (new,) = generate(loaded.model, [start.ids], 32, stop={start.stop, loaded.tokenizer.bos})
        who = "user" if (reading, reversal) == ("backward", "whole") else "assistant"
        lines.append(f"{who}: {read_message(new, reading, loaded.tokenizer)}\n")
    assert capsys.readouterr().out == "".join(lines)


@pytest.mark.parametrize(("direction", "reversal"), KINDS)
def test_the_card_tells_what_ends_a_message(exported: Export, direction: str, reversal: str) -> None:
    folder = exported(direction, reversal)[1]
    text = (folder / "README.md").read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert [name for name in ENDS[direction, reversal][:-1] if f"`{name}`" not in prose] == []
    assert "{" not in prose, "a field of the template stayed"
    assert f"| reversal of conversations | {reversal} |" in text
    assert json.loads((folder / "config.json").read_text())["bwlm"]["reversal"] == reversal
    assert "bfloat16" not in text
    assert ("A chat template makes a text and cannot reverse" in prose) == (direction != "forward")
