"""`bwlm storage`: commands that look after a storage."""

from __future__ import annotations

from bwlm.cli.app import App
from bwlm.cli.bucket import pull, push

storage_app = App(help="Look after a storage.", no_args_is_help=True)
storage_app.command("push")(push)
storage_app.command("pull")(pull)
