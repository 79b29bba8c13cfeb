"""Run of an analysis by `bwlm analyze`: its findings printed, its files written, or told again if nothing changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bwlm.cli.terminal import print_json, say, show_sentences
from bwlm.errors import UserError
from bwlm.progress import loading, track, working
from bwlm.storage.opened import push

if TYPE_CHECKING:
    import pandas as pd

    from bwlm.analysis.commands.result import Analysis
    from bwlm.analysis.kept_result import KeptResult
    from bwlm.record.experiment import ExperimentFolder

Analyse = Callable[[list["ExperimentFolder"]], "Analysis"]
"""Analysis of runs."""

_LONGEST = 80
"""Most characters of a folder's name, without the digest at its end."""


def run_analysis(
    load: Callable[[], Analyse],
    runs: list[str],
    output: list[Path] | None,
    storage: str | None,
    as_json: bool,
    rates: bool = False,
    kept_as: str = "",
) -> None:
    """Run an analysis, print its findings and write its files.

    `load` imports the analysis, which takes seconds: a wrong name of a run is told before. With `rates` the analysis
    chooses learning rates, so it also gets the cells that have not begun. `kept_as` is the name of an analysis of
    configs, journals and losses alone: it is told again as long as they stay.
    """
    from bwlm.record.catalog.select import begun, choose
    from bwlm.storage.opened import open_storage

    chosen, left_out = choose(open_storage(storage), runs)
    folders, notes = begun(chosen, left_out)

    def make() -> Made:
        from bwlm.format import counted

        with loading():
            check_output(output)
            prepare_pages(output, storage)
            analyse = load()
        with working(f"analysing {counted(len(folders), 'run')}"):
            analysis = analyse(chosen if rates else folders)
        every = [*notes, *analysis.notes]
        document = {"findings": analysis.findings, "notes": every, "table": _records(analysis.table)}
        more = {name: _records(table) for name, table in analysis.more.items()}
        return Made({"document": document | ({"more": more} if more else {}), "name": analysis.name}, analysis)

    result = told_or_made(kept_result(kept_as, runs, output, storage, chosen, notes) if kept_as else None, make)
    document = result.said["document"]
    for note in document["notes"]:
        say(f"note: {note}")
    if not as_json:
        show_sentences(*document["findings"])
    result.write(output, default_folder(storage, runs) / result.said["name"])
    if as_json:
        print_json(document)


def kept_result(
    name: str,
    runs: list[str],
    output: list[Path] | None,
    storage: str | None,
    folders: list[ExperimentFolder],
    notes: list[str],
) -> KeptResult:
    """Return the place of a result that is kept: of each command line the newest."""
    from bwlm.analysis.kept_result import KeptResult
    from bwlm.paths import storage_root

    files = [str(path.absolute()) for path in output or []]
    return KeptResult(storage_root(storage), [name, *runs, "--output", *files], folders, notes)


@dataclass
class Made:
    """Result of an analysis: what it says, as JSON, and how its files are written."""

    said: dict[str, Any]
    analysis: Analysis | None
    """None if the result was kept, and its files with it."""
    kept: KeptResult | None = None

    def write(self, output: list[Path] | None, default: Path | None) -> None:
        """Write the files, unless they stand there, and name them on stderr."""
        if self.analysis is not None:
            self.said["files"] = [str(path) for path in write_files(self.analysis, output, default)]
            if self.kept is not None:
                self.kept.keep(self.said, [Path(path) for path in self.said["files"]])
        files = [Path(path) for path in self.said["files"]]
        for path in output or []:
            say(f"written: {path}")
        if files and not output:
            say(f"written: {files[0].parent}/: {', '.join(path.name for path in files)}")
            push(files[0].parent)


def told_or_made(kept: KeptResult | None, make: Callable[[], Made]) -> Made:
    """Return the result that was kept, or else a new one."""
    if kept is not None and (said := kept.find()) is not None:
        return Made(said, None)
    made = make()
    made.kept = kept
    return made


def _records(table: pd.DataFrame) -> list[Any]:
    return table.astype(object).where(table.notna(), None).to_dict("records")


def default_folder(storage: str | None, runs: list[str]) -> Path:
    """Return a folder named after `runs`, so that an analysis of other runs does not overwrite this one."""
    from bwlm.paths import storage_root

    joined = " ".join(runs)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", joined)[:_LONGEST].strip("._")
    if name != joined:
        name += f"-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
    return storage_root(storage) / "analyses" / name


def prepare_pages(output: list[Path] | None, storage: str | None) -> None:
    """Begin with what the pages of an analysis need, if it writes one."""
    from bwlm.analysis.charts.style import prepare_pages
    from bwlm.paths import storage_root

    if not output or any(path.suffix.lower() == ".html" for path in output):
        prepare_pages(storage_root(storage))


def check_output(output: list[Path] | None, endings: Sequence[str] = ()) -> None:
    """Raise `UserError` for a file that an analysis cannot write."""
    from bwlm.analysis.commands.result import PICTURES, TABLES

    allowed = endings or (*PICTURES, *TABLES)
    for path in output or []:
        if path.suffix.lower() not in allowed:
            raise UserError(f"--output: {path}: unknown ending: use one of {' '.join(allowed)}")
        if path.is_dir():
            raise UserError(f"--output: {path} is a folder: name a file in it")
        if not path.parent.is_dir():
            raise UserError(f"--output: {path}: there is no folder {path.parent}: make it, or choose another")


def write_files(analysis: Analysis, output: list[Path] | None, default: Path | None) -> list[Path]:
    """Write an analysis to the files of --output, or else to a folder; return the files. Raises `UserError`."""
    if output:
        for path in track(output, "drawing charts", "files"):
            try:
                analysis.write(path)
            except OSError as error:
                raise UserError(f"--output: {path} cannot be written ({error.strerror}): choose another path") from None
        return output
    try:
        with working("drawing charts"):
            return analysis.write_all(default) if default is not None else []
    except OSError as error:
        raise UserError(f"{default}: cannot be written ({error.strerror}): name files with --output") from None
