"""Reading intents: `s/<sid>`."""

from __future__ import annotations

from nbdpull.model.frame import FormatError
from nbdpull.model.intent import INTENT_MAX, Intent
from nbdpull.repo.store import Store

__all__ = ["read_intent"]


def read_intent(store: Store, session: str) -> Intent:
    """The intent of a session.

    Raises:
        KeyMissingError: it has none.
        FormatError: it is damaged, of another session, or longer than any.
        StoreError: it can't be read now.
    """
    raw = store.get_range(f"s/{session}", 0, INTENT_MAX + 1)
    if len(raw) > INTENT_MAX:
        raise FormatError(f"it has more than {INTENT_MAX} bytes, which no intent has")
    return Intent.decode(raw, session)
