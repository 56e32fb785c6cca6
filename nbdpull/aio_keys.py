"""The verbs of `nbdpull key` as coroutines: a part of `nbdpull.aio`, which has their names."""
# As in `nbdpull.aio`, a verb's modules are imported when it is first called.
# ruff: noqa: PLC0415

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from nbdpull.errors import UsageError

if TYPE_CHECKING:
    from nbdpull.model.crypto import KdfName
    from nbdpull.model.keysource import KeySource
    from nbdpull.model.outcomes import KeyExport, KeyInfo
    from nbdpull.ops.key import KeyOptions

__all__ = [
    "kdf_name",
    "key_add",
    "key_export",
    "key_import",
    "key_list",
    "key_remove",
    "key_rotate",
]


async def key_list(repository: str | os.PathLike[str]) -> tuple[KeyInfo, ...]:
    """The key slots of an encrypted repository, newest keys first; no password is needed.

    Args:
        repository: where they are.

    Raises:
        RepositoryNotFoundError: there is no repository.
        UsageError: it is not encrypted.
    """
    from nbdpull.ops import key as op

    return await op.key_list(op.KeyOptions(repository=os.fspath(repository)))


async def key_add(
    repository: str | os.PathLike[str],
    *,
    keys: KeySource | None = None,
    new: KeySource | None = None,
    label: str = "",
    kdf: Literal["argon2id", "scrypt"] = "argon2id",
) -> KeyInfo:
    """Let a new password open the repository too.

    Args:
        repository: which one.
        keys: what opens it now; None looks in the environment.
        new: the new password; None looks for NBDPULL_NEW_PASSWORD, _FILE or _COMMAND.
        label: for people; it is not encrypted.
        kdf: what the password of the new slot goes through.

    Raises:
        WrongKeyError: the repository does not open, or there is no new password.
        UsageError: the repository is not encrypted, or the key given is an old or a writer's one.
    """
    from nbdpull.ops import key as op

    return await op.key_add(_key_options(op.KeyOptions, repository, keys, new, label, kdf))


async def key_remove(
    repository: str | os.PathLike[str], key: str, *, force: bool = False
) -> KeyInfo:
    """Delete a key slot. Who has a copy of it, and its password, still opens what is there: see `key_rotate`.

    Args:
        repository: which one.
        key: the slot's id, or a unique beginning of it.
        force: also the last slot of the newest keys.

    Raises:
        UsageError: no such slot, or the last one.
    """
    from nbdpull.ops import key as op

    options = op.KeyOptions(repository=os.fspath(repository))
    return await op.key_remove(options, key, force=force)


async def key_rotate(
    repository: str | os.PathLike[str],
    *,
    keys: KeySource | None = None,
    new: KeySource | None = None,
    label: str = "",
    kdf: Literal["argon2id", "scrypt"] = "argon2id",
) -> KeyInfo:
    """Seal what is written from now on to new keys, in a slot under a new, or else the same, password.

    The other slots and every exported key open what was there before, and nothing newer: add their
    passwords again, and export the others again.

    Args:
        repository: which one.
        keys: what opens it now; None looks in the environment.
        new: the new password; None looks for NBDPULL_NEW_PASSWORD, _FILE or _COMMAND.
        label: for people; it is not encrypted.
        kdf: what the password of the new slot goes through.

    Raises:
        WrongKeyError: the repository does not open.
        UsageError: it is not encrypted, the key given is an old or a writer's one, or it is a file and
            there is no new password.
    """
    from nbdpull.ops import key as op

    return await op.key_rotate(_key_options(op.KeyOptions, repository, keys, new, label, kdf))


async def key_export(
    repository: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    writer: bool = False,
    keys: KeySource | None = None,
) -> KeyExport:
    """Write a key into a new file, which only its owner may read, for use in NBDPULL_KEY_FILE.

    Args:
        repository: which one.
        file: is made.
        writer: a key that adds backups and can't read the data of any; else the recovery key.
        keys: what opens the repository; None looks in the environment.

    Raises:
        WrongKeyError: the repository does not open.
        UsageError: the file exists, or the repository is not encrypted.
    """
    from nbdpull.ops import key as op

    options = op.KeyOptions(repository=os.fspath(repository), keys=keys)
    return await op.key_export(options, os.fspath(file), writer=writer)


async def key_import(
    repository: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    new: KeySource | None = None,
    label: str = "",
    kdf: Literal["argon2id", "scrypt"] = "argon2id",
) -> KeyInfo:
    """Let a new password open the repository with an exported recovery key: the old one is lost.

    Args:
        repository: which one.
        file: the recovery key.
        new: the new password; None looks for NBDPULL_NEW_PASSWORD, _FILE or _COMMAND.
        label: for people; it is not encrypted.
        kdf: what the password of the new slot goes through.

    Raises:
        WrongKeyError: the file is no recovery key of this repository, or there is no new password.
        UsageError: the repository is not encrypted.
    """
    from nbdpull.ops import key as op

    options = _key_options(op.KeyOptions, repository, None, new, label, kdf)
    return await op.key_import(options, os.fspath(file))


def _key_options(
    kind: type[KeyOptions],
    repository: str | os.PathLike[str],
    keys: KeySource | None,
    new: KeySource | None,
    label: str,
    kdf: str,
) -> KeyOptions:
    from nbdpull.model.keysource import KeySource

    return kind(
        repository=os.fspath(repository),
        keys=keys,
        new=new or KeySource(),
        label=label,
        kdf=kdf_name(kdf),
    )


def kdf_name(name: str) -> KdfName:
    """The key derivation that is called so.

    Raises:
        UsageError: none is.
    """
    from nbdpull.model.crypto import KdfName

    try:
        return KdfName(name)
    except ValueError as exc:
        raise UsageError(
            f"the key derivation is '{name}'; expected {' or '.join(KdfName)}"
        ) from exc
