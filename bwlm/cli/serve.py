"""`bwlm serve`: models behind OpenAI's HTTP protocol, and a page to talk to them."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Literal, NamedTuple
from webbrowser import open_new_tab

import typer

from bwlm.cli.terminal import Storage, say, whole_option
from bwlm.errors import UserError
from bwlm.format import whole_number
from bwlm.progress import loading

TOKEN = "BWLM_SERVE_TOKEN"


class _Number(NamedTuple):
    """Bounds of the number of replicas."""

    least: int
    most: int


def _number(text: str) -> _Number:
    least, colon, most = text.partition(":")
    number = _Number(whole_number(least), whole_number(most if colon else least))
    if not (all(isinstance(one, int) for one in number) and 1 <= number.least <= number.most):
        raise ValueError(f"must be a number, or the least and the most, such as 1:4 (found {text})")
    return number


def serve(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="ID[@STEP]..", help="Runs to serve; ID@400 or ID@best: another checkpoint."),
    ],
    port: Annotated[int, whole_option("Port; 0: any free one.", 0, 65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on. Any other than loopback needs a token.")] = (
        "127.0.0.1"
    ),
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which the server may be called, besides localhost and --host. Repeatable."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar=TOKEN, help="Token that clients must send: Authorization: Bearer TOKEN."),
    ] = None,
    slots: Annotated[int, whole_option("Requests of a model that are decoded at once.", 1)] = 8,
    waiting: Annotated[int, whole_option("Requests of a model that may wait; more are answered with 429.", 0)] = 64,
    threads: Annotated[
        int | None, whole_option("CPU threads for the models. Default: all cores; of a replica: 1.", 1)
    ] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Decode several times as fast. Takes a second at the start, and on a CPU a C++ compiler.",
        ),
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    grace: Annotated[int, whole_option("Seconds that streams may go on after SIGTERM or Ctrl-C.", 0)] = 20,
    replicas: Annotated[
        _Number | None,
        typer.Option(
            parser=_number,
            metavar="MIN[:MAX]",
            help="Serve on Ray, with as many copies as the load needs; on the cluster at RAY_ADDRESS if it is set.",
        ),
    ] = None,
    storage: Storage = None,
) -> None:
    """Serve models over HTTP: OpenAI's chat and completions, reranking, infilling, and a page for the browser.

    Clients ask for a model as ID, or as ID:backward for a reading (docs/serve.md). Needs `pip install 'bwlm[serve]'`.

    Example: `bwlm serve mine --port 8000`
    """
    from bwlm.chat.access import LOOPBACK, Access
    from bwlm.record.experiment import find_checkpoint
    from bwlm.remote import address_of
    from bwlm.storage.opened import open_storage

    root, names = open_storage(storage), list(dict.fromkeys(runs))
    for name in names:
        find_checkpoint(root, name)
    if host not in LOOPBACK and not token:
        raise UserError(f"--host {host}: others can reach it: set a token with --token or ${TOKEN}")
    access = Access(LOOPBACK | {name.lower() for name in (host, *(allow_host or []))}, token)
    models = (address_of(root), names, slots, waiting, threads or (1 if replicas else None), precision, compiled)
    if replicas:
        if port == 0:
            raise UserError("--port 0: replicas need a port: name one")
        with loading(), _packages():
            from bwlm.chat.loading import load_served
            from bwlm.cluster.serving import Replicas, serve_replicas
        places = len(names) * (slots + waiting)
        asked = Replicas(*replicas, threads=threads or 1, slots=slots, places=places, grace=grace)
        load = partial(load_served, *models)
        ended_by = serve_replicas(load, access, asked, host, port, lambda: _tell(names, host, port, open_page))
    else:
        with _listen(host, port) as listening:
            with loading(), _packages():
                from bwlm.chat.loading import load_served
                from bwlm.chat.server import build_app, run_server
            app = build_app(load_served(*models), access)
            _tell(names, host, listening.getsockname()[1], open_page)  # the socket listens already
            ended_by = run_server(app, listening, grace)
    if ended_by == signal.SIGINT:
        sys.exit(128 + ended_by)  # typer's Exit with this code would be told as a run to resume, which none is here
    if ended_by:
        raise typer.Exit(128 + ended_by)


def _tell(names: list[str], host: str, port: int, open_page: bool) -> None:
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"serving {', '.join(names)} on {address} (Ctrl-C ends it)")
    if open_page:
        open_new_tab(address)


@contextmanager
def _packages() -> Iterator[None]:
    """Raise `UserError` if a package is missing that the block imports."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(f"bwlm serve needs the package {package}: pip install 'bwlm[serve]'") from None


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `UserError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen on {host}: {error.strerror}: choose another port") from None
