"""`bwlm chat` and `bwlm sample`: runs listed and chosen, one answer, samples as one batch, and mistakes of a line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bwlm.model.generate import generate
from bwlm.text.prepare import Prepared
from bwlm.trained.load import load_model
from tests.runs import ANSWER, Answering, NewFamily, make_run
from tests.shell import Shell, check_mistake

GREEDY = ("--temperature", "0")


@pytest.fixture
def chats(shell: Shell, trained_base: NewFamily, answering: Answering, prepared: Prepared) -> Shell:
    """A shell whose storage holds base runs of both directions, SFT of three kinds, a control and a run that waits."""
    for folder in (
        *map(trained_base, ("forward", "backward", "bidirectional", "permuted")),
        answering("forward", "whole"), answering("backward", "whole"), answering("bidirectional", "whole"),
    ):  # fmt: skip
        shutil.copytree(folder.path, shell.storage / folder.id)
    make_run(prepared, shell.storage, "waiting")
    return shell


def created(shell: Shell, run: str) -> float:
    return float(json.loads((shell.storage / run / "config.json").read_text())["created"])


# ---- which run ----


def test_finished_runs_are_listed_the_newest_first(chats: Shell) -> None:
    listed = chats.json("chat")
    ids = [run["id"] for run in listed]
    assert set(ids) == {
        "forward", "backward", "bidirectional", "forward-whole", "backward-whole", "bidirectional-whole"
    }  # fmt: skip
    assert ids == sorted(ids, key=lambda run: -created(chats, run))
    does = {run["id"]: (run["phase"], run["direction"], run["depth"], run["does"]) for run in listed}
    assert does["backward"] == ("base", "backward", 1, {"backward": "writes what came before your text"})
    both = {"forward": "answers you", "backward": "writes the message that yours answers"}
    assert does["bidirectional-whole"] == ("sft", "bidirectional", 1, both)
    shown = chats("chat")
    assert shown.code == 0
    assert "answers you; writes the message that yours answers" in shown.out
    assert shown.out.endswith(f"Talk to the newest one: bwlm chat {ids[0]}\n")


def test_an_empty_storage_says_what_to_do(shell: Shell) -> None:
    answer = shell("chat")
    assert (answer.code, answer.err) == (0, "")
    assert "can be talked to yet: bwlm train trains one" in answer.out


def test_a_damaged_run_hides_no_other(chats: Shell) -> None:
    (chats.storage / "forward" / "config.json").write_text("{}")
    answer = chats("chat")
    assert answer.code == 0
    assert "forward is left out: " in answer.err
    assert "backward-whole" in answer.out


def test_the_newest_run_of_a_kind_is_taken_and_named(chats: Shell) -> None:
    answer = chats("chat", "--phase", "sft", "--direction", "backward", "--prompt", ANSWER, *GREEDY)
    assert (answer.code, answer.out.strip() != "") == (0, True)
    assert answer.err == "the newest such run: backward-whole\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("chat forwrad", "forwrad: no such experiment in"),
        ("chat forwrad", "(did you mean 'forward'?)"),
        ("chat permuted", "direction permuted: a control, in an order in which nobody writes"),
        ("chat waiting", "waiting"),
        ("chat forward --direction backward", "this model was trained forward and cannot write backward"),
        ("chat forward --direction sideways", "--direction: 'sideways' is not one of forward, backward"),
        ("chat --phase stf", "--phase: 'stf' is not one of base, mid, sft, rl (did you mean 'sft'?)"),
        ("chat --phase rl", "no finished rl run: bwlm chat lists those that can be talked to"),
        ("chat --phase mid --direction backward", "no finished backward mid run"),
        ("chat forward --phase base", "--phase: chooses a run, as ID does: give one of them"),
        ("chat --prompt x", "--prompt: which run is to answer? give its ID, or --phase and --direction"),
        ("chat forward --json", "--json: prints one answer: give the message with --prompt"),
        ("chat forward --prompt x --temperature -1", "temperature must be at least 0 and finite, not -1.0"),
        ("chat forward --prompt x --top-p 1.5", "top_p must be above 0 and at most 1, not 1.5"),
        ("chat forward --prompt x --max-tokens 0", "must be at least 1 (found 0)"),
        ("chat forward --prompt=", "the message is empty: write some text"),
        ("sample forward --reading backward", "--reading backward: forward was trained forward and cannot write back"),
        ("sample forward-whole", "forward-whole: a model of conversations (sft): use bwlm chat forward-whole"),
        ("sample permuted", "direction permuted: a control"),
        ("sample forward --num-samples 0", "must be at least 1 (found 0)"),
    ],
)
def test_a_mistake_is_a_line(chats: Shell, words: str, told: str) -> None:
    check_mistake(chats(*words.split()), told)


# ---- one answer ----


def test_one_answer_is_printed_alone(chats: Shell) -> None:
    assert chats("chat", "forward-whole", "--prompt", "stone window", *GREEDY) == (0, f"{ANSWER}\n", "")


def test_one_answer_as_json(chats: Shell) -> None:
    answer = chats.json("chat", "forward-whole", "--prompt", "stone", "--seed", "3", *GREEDY)
    usage = answer.pop("usage")
    assert answer == {
        "id": "forward-whole",
        "direction": "forward",
        "rendered_as": "conversation",
        "prompt": "stone",
        "text": ANSWER,
        "finish_reason": "stop",
        "dropped": 0,
        "seed": 3,
    }
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    document = chats.json("chat", "backward", "--prompt", "the end.", "--max-tokens", "5", "--seed", "0")
    assert (document["rendered_as"], document["direction"]) == ("document", "backward")
    assert (document["finish_reason"], document["usage"]["completion_tokens"]) in {("length", 5), ("stop", 5)}


def test_a_bidirectional_model_writes_in_the_direction_that_is_asked_for(chats: Shell) -> None:
    forward = chats.json("chat", "bidirectional-whole", "--prompt", "stone", *GREEDY)
    assert (forward["direction"], forward["text"]) == ("forward", ANSWER)
    backward = chats.json("chat", "bidirectional-whole", "--direction", "backward", "--prompt", ANSWER, *GREEDY)
    assert backward["direction"] == "backward"
    assert backward["text"] not in ("", ANSWER)


def test_the_same_seed_gives_the_same_answer(chats: Shell) -> None:
    def answer(seed: int) -> str:
        text = chats.json("chat", "forward", "--prompt", "The", "--seed", f"{seed}", "--max-tokens", "20")["text"]
        assert isinstance(text, str)
        return text

    assert answer(1) == answer(1) != answer(2)


def test_a_talk_works_piped(chats: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("stone\n/quit\nwindow\n"))
    answer = chats("chat", "forward-whole", *GREEDY)
    assert (answer.code, answer.out) == (0, f"{ANSWER}\n")
    assert answer.err == "forward-whole, step 60: sft, depth 1. Forward, it answers you.\n"
    assert "\x1b" not in answer.out + answer.err


# ---- samples ----


def test_samples_are_what_the_model_writes_one_by_one(chats: Shell) -> None:
    loaded = load_model(chats.storage, "backward")
    bos, tokenizer = loaded.tokenizer.bos, loaded.tokenizer
    prompt = [bos, *tokenizer.encode("the river.")[::-1].tolist()]
    banned = frozenset(tokenizer.specials.values()) - {bos}
    [new] = generate(loaded.model, [prompt], 30, stop={bos}, banned=banned, seeds=[0])
    wanted = tokenizer.decode([id for id in new if id != bos][::-1])
    options = ("--prompt", "the river.", "--max-tokens", "30", "--num-samples", "3", *GREEDY)
    document = chats.json("sample", "backward", *options)
    assert [one["text"] for one in document["samples"]] == [wanted] * 3
    shown = chats("sample", "backward", *options, "--seed", "5")
    assert [line for line in shown.out.splitlines() if line.startswith("sample ")] == [
        f"sample {n}: backward, seed {4 + n}, {'ended' if new[-1] == bos else 'cut at the length limit'}"
        for n in (1, 2, 3)
    ]
    assert shown.out.count(f"{wanted}the river.\n") == 3


def test_more_samples_change_none_of_the_first(chats: Shell) -> None:
    def texts(number: int) -> list[str]:
        options = ("--num-samples", f"{number}", "--seed", "2", "--max-tokens", "12")
        return [one["text"] for one in chats.json("sample", "forward", *options)["samples"]]

    five = texts(5)
    assert len(set(five)) > 1
    assert five[:2] == texts(2)


@pytest.mark.parametrize("reading", ["auto", "forward", "backward"])
def test_a_bidirectional_model_samples_in_either_reading(chats: Shell, reading: str) -> None:
    document = chats.json("sample", "bidirectional", "--reading", reading, "--max-tokens", "8", "--seed", "0")
    assert document["direction"] == ("backward" if reading == "backward" else "forward")
    assert len(document["samples"]) == 4
    prompts: set[Any] = {one["usage"]["prompt_tokens"] for one in document["samples"]}
    assert prompts == {2}, "BOS and the marker"


def test_a_stop_text_ends_a_sample(chats: Shell) -> None:
    options = ("--prompt", "The river", "--num-samples", "1", "--max-tokens", "40", *GREEDY)
    [whole] = chats.json("sample", "forward", *options)["samples"]
    stop = whole["text"][10:13]
    [cut] = chats.json("sample", "forward", *options, "--stop", stop)["samples"]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"


def test_a_prompt_that_does_not_fit_is_told(chats: Shell) -> None:
    answer = chats("sample", "backward", "--prompt", "the river " * 60, "--num-samples", "1", "--seed", "0")
    assert answer.code == 0
    assert "tokens of the prompt left out: the model reads 64 at once" in answer.err


def test_an_unfinished_run_says_so(chats: Shell, tmp_path: Path) -> None:
    answer = chats("sample", "forward@8", "--num-samples", "1", "--max-tokens", "4")
    assert answer.code == 0
    assert answer.err == "forward@8: step 8 of 12: the model has not finished training\n"
