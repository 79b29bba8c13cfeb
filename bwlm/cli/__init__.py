"""The command line `bwlm`: a thin layer over all other packages."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from bwlm import __version__
from bwlm.cli.analyze import analyze_app
from bwlm.cli.app import App
from bwlm.cli.chat import chat, sample
from bwlm.cli.data import data_app, tokenizer_app
from bwlm.cli.doctor import doctor
from bwlm.cli.eval import evaluate
from bwlm.cli.export import export
from bwlm.cli.grid import grid_app
from bwlm.cli.grid_control import grid_continue, grid_delete, grid_stop
from bwlm.cli.runs import runs_app
from bwlm.cli.serve import serve
from bwlm.cli.storage import storage_app
from bwlm.cli.streams import finish_writing, tolerate_any_text
from bwlm.cli.terminal import LogLines, say
from bwlm.cli.train import train
from bwlm.cluster.environment import check_ray_settings, prepare_environment
from bwlm.credentials import masked
from bwlm.errors import BwlmError
from bwlm.train.termination import TERMINATED

app = App(
    help="Which way should a language model read? Train and compare forward, backward and bidirectional GPTs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bwlm {__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


grid_app.command("stop")(grid_stop)
grid_app.command("continue")(grid_continue)
grid_app.command("delete")(grid_delete)
app.add_typer(grid_app, name="grid")
app.command("train")(train)
app.add_typer(runs_app, name="runs")
app.add_typer(analyze_app, name="analyze")
app.command("eval")(evaluate)
app.command("chat")(chat)
app.command("sample")(sample)
app.command("serve")(serve)
app.command("export")(export)
app.add_typer(storage_app, name="storage")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(storage_app, name="storage")
app.command("doctor")(doctor)

_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line and exit with its code.

    A user's mistake prints one line and exits with 2, a failed run exits with 1, an interrupt with 130, SIGTERM with
    143. If the reader of the output closes the pipe (`| head`), the command exits with 1 and prints nothing more.
    """
    tolerate_any_text()
    # a process that ends frees everything anyway: a search for garbage in MLflow's modules takes seconds first
    atexit.register(gc.freeze)
    try:
        _main()
    except SystemExit as end:
        sys.exit(end.code if finish_writing() else 1)
    except BrokenPipeError:
        if finish_writing():
            raise  # another pipe broke, not standard output or error
        sys.exit(1)


def _main() -> NoReturn:
    logging.basicConfig(level=logging.WARNING, handlers=[LogLines()], format="%(message)s")
    logging.getLogger("bwlm").setLevel(logging.INFO)
    for chatty in ("mlflow", "alembic", "ray"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the launch prints its own line for a failed cell
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    before = signal.signal(signal.SIGTERM, _end)
    try:
        prepare_environment()
        check_ray_settings()
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and 130 for Ctrl-C
    except BwlmError as error:
        say(f"bwlm: {masked(str(error))}")
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        if message := error.format_message():  # none where a command is missing: its help is printed
            say(f"bwlm: {masked(message.replace('Value error, ', ''))}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == TERMINATED:
            say("bwlm: stopped by SIGTERM; run the same command to resume")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == _INTERRUPTED:
        say("bwlm: interrupted; run the same command to resume")
    sys.exit(code or 0)


def _end(signum: int, frame: object) -> NoReturn:
    """Exit on SIGTERM as on Ctrl-C. While cells train, `Termination` takes the signal instead, so that they save."""
    raise SystemExit(TERMINATED)
