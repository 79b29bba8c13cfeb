"""Commands with the help and the hints of bwlm: flags have no type, and an unknown option names the nearest setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from bwlm.errors import UserError

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _PlainFlags:
    """Help without a type beside flags: `--json`, not `--json <bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters of a command, `--help` among them."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """Command whose unknown options get a hint, if it has `--set`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return the arguments that are left. Raises `UserError` for an unknown option, with the nearest setting."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            options = [option for param in self.params for option in param.opts]
            if not hasattr(error, "possibilities") or "--set" not in options:  # only an unknown option has them
                raise
            unknown = str(getattr(error, "option_name", ""))
            raise UserError(f"{unknown}: no such option{_hint(unknown, options)}") from None


class Group(_PlainFlags, TyperGroup):
    """Group of commands, which names them all where one is unknown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments begin with. Raises `UserError` if there is none of this name."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            given = " ".join([*ctx.command_path.split()[1:], args[0]])
            raise UserError(f"{given}: no such command: give one of {', '.join(self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


class App(typer.Typer):
    """Typer app of such commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Group, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[_Function], _Function]:
        """Return the decorator of a command."""
        return super().command(name, cls=Command, **options)


def _hint(unknown: str, options: list[str]) -> str:
    """Return the option or the setting whose name is nearest, and how a setting is set."""
    from bwlm.config import Experiment
    from bwlm.settings_file import meant_field

    field = meant_field(unknown.lstrip("-").replace("-", "_"), Experiment)
    if not field:
        return ": settings are changed by --set FIELD=VALUE, and docs/grids.md lists them"
    if f"--{field}" in options:
        return f" (did you mean --{field}?); other settings are changed by --set FIELD=VALUE"
    return f" (did you mean --set {field}=VALUE?)"
