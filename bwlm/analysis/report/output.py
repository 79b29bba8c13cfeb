"""Report in a file that a person names, with its charts and losses in a folder beside it."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from bwlm.analysis.report.study import LOSSES, PAGE
from bwlm.paths import write_text

ENDINGS = (".md", ".html")


def write_report(path: Path, make: Callable[[Path], list[Path]]) -> list[Path]:
    """Write a report as Markdown or one HTML page, as the ending of `path` says; return the files, the report first.

    `make` writes the report into a folder, and returns its files. Its charts and losses go to `<name>_files/`.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, *others = make(Path(folder))
        page = Path(folder) / PAGE
        as_page = path.suffix.lower() == page.suffix
        beside = [file for file in others if file != page and (not as_page or file.name == LOSSES)]
        text = (page if as_page else report).read_text("utf-8")
        files = path.with_name(f"{path.stem}_files")
        if beside:
            files.mkdir(exist_ok=True)
        for file in beside:
            shutil.copyfile(file, files / file.name)
            text = re.sub(rf"(\]\(|--from ){re.escape(file.name)}", rf"\g<1>{files.name}/{file.name}", text)
        write_text(path, text)
    return [path, *(files / file.name for file in beside)]
