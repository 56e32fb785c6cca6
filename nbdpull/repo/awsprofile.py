"""Profiles of the AWS command line: what ~/.aws/config and ~/.aws/credentials say of one.

Kept small: static keys, `credential_process`, region and endpoint. What else a profile may have (single
sign-on, roles to assume) the AWS command line itself turns into a `credential_process`:

    credential_process = aws configure export-credentials --profile NAME
"""

from __future__ import annotations

import configparser
import json
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from nbdpull.errors import StoreError

__all__ = ["Profile", "load_profile"]

_PROCESS_S: Final = 60.0
_OUTPUT_MAX: Final = 64 << 10
_OTHER_WAYS: Final = ("sso_session", "sso_start_url", "role_arn", "login_session")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One profile, or none when all is None."""

    name: str = "default"
    region: str | None = None
    endpoint: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    process: str | None = field(default=None, repr=False)

    def credentials(self) -> Callable[[], Any] | None:
        """What gives credentials, in obstore's form; None when the profile has none."""
        if self.keys:
            return self._static
        if self.process is not None:
            return self._run
        return None

    def _static(self) -> dict[str, Any]:
        return {
            "access_key_id": self.keys["aws_access_key_id"],
            "secret_access_key": self.keys["aws_secret_access_key"],
            "token": self.keys.get("aws_session_token"),
            "expires_at": None,
        }

    def _run(self) -> dict[str, Any]:
        """Ask the `credential_process`; what it prints is never shown.

        Raises:
            StoreError: it failed.
        """
        try:
            done = subprocess.run(
                shlex.split(self.process or ""),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PROCESS_S,
                check=True,
            )
            given = json.loads(done.stdout[:_OUTPUT_MAX])
            ends = given.get("Expiration")
            return {
                "access_key_id": str(given["AccessKeyId"]),
                "secret_access_key": str(given["SecretAccessKey"]),
                "token": given.get("SessionToken"),
                "expires_at": datetime.fromisoformat(ends)
                if ends
                else datetime.now(UTC) + timedelta(hours=1),
            }
        except (OSError, ValueError, KeyError, AttributeError, subprocess.SubprocessError):
            # Its output and its command line may hold secrets, so neither is the cause handed on.
            raise StoreError(
                f"the credential_process of AWS profile '{self.name}' gave no credentials; run it by"
                " hand to see why"
            ) from None


def load_profile(name: str | None, environ: Mapping[str, str]) -> Profile:
    """The profile `name`; None is AWS_PROFILE or ``default``, which need not be there.

    Raises:
        StoreError: the named one is not there, can't be read, or needs what nbdpull does not do.
    """
    wanted = name or environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE")
    name = wanted or "default"
    home = Path(environ.get("HOME") or "~").expanduser() / ".aws"
    config = Path(environ.get("AWS_CONFIG_FILE") or home / "config").expanduser()
    secrets = Path(environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials").expanduser()
    found: dict[str, str] = {}
    section = name if name == "default" else f"profile {name}"
    there = _read(config, section, found)
    there = _read(secrets, name, found) or there
    if not there and wanted:
        raise StoreError(f"there is no AWS profile '{name}' in {config} or {secrets}")
    keys = {key: value for key, value in found.items() if key.startswith("aws_")}
    whole = {"aws_access_key_id", "aws_secret_access_key"} <= keys.keys()
    process = found.get("credential_process")
    other = next((way for way in _OTHER_WAYS if way in found), None)
    if wanted and not whole and process is None and other is not None:
        raise StoreError(
            f"AWS profile '{name}' uses {other}, which nbdpull does not do itself; give another profile"
            f" 'credential_process = aws configure export-credentials --profile {name}', and use that"
        )
    return Profile(
        name=name,
        region=found.get("region"),
        endpoint=found.get("endpoint_url"),
        keys=keys if whole else {},
        process=process,
    )


def _read(path: Path, section: str, into: dict[str, str]) -> bool:
    """Add the section's settings; returns whether it is there."""
    # No interpolation and no defaults: secrets may have any character.
    parser = configparser.ConfigParser(
        interpolation=None, default_section="", strict=False, delimiters=("=",)
    )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as exc:
        raise StoreError(f"can't read {path}: {exc}") from exc
    try:
        parser.read_string(text)
    except configparser.Error:
        raise StoreError(f"{path} is no file of AWS profiles") from None  # it cites the bad line
    if section not in parser:
        return False
    into.update({key: value.strip() for key, value in parser[section].items() if value})
    return True
