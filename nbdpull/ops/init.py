"""init: a new, empty repository."""

from __future__ import annotations

from dataclasses import dataclass

from nbdpull.errors import UsageError, WrongKeyError
from nbdpull.model.config import Lock
from nbdpull.model.crypto import KdfName
from nbdpull.model.keyring import KDFS
from nbdpull.model.keysource import KeySource
from nbdpull.model.outcomes import InitResult
from nbdpull.ops.threads import call
from nbdpull.repo.password import KEY_FILE, PASSWORD, password_of, wants_key
from nbdpull.repo.repository import Repository

__all__ = ["InitOptions", "init"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """Where to create it, and how.

    Attributes:
        encrypt: everything in it, under the password that `keys` gives.
        keys: None looks in the environment.
        lock: of what backups consist of; None is none.
        kdf: what the password goes through.
    """

    repository: str
    encrypt: bool = False
    keys: KeySource | None = None
    lock: Lock | None = None
    kdf: KdfName = KdfName.ARGON2ID


async def init(options: InitOptions) -> InitResult:
    """Create a repository.

    Raises:
        UsageError: there is one already, or a place that holds something else.
        StoreError: the storage refused, or can't keep what a repository promises.
        WrongKeyError: it is to be encrypted and no password is given.
    """
    return await call(_init, options)


def _init(options: InitOptions) -> InitResult:
    keys = options.keys or KeySource()
    password = None
    if options.encrypt:
        password = password_of(keys)
        if password is None:
            raise WrongKeyError(
                f"no password is given for the new repository; set {PASSWORD}_FILE, {PASSWORD}_COMMAND"
                f" or {PASSWORD}"
            )
    elif wants_key(keys):
        raise UsageError(
            "a key is given, and the new repository is not to be encrypted; give --encrypt, or unset"
            f" {PASSWORD}, _FILE, _COMMAND and {KEY_FILE}"
        )
    repository = Repository.create(
        options.repository, password=password, kdf=KDFS[options.kdf], lock=options.lock
    )
    return InitResult(
        repository=repository.location,
        id=repository.id,
        encrypted=password is not None,
        warnings=repository.warnings,
    )
