"""The controls: one reads the same both ways by construction, the other is right arithmetic, each symbol is a token."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bwlm.config import CONTROL_SOURCES, MERGE_FREE_VOCABULARY, DataSettings, Recipe
from bwlm.directions import READINGS
from bwlm.errors import UserError
from bwlm.text import shards as writing
from bwlm.text.batches import DirectedPlan, open_rows
from bwlm.text.controls import (
    CONTROLS,
    FACTORS,
    LINE,
    LONGEST,
    NULL_ALPHABET,
    PRIME,
    SHORTEST,
    ReversibleChain,
    control_key,
    null_chain,
    null_floor,
    null_nll,
    write_control,
)
from bwlm.text.corpus import BUILTINS, find_corpus, read_texts
from bwlm.text.direction import SpecialIds, arrange, read_row, restore
from bwlm.text.plan import RowPlan
from bwlm.text.prepare import Pack, Prepared, prepare
from bwlm.text.tokenizer import train_tokenizer

DIGESTS = {
    "null": "4343637cfc5ff833abd692129e0f9a0bf9fdb7840e9068d0677176a8fa8ed745",
    "products": "3739baa1dac4c4a73aa0532a2612ecdf97d7fd0c79e7a1f75a36cec62966c6a3",
}
"""Another text under the same name would be another control: count up `FORMAT_VERSION`, then write its digest here."""
WIDTH = 128

law = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="module")
def texts_of(cache: Path) -> Callable[[str], list[list[str]]]:
    """The texts of each shard of a control."""

    def read(name: str) -> list[list[str]]:
        write_control(name, cache / name)
        return [pq.read_table(path)["text"].to_pylist() for path in sorted((cache / name).glob("*.parquet"))]

    return read


@pytest.fixture(scope="module")
def null_symbols(texts_of: Callable[[str], list[list[str]]]) -> list[np.ndarray]:
    """Every document of the null corpus as indices into its alphabet."""
    place = {symbol: index for index, symbol in enumerate(NULL_ALPHABET)}
    return [np.array([place[symbol] for symbol in text]) for shard in texts_of("null") for text in shard]


# ---- the chain ----


@st.composite
def chains(draw: st.DrawFn) -> ReversibleChain:
    size = draw(st.integers(1, 6))
    weights = np.array(draw(st.lists(st.integers(1, 1000), min_size=size**2, max_size=size**2))).reshape(size, size)
    return ReversibleChain(weights + weights.T)


def check_balance(chain: ReversibleChain) -> None:
    flow = chain.stationary[:, None] * chain.transition
    np.testing.assert_allclose(chain.transition.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(chain.stationary @ chain.transition, chain.stationary, atol=1e-12)
    np.testing.assert_allclose(flow, flow.T, atol=1e-12)
    assert chain.stationary.sum() == pytest.approx(1, abs=1e-12)


@law
@given(chains())
def test_symmetric_weights_give_stationarity_and_detailed_balance(chain: ReversibleChain) -> None:
    check_balance(chain)


@law
@given(chains(), st.integers(0, 2**31), st.integers(1, 40))
def test_the_true_chain_pays_the_same_both_ways(chain: ReversibleChain, seed: int, length: int) -> None:
    (symbols,) = chain.sample(np.array([3]), length, seed)
    assert chain.nll(symbols) == pytest.approx(chain.nll(symbols[::-1]), abs=1e-9)


def test_the_null_chain_balances_and_has_something_to_learn() -> None:
    chain = null_chain()
    check_balance(chain)
    assert len(set(NULL_ALPHABET)) == len(chain.weights) == 64
    assert NULL_ALPHABET.isascii()
    assert NULL_ALPHABET.isprintable()
    assert chain.weights.min() > 0
    assert chain.entropy - chain.entropy_rate > 1.5
    assert chain.entropy_rate > 1.5


def test_sampling_draws_each_symbol_as_often_as_the_chain_says() -> None:
    chain = ReversibleChain(np.array([[1, 2, 0], [2, 3, 5], [0, 5, 40]]) + 1)
    symbols = chain.sample(np.arange(20_000), 3, 7)
    for place in range(3):
        np.testing.assert_allclose(np.bincount(symbols[:, place]) / 20_000, chain.stationary, atol=0.015)
    for before in range(3):
        after = symbols[symbols[:, 1] == before, 2]
        np.testing.assert_allclose(np.bincount(after, minlength=3) / len(after), chain.transition[before], atol=0.04)


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    chain = null_chain()
    np.testing.assert_array_equal(chain.sample(np.array([5]), 50, 1)[0], chain.sample(np.arange(9), 80, 1)[5, :50])
    assert (chain.sample(np.array([5]), 50, 1) != chain.sample(np.array([5]), 50, 2)).any()


# ---- the floor ----


def test_floor_of_two_symbols_by_hand() -> None:
    # W = [[3, 1], [1, 1]]: r = 4, 2; pi = 2/3, 1/3; P = 3/4 1/4 | 1/2 1/2
    chain = ReversibleChain(np.array([[3, 1], [1, 1]]))
    entropy = 2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)
    rate = 2 / 3 * (3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4)) + 1 / 3 * math.log(2)
    assert chain.floor(np.array([1])) == pytest.approx(entropy, abs=1e-12)
    assert chain.floor(np.array([4])) == pytest.approx((entropy + 3 * rate) / 4, abs=1e-12)
    # weighted by symbols: two segments, of 1 and 4, and one of none that costs nothing
    assert chain.floor(np.array([1, 0, 4])) == pytest.approx((2 * entropy + 3 * rate) / 5, abs=1e-12)


@law
@given(chains(), st.integers(1, 4))
def test_floor_is_the_mean_over_all_segments(chain: ReversibleChain, length: int) -> None:
    expected = 0.0
    for symbols in itertools.product(range(len(chain.weights)), repeat=length):
        nll = chain.nll(np.array(symbols))
        expected += math.exp(-nll) * nll
    assert chain.floor(np.array([length])) == pytest.approx(expected / length, abs=1e-9)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_floor_of_nothing(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one symbol"):
        null_floor(np.array(lengths, dtype=np.int64))


def test_the_null_text_costs_the_true_chain_its_floor(texts_of: Callable[[str], list[list[str]]]) -> None:
    texts = [text for shard in texts_of("null") for text in shard]
    lengths = np.array([len(text) for text in texts])
    paid = sum(map(null_nll, texts)) / lengths.sum()
    # one symbol's cost has a standard deviation of about 1.5 nats, and there are 2.4 million
    assert paid == pytest.approx(null_floor(lengths), abs=5 * 1.5 / math.sqrt(lengths.sum()))
    assert null_nll(texts[0]) == pytest.approx(null_nll(texts[0][::-1]), abs=1e-6)
    assert null_nll("") == 0
    with pytest.raises(ValueError, match="substring not found"):
        null_nll("a b")


# ---- the text of the null corpus ----


def test_pairs_of_symbols_are_as_frequent_as_their_reverse(null_symbols: list[np.ndarray]) -> None:
    size = len(NULL_ALPHABET)
    pairs = np.concatenate([size * symbols[:-1] + symbols[1:] for symbols in null_symbols])
    count = np.bincount(pairs, minlength=size**2).reshape(size, size).astype(float)
    upper = np.triu_indices(size, 1)
    there, back = count[upper], count.T[upper]
    # z of a difference of two counts; between neighbours in a path counts of a pair and its reverse rather agree
    z = (there - back)[there + back > 0] / np.sqrt((there + back)[there + back > 0])
    assert (z**2).mean() < 1.1
    assert np.abs(z).max() < 5
    expected = null_chain().stationary[:, None] * null_chain().transition * len(pairs)
    assert ((count - expected) ** 2 / expected).mean() == pytest.approx(1, abs=0.2)


def test_first_and_last_symbols_have_one_distribution(null_symbols: list[np.ndarray]) -> None:
    first, last = (np.bincount([symbols[end] for symbols in null_symbols], minlength=64) for end in (0, -1))
    differing = (first + last) > 0
    assert ((first - last)[differing] ** 2 / (first + last)[differing]).sum() < differing.sum() + 5 * math.sqrt(128)
    expected = null_chain().stationary * len(null_symbols)
    for found in (first, last):
        assert ((found - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(126)


def test_lengths_do_not_follow_from_content(null_symbols: list[np.ndarray]) -> None:
    lengths = np.array([len(symbols) for symbols in null_symbols])
    assert SHORTEST <= lengths.min() < SHORTEST + 50
    assert LONGEST - 50 < lengths.max() <= LONGEST
    share = np.array([null_chain().stationary[symbols].mean() for symbols in null_symbols])
    assert abs(np.corrcoef(lengths, share)[0, 1]) < 5 / math.sqrt(len(lengths))


# ---- products ----


def test_every_line_is_right_arithmetic(texts_of: Callable[[str], list[list[str]]]) -> None:
    texts = [text for shard in texts_of("products") for text in shard]
    for text in texts:
        assert SHORTEST <= len(text) <= LONGEST + LINE
        assert text.endswith("\n")
    lines = [line for text in texts for line in text.splitlines()]
    assert len(lines) > 100_000
    for line in lines:
        left, right = line.split("=")
        factors = [1, *map(int, left), 1]
        assert len(left) == FACTORS
        assert len(line) == LINE - 1
        assert right == "".join(str(a * b % PRIME) for a, b in itertools.pairwise(factors))


def test_a_line_by_hand() -> None:
    # modulo 7: 1*3, 3*5=15, 5*4=20, 4*6=24, 6*6=36, 6*2=12, 2*1
    assert "\n354662=3163152\n" in "".join(CONTROLS["products"](np.arange(800)))


def test_a_product_hints_at_each_factor_and_all_products_fix_the_last(
    texts_of: Callable[[str], list[list[str]]],
) -> None:
    lines = np.array([list(map(int, line.replace("=", ""))) for line in "".join(texts_of("products")[0]).splitlines()])
    share = np.array([3, 1, 1, 1, 1, 1]) / 8
    for place in range(FACTORS):
        np.testing.assert_allclose(np.bincount(lines[:, place])[1:] / len(lines), share, atol=0.015)
    after_two = lines[lines[:, 2] == 2, FACTORS + 2]  # the second factor is 1 in three of eight
    assert (after_two == 2).mean() == pytest.approx(3 / 8, abs=0.03)
    odd, even = lines[:, FACTORS::2].prod(axis=1), lines[:, FACTORS + 1 :: 2].prod(axis=1)
    assert ((odd - even) % PRIME == 0).all()


# ---- files ----


@pytest.mark.parametrize("name", CONTROLS)
def test_shards_and_manifest(name: str, texts_of: Callable[[str], list[list[str]]], cache: Path) -> None:
    shards = texts_of(name)
    manifest = json.loads((cache / name / "manifest.json").read_text())
    texts = [text for shard in shards for text in shard]
    assert [len(shard) for shard in shards] == [160] * 5
    assert len(set(texts)) == len(texts) == manifest["documents"]
    assert manifest["characters"] == sum(map(len, texts))
    digest = hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()
    assert digest == manifest["digest"] == DIGESTS[name]


def test_every_process_writes_the_same_text(tmp_path: Path) -> None:
    command = (
        "import sys; from pathlib import Path; from bwlm.text.controls import CONTROLS, write_control\n"
        f"for name in CONTROLS: write_control(name, Path({str(tmp_path)!r}) / sys.argv[1] / name)\n"
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        child = subprocess.run([sys.executable, "-c", command, seed], env=environment, capture_output=True, text=True)
        assert child.stdout.strip() == "[]", child.stderr
    for path in (tmp_path / "1").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()
    for name, digest in DIGESTS.items():
        assert json.loads((tmp_path / "1" / name / "manifest.json").read_text())["digest"] == digest


def test_a_corpus_that_is_there_stays_and_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "manifest.json").write_text("{}")
    write_control("null", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["manifest.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than the built-in corpus"):
        write_control("null", tmp_path / "other")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(writing, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        write_control("products", tmp_path / "deep" / "corpus")
    assert list(tmp_path.iterdir()) == []


def test_keys_differ_and_name_the_folders(tmp_path: Path) -> None:
    assert control_key("null") != control_key("products")
    for source in CONTROL_SOURCES:
        name = source.removeprefix("builtin:")
        corpus = find_corpus(DataSettings(source=source, text_column="text", validation=None), tmp_path, print)
        assert (len(corpus.train), len(corpus.validation)) == (4, 1)
        assert Path(corpus.validation[0].uri) == (
            tmp_path / "corpora" / f"{name}-{control_key(name)}" / "shard_00004.parquet"
        )


@pytest.mark.parametrize(("wrong", "right"), [("builtin:nul", "builtin:null"), ("builtin:product", "builtin:products")])
def test_a_misspelt_control_is_told_the_nearest(wrong: str, right: str, tmp_path: Path) -> None:
    assert right in BUILTINS
    with pytest.raises(UserError, match=rf"^data\.source: '{wrong}' is not .* \(did you mean '{right}'\?\): give "):
        find_corpus(DataSettings(source=wrong, text_column="text", validation=None), tmp_path, print)


# ---- tokens, rows, directions ----


@pytest.mark.parametrize("source", CONTROL_SOURCES)
def test_a_control_with_merges_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size: .* set tokenizer\.vocab_size=264 \(found 4096\)"):
        Recipe.model_validate({"data": {"source": source}})


@pytest.fixture(scope="module", params=CONTROL_SOURCES)
def control(request: pytest.FixtureRequest, cache: Path, pack_in_process: Pack) -> Prepared:
    recipe = Recipe.model_validate(
        {
            "data": {"source": request.param},
            "tokenizer": {"vocab_size": MERGE_FREE_VOCABULARY},
            "model": {"sequence_length": WIDTH},
        }
    )
    return prepare(recipe, cache / "storage", pack_in_process, lambda _: None)


def test_every_symbol_is_one_token_and_packing_keeps_them_all(control: Prepared) -> None:
    texts = [text for part in read_texts(control.corpus.validation[0].uri, "text") for text in part]
    rows = open_rows(str(control.folder), "validation")
    packed = rows.take(np.arange(len(rows)))
    in_order = np.argsort(np.repeat(packed.document, packed.lengths), kind="stable")  # documents are shuffled
    assert packed.tokens[in_order].tolist() == list("".join(texts).encode())
    assert packed.lengths.sum() == sum(map(len, texts))
    assert not packed.whole.any(), "an end that is trained would raise the floor"
    assert control.manifest.train.padding_share(WIDTH) < 0.02  # two slots of 129


@pytest.mark.parametrize("direction", ["forward", "backward", "bidirectional", "permuted"])
def test_every_direction_reads_the_same_symbols(control: Prepared, direction: str) -> None:
    special = SpecialIds.from_tokenizer(control.tokenizer)
    plan = RowPlan(len(open_rows(str(control.folder), "train")), 8, 3)
    batch = DirectedPlan(str(control.folder), direction, special, plan).batch(5)
    rows = open_rows(str(control.folder), "train").take(*plan.at(5))
    whole = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
    whole[:, -1] = np.where(whole[:, -1] < 0, special.pad, whole[:, -1])
    found = [segment for row in whole for segment in read_row(row, direction, special, WIDTH)]
    assert np.concatenate(found).tolist() == rows.tokens.tolist()
    assert (batch["targets"] < 256).all(), "no symbol competes with an end of document"


@law
@given(st.text(alphabet=NULL_ALPHABET, min_size=1, max_size=WIDTH - 1))
def test_a_segment_costs_the_true_chain_the_same_in_both_readings(text: str) -> None:
    tokens = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    costs = {reading: null_nll(bytes(arrange(tokens, reading, WIDTH).tolist()).decode()) for reading in READINGS}
    assert costs["forward"] == pytest.approx(costs["backward"], abs=1e-9)
    for reading in READINGS:
        assert restore(arrange(tokens, reading, WIDTH), reading, WIDTH).tolist() == tokens.tolist()


def test_the_tokenizer_of_controls_does_not_depend_on_them() -> None:
    assert train_tokenizer(iter(["abc abc"]), MERGE_FREE_VOCABULARY).digest == (
        train_tokenizer(iter(["x"]), MERGE_FREE_VOCABULARY).digest
    )
