"""init: a new, empty repository."""

from __future__ import annotations

from dataclasses import dataclass

from nbdpull.model.results import InitResult
from nbdpull.ops.threads import call
from nbdpull.repo.repository import Repository

__all__ = ["InitOptions", "init"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """Where to create it."""

    repository: str


async def init(options: InitOptions) -> InitResult:
    """Create a repository.

    Raises:
        UsageError: there is one already, or a folder that holds something else.
        StoreError: the storage refused, or can't keep what a repository promises.
    """
    repository = await call(Repository.create, options.repository)
    return InitResult(repository=repository.location, id=repository.id)
