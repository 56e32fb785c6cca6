"""From a repository's location to its store: a folder, or a prefix in an object store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from nbdpull.errors import StoreError, UsageError
from nbdpull.model.config import Lock
from nbdpull.repo.deadline import current
from nbdpull.repo.local import LocalStore, folder_call, sync_folder, told
from nbdpull.repo.probe import LISTED, PROBE
from nbdpull.repo.store import Store

__all__ = [
    "CONFIG",
    "REPLICA",
    "check_lockable",
    "is_far",
    "lock_store",
    "new_store",
    "open_store",
    "tidy",
]

CONFIG: Final = "nbdpull.json"
REPLICA: Final = "replica.json"
_CLOUDS: Final = ("s3", "gs", "az")
_SLIP: Final = re.compile(r"(s3|gs|az)(:|//|:/)")
# In an otherwise empty folder: what mkfs makes, and what an `init` that was killed leaves.
_NOTHING: Final = re.compile(
    rf"lost\+found|key(/.*)?|replica\.json|{PROBE}[0-9a-f]{{16}}.*|\.tmp-.*"
)


def open_store(location: str) -> Store:
    """The store at a location; whether a repository is in it is not looked at.

    Raises:
        UsageError: the location can't be.
        StoreError: what the environment says of that object store can't be.
    """
    if _scheme(location) in _CLOUDS:
        # The library takes a while to load, and most repositories are folders.
        from nbdpull.repo.cloud import parse_cloud  # noqa: PLC0415
        from nbdpull.repo.objects import ObjectStore  # noqa: PLC0415

        return ObjectStore(parse_cloud(location, os.environ))
    return LocalStore(_folder(location))


def is_far(location: str) -> bool:
    """Whether a location is of an object store, where each request costs."""
    return _scheme(location) in _CLOUDS


def tidy(store: Store) -> None:
    """Remove what killed writers left that is no object; only a folder can have such."""
    if isinstance(store, LocalStore):
        store.remove_leftovers()


def lock_store(store: Store, lock: Lock, *, trial: str | None = None) -> None:
    """Have the store lock what backups consist of; `trial` is a key to try it with before.

    Raises:
        StoreError: the store has no locks, or the trial failed.
    """
    from nbdpull.repo.objects import ObjectStore  # noqa: PLC0415

    if not isinstance(store, ObjectStore) or store.cloud.scheme != "s3":
        raise StoreError(
            "the repository's settings ask for locks, which only S3 has; was it copied?"
        )
    if trial is not None:
        store.try_lock(lock, trial)
    store.lock(lock)


def check_lockable(location: str) -> None:
    """See that it is a place where objects can be locked.

    Raises:
        UsageError: it is none.
    """
    if _scheme(location) != "s3":
        raise UsageError("only a repository in S3 can be locked; leave --lock out, or use s3://")


def new_store(location: str) -> tuple[Store, int]:
    """An empty store at a location, and how many keys a trial listing of it should have.

    A folder is made. The clouds' own services are known to list well beyond one answer's 1,000 keys;
    what answers at an endpoint of the user's is not.

    Raises:
        UsageError: the location can't be, is a repository already, or holds something else.
        StoreError: the store can't be used.
    """
    if _scheme(location) in _CLOUDS:
        return _new_prefix(location)
    root = _folder(location)
    folder_call(current.get(), "make", root, lambda: _new_folder(root))
    return LocalStore(root), 0


def _new_folder(root: Path) -> None:
    with told("use", root):
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is a file, expected a folder or nothing")
        if (root / CONFIG).exists():
            raise UsageError(f"{root} is a repository already; use it, or choose another folder")
        if root.exists() and not all(_NOTHING.fullmatch(path.name) for path in root.iterdir()):
            raise UsageError(f"{root} is not empty; choose an empty or a new folder")
        for above in root.parents:
            if (above / CONFIG).exists():
                raise UsageError(
                    f"{root} is inside of the repository {above}; choose a folder outside of it"
                )
    _make_root(root)


def _new_prefix(location: str) -> tuple[Store, int]:
    from nbdpull.repo.cloud import parse_cloud  # noqa: PLC0415
    from nbdpull.repo.objects import ObjectStore  # noqa: PLC0415

    store = ObjectStore(parse_cloud(location, os.environ))
    for key in store.anything():
        if key == CONFIG or not _NOTHING.fullmatch(key):
            if store.exists(CONFIG):
                raise UsageError(
                    f"{store.cloud} is a repository already; use it, or choose another prefix"
                )
            raise UsageError(f"{store.cloud} is not empty; choose an empty or a new prefix")
    unknown = store.cloud.scheme == "s3" and store.cloud.endpoint is not None
    return store, LISTED if unknown else 0


def _scheme(location: str) -> str:
    if not location:
        raise UsageError(
            "the repository's location is empty; give a folder, or s3://, gs:// or az://, with -r"
        )
    return location.partition("://")[0] if "://" in location else ""


def _folder(location: str) -> Path:
    """The folder of a location.

    Raises:
        UsageError: a location of another kind.
    """
    if "://" not in location:
        slip = _SLIP.match(location)
        if slip is not None and not Path(location).exists():
            raise UsageError(
                f"repository '{location}' would be a folder; did you mean {slip[1]}://...? (a folder of that name:"
                f" ./{location})"
            )
        return Path(location).absolute()
    parts = urlsplit(location)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path:
        return Path(unquote(parts.path)).absolute()
    raise UsageError(
        f"repository {location.partition('://')[0]}://... is of a kind that this version does not know;"
        " expected a folder, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
    )


def _make_root(root: Path) -> None:
    """Make the folder, and its entry and those above it durable."""
    with told("make", root):
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
        for folder in missing or [root]:
            sync_folder(folder.parent)
