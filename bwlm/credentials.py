"""Secrets in addresses: refused, with the variable to use instead, and never printed.

Settings are kept in a run's folder, in MLflow and in logs, where many people can read them. So an address may not
hold a password, a key or a signed query: the libraries that open it take them from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from bwlm.errors import UserError

_PASSWORD = re.compile(r"(?<=:/)(/?(?!\[)[^/?#\s@:]*):(?!\d{1,5}(?:[/?#]|$))[^\s@]*(?:@[^/?#\s@]*)*@")
"""Password of an address, as in `user:password@`. It may hold slashes, ? and #; `host:8000/name@revision` has none.

One slash after the scheme is enough, because a `Path` loses the other.
"""
_LOGIN = re.compile(r"(https?://?)([^/\s@]+)@")
"""Login of an HTTP address, `token@`. In other schemes a name before the host is a user or a container."""
_KNOWN = re.compile(r"(?<![A-Za-z0-9])(?:hf_|gh[pousr]_|github_pat_|glpat-|AKIA|ASIA)[A-Za-z0-9_-]{16,}")
"""Tokens that are known by how they begin: Hugging Face, GitHub, GitLab, AWS."""
_WEBHOOK = re.compile(
    r"(?<=://)((?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks|[\w.-]*webhook\.office\.com)/)[^\s?#]+"
)
"""Path of a web hook: whoever knows it can write there."""
_NAMED = re.compile(r"\$\{\w+\}")
"""Environment variable in the place of a secret."""
_PARAMETER = re.compile(r"(?:(?<=[?&;#])|^)([\w.-]+)=([^?&;#\s]+)")
_SECRET_PARTS = (
    *("secret", "passw", "signature", "credential", "accesskey", "accountkey", "apikey", "privatekey"),
    *("sessionkey", "authorization"),
)
_SECRET_NAMES = frozenset(
    {"sig", "sas", "pwd", "pass", "auth", "jwt", "bearer", "hmac", "ticket", "keypairid", "awsaccesskeyid"}
)
_AWS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_AZURE = "AZURE_STORAGE_CONNECTION_STRING"
_GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS"
_VARIABLES = (
    (("postgresql", "postgres"), "PGPASSWORD, or a line in ~/.pgpass"),
    (("mysql", "mariadb"), "a file named by ?read_default_file=, such as ~/.my.cnf"),
    (("s3", "s3a"), _AWS),
    (("gs", "gcs"), _GOOGLE),
    (("az", "abfs", "abfss", "adl"), _AZURE),
    (("hf",), "HF_TOKEN"),
    (("github",), "FSSPEC_GITHUB_USERNAME and FSSPEC_GITHUB_TOKEN"),
)
_OF_DATA = f"{_AWS} (s3://), {_GOOGLE} (gs://), {_AZURE} (az://), HF_TOKEN (hf://), or FSSPEC_HTTPS (JSON) for https://"
_NOTIFY = "launch.notify"
_OF_TRACKING = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


def refuse_secret(address: str, field: str) -> None:
    """Raise `UserError` that names the field, the kind of secret and the variable to use, but not the secret."""
    if fault := secret_in(address, field):
        raise UserError(fault)


def secret_in(address: str, field: str) -> str | None:
    """Return `field: holds <kind of secret>: take it out, and set <variable>`; None for an address without a secret."""
    if not _may_hold_secret(address):
        return None
    address = _NAMED.sub("", address)
    parts = address.split() if field.endswith(_NOTIFY) else [address]  # a command has several words
    kind = next(filter(None, (_kind(part) or _kind(unquote(part)) for part in parts)), None)
    return None if kind is None else f"{field}: holds {kind}: take it out, and set {_variables(address, field)}"


def secrets_in(content: Any, field: str = "") -> Iterator[str]:
    """Yield the `secret_in` of every text in nested settings, names of fields included, by dotted field."""
    if not _may_hold_secret(content):
        return
    if isinstance(content, str):
        fault = secret_in(content, field)
        yield from [fault] if fault else []
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from secrets_in(str(name), field or "a field's name")
            yield from secrets_in(value, ".".join(filter(None, (field, masked(str(name))))))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from secrets_in(value, field)


def _may_hold_secret(content: Any) -> bool:
    """Return false for nested settings without a text that could be an address: a quick look, since most have none."""
    if isinstance(content, str):
        return "//" in content or ";" in content or "%" in content  # `_kind` needs one, as it stands or unquoted
    if isinstance(content, dict):
        return any(_may_hold_secret(str(name)) or _may_hold_secret(value) for name, value in content.items())
    return isinstance(content, list | tuple) and any(map(_may_hold_secret, content))


def masked(text: str) -> str:
    """Return a text with *** in the place of each secret in the addresses that it quotes."""
    text = _WEBHOOK.sub(r"\1***", _KNOWN.sub("***", _PASSWORD.sub(r"\1:***@", text)))
    text = _LOGIN.sub(lambda match: match[0] if match[2].endswith(":***") else f"{match[1]}***@", text)
    return _PARAMETER.sub(lambda match: f"{match[1]}=***" if _is_secret(match[1]) else match[0], text)


def _kind(address: str) -> str | None:
    if address.startswith("//"):
        address = f"scheme:{address}"
    unbroken = re.sub(r"\s", "_", address)  # a password may hold blanks, which `_PASSWORD` does not match
    if "://" in address and (_PASSWORD.search(unbroken) or _LOGIN.search(unbroken) or _KNOWN.search(address)):
        return "a user's password or token"
    if _WEBHOOK.search(address):
        return "the secret path of a web hook"
    if "://" in address or ";" in address:
        names = [name for name, _ in _PARAMETER.findall(address) if _is_secret(name)]
        return f"a secret in {names[0]}=" if names else None
    return None


def _is_secret(name: str) -> bool:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return plain in _SECRET_NAMES or plain.endswith(("token", "key")) or any(part in plain for part in _SECRET_PARTS)


def _variables(address: str, field: str) -> str:
    if field.endswith(_NOTIFY):
        return "a variable of your own, and write ${ITS_NAME} in its place"
    scheme = address.partition("://")[0].rpartition("::")[2].partition("+")[0].lower()
    for schemes, variables in _VARIABLES:
        if scheme in schemes:
            return variables
    return _OF_TRACKING if "tracking" in field.lower() else _OF_DATA
