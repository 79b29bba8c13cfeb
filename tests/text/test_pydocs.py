"""The built-in corpus: the same text from the same install, split cleanly, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bwlm.errors import UserError
from bwlm.text import pydocs, shards
from bwlm.text.pydocs import LARGEST_DOCUMENT, PydocsManifest, docstrings, pydocs_key, write_pydocs

PACKAGES = ("click", "fsspec", "no_such_distribution")
LONG = b"'''x'''\n" + b"1+" * 10**5 + b"1"
DEEP = b"'''x'''\n" + b"-" * 10**5 + b"1"
"""What the parser answers with RecursionError and with MemoryError."""
SHARDS = [f"shard_{index:05d}.parquet" for index in range(5)]


def build(folder: Path, packages: tuple[str, ...] = PACKAGES) -> PydocsManifest:
    return pydocs._write(folder, packages, lambda _: None)


def read_shards(folder: Path) -> list[list[str]]:
    return [pq.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pydocs") / "corpus"
    build(folder)
    return folder


def test_shards_hold_one_string_column(corpus: Path) -> None:
    assert sorted(path.name for path in corpus.iterdir()) == ["manifest.json", *SHARDS]
    assert [path.name for path in corpus.parent.iterdir()] == ["corpus"]
    for name in SHARDS:
        assert pq.read_schema(corpus / name) == pa.schema({"text": pa.string()})


def test_manifest_counts_and_digests_what_the_shards_hold(corpus: Path) -> None:
    manifest = PydocsManifest.read(corpus)
    texts = [text for shard in read_shards(corpus) for text in shard]
    assert (manifest.shards, manifest.documents) == (5, len(texts))
    assert manifest.characters == sum(map(len, texts))
    assert manifest.digest == hashlib.sha256(b"".join(hashlib.sha256(t.encode()).digest() for t in texts)).hexdigest()
    assert set(manifest.versions) == {"click", "fsspec"}


def test_the_same_environment_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "again") == PydocsManifest.read(corpus)
    for name in ["manifest.json", *SHARDS]:
        assert (tmp_path / "again" / name).read_bytes() == (corpus / name).read_bytes()


def test_documents_are_topics_and_modules_with_qualified_names(corpus: Path) -> None:
    texts = [text for shard in read_shards(corpus) for text in shard]
    assert any(text.startswith('The "assert" statement\n') for text in texts)
    (formatting,) = [text for text in texts if text.startswith("click.formatting\n")]
    assert "\n\nHelpFormatter.write_usage\n\nWrites a usage line into the buffer." in formatting


def test_no_document_is_in_two_shards_or_twice_in_one(corpus: Path) -> None:
    shards = read_shards(corpus)
    assert all(shards)
    texts = [text for shard in shards for text in shard]
    assert len(set(texts)) == len(texts)


def test_about_a_tenth_is_validation_and_libraries_are_mixed() -> None:
    documents = {f"{library}.{index}": f"{library} {index:09d} " * 20 for library in "abc" for index in range(1000)}
    *train, validation = pydocs._deal(documents)
    assert 250 <= len(validation) <= 350
    for shard in [*train, validation]:
        assert len(shard) >= 250
        assert {text[0] for text in shard[:30]} == {"a", "b", "c"}


def test_another_library_moves_no_document_between_shards() -> None:
    documents = {f"module_{index}": f"{index:09d} " * 30 for index in range(200)}
    more = {**documents, **{f"other_{index}": f"{-index:09d} " * 30 for index in range(1, 200)}}
    known = set(documents.values())
    assert [[text for text in shard if text in known] for shard in pydocs._deal(more)] == pydocs._deal(documents)


def test_tiny_and_huge_documents_are_left_out_and_surrogates_dropped() -> None:
    documents = {
        "tiny": "x" * 199,
        "small": "y" * 200,
        "huge": "z" * (LARGEST_DOCUMENT + 1),
        "odd": "\ud800" + "w" * 200,
    }
    assert {text for shard in pydocs._deal(documents) for text in shard} == {"y" * 200, "w" * 200}


def test_of_equal_docstrings_the_first_stays() -> None:
    read = {"a": [("", "About a."), ("f", "Shared.")], "b": [("g", "Shared."), ("h", "Own.")]}
    assert pydocs._module_documents(read) == {"a": "a\n\nAbout a.\n\nf\n\nShared.", "b": "b\n\nh\n\nOwn."}


def test_no_topic_is_a_section_of_another() -> None:
    topics = pydocs._topics()
    assert "topics.compound" in topics
    assert "topics.with" not in topics
    for name, text in topics.items():
        body = text.partition("\n\n")[2]
        assert not [other for other in topics if other != name and body in topics[other]]


def test_docstrings_come_in_source_order_with_qualified_names() -> None:
    source = b'''"""Module."""
class Outer:
    """A class.

            Indented.

        Not.
    """
    async def method(self):
        r"""A \\d method."""
        def inner():
            """   """
    class Inner:
        def f(): "Plain quotes."
"not a docstring"
'''
    assert list(docstrings(source)) == [
        ("", "Module."),
        ("Outer", "A class.\n\n    Indented.\n\nNot."),
        ("Outer.method", "A \\d method."),
        ("Outer.Inner.f", "Plain quotes."),
    ]


@pytest.mark.parametrize(
    "source",
    [b"def f(:\n '''x'''", b"'''\xff'''", b"x = '''\0'''", b"# no docstring\n'x'", LONG, DEEP],
    ids=["syntax", "encoding", "null", "none", "long", "deep"],
)
def test_what_cannot_be_parsed_has_no_docstrings(source: bytes) -> None:
    assert list(docstrings(source)) == []


def test_tests_and_vendored_code_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.py", "b/__init__.py", "b/tests/c.py", "_vendor/d.py", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(pydocs._module_name(path.relative_to(tmp_path)) for path in pydocs._sources(tmp_path)) == ["a", "b"]


def test_standard_library_is_among_the_sources() -> None:
    modules = pydocs.find_modules(["python"])
    assert Path(modules["json.decoder"]).name == "decoder.py"
    assert {"json", "asyncio.tasks"} <= set(modules)
    assert not [name for name in modules if "site-packages" in name or name.startswith("test.")]


def test_key_follows_packages_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    key = pydocs_key()
    assert key == pydocs_key()
    assert key != pydocs._key(PACKAGES)
    assert pydocs._key(["ray.data"]) != pydocs._key(["ray.tune"])
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert key != pydocs_key()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shards, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        build(tmp_path / "cache" / "corpus", ())
    assert list(tmp_path.rglob("*.parquet")) == []
    assert not (tmp_path / "cache" / "corpus").exists()


def test_a_written_corpus_stays_and_anything_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    before = (corpus / SHARDS[0]).stat().st_mtime_ns
    assert write_pydocs(corpus) == PydocsManifest.read(corpus)
    assert (corpus / SHARDS[0]).stat().st_mtime_ns == before
    (tmp_path / "notes.txt").touch()
    for taken in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match=f"{taken}: holds other files than the built-in corpus"):
            write_pydocs(taken)


def test_a_foreign_manifest_is_refused_by_name(tmp_path: Path) -> None:
    for content in ({"format": 1}, [1]):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a built-in corpus"):
            write_pydocs(tmp_path)


def test_a_script_without_a_main_guard_runs_once_and_gives_the_same_text(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom bwlm.text import pydocs\nprint('here', flush=True)\n"
        f"print(pydocs._write(Path({str(tmp_path / 'out')!r}), {PACKAGES!r}, print).digest)\n"
    )
    (tmp_path / "ast.py").write_text("raise SystemExit('imported from the working folder')")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    child = subprocess.run(
        [sys.executable, "-P", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.stderr == ""
    here, reading, writing, digest = child.stdout.splitlines()
    assert (here, reading.split()[0], writing.split()[0]) == ("here", "reading", "writing")
    assert digest == PydocsManifest.read(corpus).digest


def test_reading_children_import_from_where_the_caller_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bwlm").mkdir()
    (tmp_path / "bwlm" / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        pydocs.read_docstrings({})


def test_reading_children_keep_quiet_about_other_peoples_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "odd.py"
    source.write_text('"""Odd."""\n"\\d"\n')
    monkeypatch.setenv("PYTHONWARNINGS", "always")
    assert pydocs.read_docstrings({"odd": str(source)}) == {"odd": [("", "Odd.")]}
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_the_whole_corpus_is_large_enough(tmp_path: Path) -> None:
    manifest = write_pydocs(tmp_path / "corpus")
    shards = read_shards(tmp_path / "corpus")
    assert 5e6 <= manifest.characters <= 8.5e6
    assert len(shards[-1]) >= 150
    assert 0.08 <= len(shards[-1]) / manifest.documents <= 0.11
