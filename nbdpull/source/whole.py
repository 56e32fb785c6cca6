"""Blocking work below a source, done as a whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

__all__ = ["finished", "whole"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def finished(step: Awaitable[_T]) -> _T:
    """What `step` returns or raises; when cancelled, its end is waited for before the cancellation goes on.

    For steps that can't be half done, or whose result must be known to be undone: QEMU carries a command
    out whether or not anybody still waits for its reply.
    """
    task = asyncio.ensure_future(step)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is None:
        return task.result()
    failure = None if task.cancelled() else task.exception()
    raise cancelled from failure


async def whole(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `function` returns or raises, run in a thread; when cancelled, its end is waited for."""
    return await finished(asyncio.to_thread(function, *args, **kwargs))
