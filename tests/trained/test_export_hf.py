"""An exported folder: transformers' own model says what ours says, the card's code runs, and mistakes leave nothing."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM

from bwlm.cli import main
from bwlm.errors import UserError
from bwlm.model.generate import generate
from bwlm.record.checkpoint import step_folder
from bwlm.text.direction import arrange
from bwlm.train.run import run_phase
from bwlm.train.session import LocalSession
from bwlm.trained.export_hf import export_hf
from bwlm.trained.load import LoadedModel, load_model
from tests.runs import NewChild, NewFamily, NewRun, in_process
from tests.trained.conftest import STEPS

DIRECTIONS = ("forward", "backward", "bidirectional", "permuted")
FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
}  # fmt: skip

Exported = tuple[LoadedModel, Path]


@pytest.fixture(scope="module")
def exported(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The run of a direction and its exported folder, made once."""
    made: dict[str, Exported] = {}

    def export(direction: str) -> Exported:
        if direction not in made:
            loaded, folder = load_model(storage, direction), tmp_path_factory.mktemp("hf") / direction
            export_hf(loaded, folder)
            made[direction] = loaded, folder
        return made[direction]

    return export


def some_ids(loaded: LoadedModel, rows: int, length: int) -> torch.Tensor:
    """Rows that begin as in training, and go on with any ids."""
    ids = torch.randint(loaded.tokenizer.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = loaded.tokenizer.bos
    return ids


# ---- the model ----


@pytest.mark.parametrize("direction", DIRECTIONS)
@torch.no_grad()
def test_transformers_gives_the_same_logits(exported: Callable[[str], Exported], direction: str) -> None:
    loaded, folder = exported(direction)
    theirs, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is NanoChatForCausalLM
    assert theirs.dtype == torch.float32
    assert not any(told.values()), told
    ids = some_ids(loaded, rows=4, length=loaded.model.config.sequence_length)
    ours = loaded.model(ids)
    assert float((theirs(ids).logits - ours).abs().max()) < 1e-4
    trained = [block.attention.output.weight.std() for block in loaded.model.blocks]
    assert min(trained) > 0.01, "attention that is still zero would hide how positions turn"
    assert float((ours[:, -1] - loaded.model(ids[:, -1:])[:, -1]).abs().max()) > 0.1, "the past counts"


def test_the_forward_run_shares_key_and_value_heads(exported: Callable[[str], Exported]) -> None:
    loaded, folder = exported("forward")
    content = json.loads((folder / "config.json").read_text())
    assert (content["num_attention_heads"], content["num_key_value_heads"]) == (4, 2)
    assert loaded.model.blocks[0].attention.key.weight.shape == (64, 128)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_transformers_generates_the_same_ids(exported: Callable[[str], Exported], direction: str) -> None:
    loaded, folder = exported(direction)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    generated = set()
    for text in ("The river", "stone. Window", "", "1984 東京"):
        ids = [loaded.tokenizer.bos, *loaded.tokenizer.encode(text).tolist()]
        asked = loaded.model.config.sequence_length - len(ids)
        (new,) = generate(loaded.model, [ids], asked, stop={loaded.tokenizer.bos})
        result = theirs.generate(torch.tensor([ids]), max_new_tokens=asked, do_sample=False)[0].tolist()
        assert result == ids + new
        generated |= set(new)
    assert len(generated) > 5, "a model that repeats itself would prove little"


def test_generation_ends_with_bos_which_begins_the_next_document(exported: Callable[[str], Exported]) -> None:
    loaded, folder = exported("forward")
    settings = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert settings.eos_token_id == settings.bos_token_id == loaded.tokenizer.bos
    assert settings.pad_token_id == loaded.tokenizer.pad


def test_the_config_says_what_the_model_is(exported: Callable[[str], Exported]) -> None:
    loaded, folder = exported("backward")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    shape, tokenizer = loaded.model.config, loaded.tokenizer
    expected = {
        "model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], "vocab_size": shape.vocab_size,
        "hidden_size": shape.width, "intermediate_size": 4 * shape.width, "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.sequence_length, "rms_norm_eps": 1.1920929e-07, "final_logit_softcapping": 15,
        "tie_word_embeddings": False, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.bos,
        "pad_token_id": tokenizer.pad,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.rope_parameters["rope_theta"] == 10_000
    assert config.bwlm["direction"] == "backward"
    assert config.bwlm["fingerprint"] == loaded.config.fingerprint


def test_the_folder_is_complete_readable_by_all_and_named_weights_are_all(exported: Callable[[str], Exported]) -> None:
    loaded, folder = exported("forward")
    assert {path.name for path in folder.iterdir()} == FILES
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1, "others than the owner may read all files or none"
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in loaded.model.parameters())
    assert torch.equal(theirs.model.layers[1].mlp.fc2.weight, loaded.model.blocks[1].mlp.down.weight)


def test_tokenizer_and_model_belong_together(exported: Callable[[str], Exported]) -> None:
    loaded, folder = exported("forward")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "The river was quiet, <|bos|> 1984."
    assert tokenizer.encode(text) == loaded.tokenizer.encode(text).tolist()
    assert len(tokenizer) == loaded.tokenizer.vocab_size
    assert tokenizer.model_max_length == loaded.model.config.sequence_length
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=2)  # no argument it does not know


# ---- the card ----


def card_output(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the code of the card prints, run where the card lies."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(snippet, "README.md", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("direction", "pattern"),
    [
        ("forward", r"The first thing to know is.+\n"),
        ("backward", r".+ and so it came to an end\.\n"),
        ("bidirectional", r"The first thing to know is.+\n(.|\n)+ and so it came to an end\.\n"),
    ],
)
def test_the_code_of_the_card_writes_in_the_models_direction(
    exported: Callable[[str], Exported],
    direction: str,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded, folder = exported(direction)
    out = card_output(folder, monkeypatch, capsys)
    assert re.fullmatch(pattern, out, flags=re.DOTALL), out
    if direction == "bidirectional":
        marker = loaded.tokenizer.forward
        ids = [loaded.tokenizer.bos, marker, *loaded.tokenizer.encode("The first thing to know is").tolist()]
        (new,) = generate(loaded.model, [ids], 32, stop={loaded.tokenizer.bos})
        assert out.startswith(loaded.tokenizer.decode(ids[2:] + new[:-1]))


def test_the_code_of_the_permuted_card_knows_the_order(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, folder = exported("permuted")
    text = loaded.tokenizer.encode("Whether this reads well is a matter of order.").astype(np.int64)
    ids = [loaded.tokenizer.bos, *arrange(text, "permuted", loaded.model.config.sequence_length).tolist()]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(loaded.model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]))
    assert card_output(folder, monkeypatch, capsys) == f"{float(losses):.3f} nats per token\n"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_card_tells_what_was_trained(exported: Callable[[str], Exported], direction: str) -> None:
    loaded, folder = exported(direction)
    text = (folder / "README.md").read_text()
    parameters = sum(p.numel() for p in loaded.model.parameters())
    facts = [
        f"| direction | {direction} |", f"| parameters | {parameters:,} |", f"{STEPS * 512:,} tokens",
        loaded.config.identity["data"], loaded.tokenizer.digest, loaded.config.fingerprint,
        f"| validation, bits per byte | {loaded.meta['progress']['validation']['val_bpb']:.4f} |",
        "split_special_tokens=False", "| precision | float32 in training,",
        "| attention in training | inside one document,",
    ]  # fmt: skip
    assert [fact for fact in facts if fact not in text] == []
    assert "{" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL), "a field of the template stayed"
    assert str(Path.home()) not in text
    assert str(loaded.config.corpus) not in text


def test_the_card_says_where_attention_crossed_documents(new_run: NewRun, tmp_path: Path) -> None:
    folder = new_run("crossing", model__document_mask=False)
    assert run_phase(folder, LocalSession(), in_process).state == "finished"
    export_hf(load_model(folder.path.parent, folder.id), tmp_path / "card")
    assert "across the documents of a row (`document_mask: false`)" in (tmp_path / "card" / "README.md").read_text()


def test_the_card_of_a_child_names_the_checkpoint_that_it_began_from(
    storage: Path, new_family: NewFamily, new_child: NewChild, tmp_path: Path
) -> None:
    export_hf(load_model(storage, "forward"), tmp_path / "base")
    assert "began from" not in (tmp_path / "base" / "README.md").read_text()
    sft = new_child(new_family("forward"), "sft", "early", at="8", budget__steps=2)
    assert run_phase(sft, LocalSession(), in_process).state == "finished"
    export_hf(load_model(sft.path.parent, "early"), tmp_path / "card")
    assert "| began from | `forward` (base), step 8 |" in (tmp_path / "card" / "README.md").read_text()


def test_the_card_of_an_earlier_step_claims_no_later_figure(storage: Path, tmp_path: Path) -> None:
    export_hf(load_model(storage, f"forward@{STEPS // 2}"), tmp_path / "early")
    text = (tmp_path / "early" / "README.md").read_text()
    assert f"{STEPS * 512 // 2:,} tokens in {STEPS // 2} of {STEPS} steps" in text
    assert "bits per byte" not in text


# ---- the command ----

Answer = tuple[int, str, str]
Bwlm = Callable[..., Answer]


@pytest.fixture
def bwlm(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bwlm:
    """Runs the command line in this process, in a folder of its own."""
    monkeypatch.setenv("BWLM_STORAGE", str(storage))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Answer:
        monkeypatch.setattr("sys.argv", ["bwlm", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


def check_refused(answer: Answer, message: str) -> None:
    code, out, err = answer
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_the_command_says_what_it_wrote_and_how_to_load_it(bwlm: Bwlm, tmp_path: Path) -> None:
    code, out, err = bwlm("export", "backward", "--format", "hf", "out/of/sight")
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    assert first.startswith(f"backward, step {STEPS}, reads backward")
    names: dict[str, Any] = {}
    exec("import transformers\n" + "\n".join(lines), names)
    assert type(names["model"]) is NanoChatForCausalLM
    assert names["tokenizer"].bos_token == "<|bos|>"
    assert {path.name for path in (tmp_path / "out/of/sight").iterdir()} == FILES


def test_an_empty_folder_is_filled_and_a_link_to_one_followed(bwlm: Bwlm, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    code, _, told = bwlm("export", f"forward@{STEPS // 2}", "link")
    assert (code, told) == (0, f"forward: step {STEPS // 2} of {STEPS}: the model has not finished training\n")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES
    assert json.loads((tmp_path / "empty" / "config.json").read_text())["bwlm"]["step"] == STEPS // 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["forwrd", "new"], "forwrd: no such experiment in "),
        (["forwrd", "new"], "(did you mean 'forward'?)"),
        (["../forward", "new"], "experiment id: '../forward' is not a valid id"),
        (["forward", "new", "--format", "gguf"], "'gguf'"),
        (["forward@7", "new"], f"no checkpoint of step 7: choose from {STEPS // 2}, {STEPS}"),
        (["forward", "full"], "full: exists: give a new folder"),
        (["forward", "file"], "file: exists: give a new folder"),
        (["forward", "file/below"], "file/below: cannot be "),
        (["forward", "/proc/new"], "/proc/new: cannot be written"),
        (["forward"], "DIR"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_made(bwlm: Bwlm, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    (tmp_path / "file").write_text("mine")
    check_refused(bwlm("export", *words), message)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "file",
        "full",
        "full/kept",
    ]


def test_the_working_folder_is_not_replaced(bwlm: Bwlm, tmp_path: Path) -> None:
    """Even empty: whoever stands in it would be left in a folder that has no name any more."""
    check_refused(bwlm("export", "forward", "."), "give a new folder, or an empty one that is not the working folder")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_is_refused(bwlm: Bwlm, new_run: NewRun, tmp_path: Path) -> None:
    new_run("young")
    check_refused(bwlm("export", "young", "new", "--storage", "."), "young: no checkpoint")
    assert not (tmp_path / "new").exists()


def test_damaged_weights_are_named_and_nothing_is_written(bwlm: Bwlm, storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage / "forward", tmp_path / "storage" / "forward")
    checkpoints = tmp_path / "storage" / "forward" / "checkpoints"
    for step in (STEPS // 2, STEPS):
        flip_a_bit(step_folder(checkpoints, step) / "model.safetensors")
    damaged = step_folder(checkpoints, STEPS) / "model.safetensors"
    check_refused(bwlm("export", "forward", "new", "--storage", "storage"), f"{damaged.relative_to(tmp_path)}: damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["storage"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_empty_folder_that_cannot_be_replaced_is_told(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()

    def busy(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UserError, match=r"mounted: cannot be replaced .*: give a folder inside it"):
        export_hf(load_model(storage, "forward"), tmp_path / "mounted")
    assert [path.name for path in tmp_path.rglob("*")] == ["mounted"]


@pytest.mark.parametrize("broken", ["model_card", "tokenizer_json", "save_file"])
def test_a_failure_on_the_way_leaves_nothing(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"bwlm.trained.export_hf.{broken}", fail)
    with pytest.raises(UserError, match=r"new: cannot be written \(No space left on device\)"):
        export_hf(load_model(storage, "forward"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
