"""`bwlm serve`: models behind OpenAI's HTTP protocol, and a page to talk to them."""

from __future__ import annotations

import socket
import webbrowser
from typing import Annotated, Any, Literal

import typer

from bwlm.cli.terminal import Storage, say, whole_option
from bwlm.errors import UserError
from bwlm.progress import loading

TOKEN = "BWLM_SERVE_TOKEN"


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
    threads: Annotated[int | None, whole_option("CPU threads for the models. Default: all cores.", 1)] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    grace: Annotated[int, whole_option("Seconds that streams may go on after SIGTERM or Ctrl-C.", 0)] = 20,
    storage: Storage = None,
) -> None:
    """Serve models over HTTP: OpenAI's chat and completions, reranking, infilling, and a page for the browser.

    Clients ask for a model as ID, or as ID:backward for a reading (docs/serve.md). Needs `pip install 'bwlm[serve]'`.

    Example: `bwlm serve mine --port 8000`
    """
    from bwlm.chat.access import LOOPBACK, Access
    from bwlm.paths import storage_root
    from bwlm.record.experiment import find_checkpoint

    root, names = storage_root(storage), list(dict.fromkeys(runs))
    for name in names:
        find_checkpoint(root, name)
    if host not in LOOPBACK and not token:
        raise UserError(f"--host {host}: others can reach it: set a token with --token or ${TOKEN}")
    listening = _listen(host, port)
    with listening:
        with loading():
            from bwlm.chat.loading import load_served

            build_app, run_server = _server()
        models = load_served(root, names, slots, waiting, threads, precision)
        app = build_app(models, Access(LOOPBACK | {name.lower() for name in (host, *(allow_host or []))}, token))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        say(f"serving {', '.join(model.name for model in models)} on {address} (Ctrl-C ends it)")
        if open_page:
            webbrowser.open(address)  # it is served as soon as the server runs: the socket listens already
        ended_by = run_server(app, listening, grace)
    if ended_by:
        raise typer.Exit(128 + ended_by)


def _server() -> tuple[Any, Any]:
    """Return the app's factory, and what runs it. Raises `UserError` if the packages for it are missing."""
    try:
        from bwlm.chat.server import build_app, run_server
    except ImportError as error:
        raise UserError(f"bwlm serve needs the package {error.name}: pip install 'bwlm[serve]'") from None
    return build_app, run_server


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `UserError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen on {host}: {error.strerror}: choose another port") from None
