"""An object store that fails in the worst moments: the result is right, or the error is loud."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from nbdpull.errors import StoreError
from nbdpull.repo.cloud import parse_cloud
from nbdpull.repo.objects import ObjectStore
from nbdpull.repo.patience import Patience
from nbdpull.repo.store import KeyExistsError, KeyMissingError
from tests.support.proxy import Fault, Proxy, Request, proxy
from tests.support.stores import SeaweedFs

FAULTS = [fault for fault in Fault if fault is not Fault.STALE]
IMPATIENT = Patience(
    connect_s=2.0, small_s=0.7, bulk_s=2.0, retry_s=4.0, first_s=2.0, pause_s=0.01, pause_max_s=0.1
)
PACK = random.Random(7).randbytes(3 << 20)


@pytest.fixture
def front(weed: SeaweedFs) -> Iterator[Proxy]:
    with proxy(weed.endpoint) as running:
        yield running


@pytest.fixture
def store(front: Proxy, weed: SeaweedFs, s3: str) -> ObjectStore:
    """The store behind the proxy; it has answered once."""
    made = ObjectStore(
        parse_cloud(s3, {**weed.env, "AWS_ENDPOINT_URL": front.endpoint}), patience=IMPATIENT
    )
    assert not made.exists("nothing")
    front.exchanges.clear()
    return made


def first(front: Proxy, method: str, *faults: Fault) -> None:
    """Let the first requests of that method fail."""
    left = list(faults)

    def plan(request: Request) -> Fault | None:
        return left.pop(0) if request.method == method and left else None

    front.plan = plan


@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_whose_creation_fails_once_is_made_once(
    store: ObjectStore, front: Proxy, fault: Fault
) -> None:
    first(front, "PUT", fault)
    store.create("m/a/b", b"mine")
    upload = store.begin("d/a/0")
    upload.write(0, PACK)
    first(front, "PUT", fault)
    upload.commit()
    front.plan = lambda _request: None
    assert store.get("m/a/b", limit=99) == b"mine"
    assert store.get("d/a/0", limit=len(PACK)) == PACK
    with pytest.raises(KeyExistsError):
        store.create("m/a/b", b"other")


def test_a_pack_that_nothing_answers_is_sent_again_although_waiting_took_longer_than_trying_again(
    front: Proxy, weed: SeaweedFs, s3: str
) -> None:
    patience = replace(IMPATIENT, bulk_s=1.5, retry_s=1.2)
    cloud = parse_cloud(s3, {**weed.env, "AWS_ENDPOINT_URL": front.endpoint})
    store = ObjectStore(cloud, patience=patience)
    assert not store.exists("nothing")
    first(front, "PUT", Fault.HANG)
    upload = store.begin("d/a/0")
    upload.write(0, PACK)
    upload.commit()
    assert store.get("d/a/0", limit=len(PACK)) == PACK


@pytest.mark.parametrize("fault", FAULTS)
def test_a_key_of_another_writer_is_never_taken_for_ones_own(
    store: ObjectStore, front: Proxy, fault: Fault
) -> None:
    store.create("m/a/b", b"theirs")
    first(front, "PUT", fault)
    with pytest.raises(KeyExistsError):
        store.create("m/a/b", b"mine!!")
    front.plan = lambda _request: None
    assert store.get("m/a/b", limit=99) == b"theirs"


def test_a_false_already_exists_costs_a_look_and_a_comparison(
    store: ObjectStore, front: Proxy
) -> None:
    first(front, "PUT", Fault.TWICE)
    store.create("m/a/b", b"mine")
    assert front.calls() == {"PUT": 1, "HEAD": 1, "GET": 1}


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault not in {Fault.FLIP, Fault.CONFLICT}]
)
def test_a_read_that_fails_once_is_read_again(
    store: ObjectStore, front: Proxy, fault: Fault
) -> None:
    store.create("d/a/0", PACK)
    first(front, "GET", fault)
    assert store.get("d/a/0", limit=len(PACK)) == PACK
    first(front, "GET", fault)
    assert store.get_range("d/a/0", 1000, 100_000) == PACK[1000:101_000]
    first(front, "HEAD", fault)
    assert store.stat("d/a/0").size == len(PACK)


@pytest.mark.parametrize("fault", [Fault.BEFORE_503, Fault.AFTER_CLOSE, Fault.TRUNCATE, Fault.HANG])
def test_a_listing_that_breaks_is_whole_or_an_error(
    store: ObjectStore, front: Proxy, fault: Fault
) -> None:
    for number in range(3):
        store.create(f"d/a/{number}", b"x")
    first(front, "GET", fault)
    try:
        listed = [entry.key for entry in store.list("d")]
    except StoreError:
        assert fault is Fault.TRUNCATE
    else:
        assert listed == ["d/a/0", "d/a/1", "d/a/2"]


@pytest.mark.parametrize("fault", [Fault.AFTER_500, Fault.AFTER_CLOSE, Fault.HANG, Fault.TWICE])
def test_a_delete_that_was_carried_out_and_failed_is_no_error(
    store: ObjectStore, front: Proxy, fault: Fault
) -> None:
    store.create("m/a/b", b"x")
    first(front, "DELETE", fault)
    store.delete("m/a/b")
    with pytest.raises(KeyMissingError):
        store.get("m/a/b", limit=9)


def test_a_store_that_keeps_failing_ends_in_one_line(
    front: Proxy, weed: SeaweedFs, s3: str
) -> None:
    store = ObjectStore(
        parse_cloud(s3, {**weed.env, "AWS_ENDPOINT_URL": front.endpoint}),
        patience=Patience(retry_s=0.3, pause_s=0.1),
    )
    front.plan = lambda _request: Fault.BEFORE_503
    for work in (
        lambda: store.create("m/a/b", b"x"),
        lambda: store.get("m/a/b", limit=9),
        lambda: list(store.list("m")),
        lambda: store.delete("m/a/b"),
    ):
        with pytest.raises(StoreError, match="SlowDown: As planned; the store or the network"):
            work()


def test_credentials_and_what_they_sign_are_in_no_message(
    store: ObjectStore, front: Proxy, weed: SeaweedFs
) -> None:
    front.plan = lambda _request: Fault.AFTER_500
    store._patience = Patience(retry_s=0.3)
    with pytest.raises(StoreError) as caught:
        store.create("m/a/b", b"x")
    shown = f"{caught.value} {caught.value.__cause__} {store.cloud!r} {store!r}"
    assert weed.env["AWS_SECRET_ACCESS_KEY"] not in shown
    assert "Signature" not in shown


def test_who_has_never_answered_is_given_up_soon(weed: SeaweedFs, s3: str) -> None:
    env = {**weed.env, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    never = ObjectStore(parse_cloud(s3, env), patience=Patience(first_s=0.5, pause_s=0.1))
    with pytest.raises(StoreError, match=r"can't reach http://127.0.0.1:1 .*Connection refused"):
        never.get("nbdpull.json", limit=9)
    with pytest.raises(StoreError, match="can't reach"):
        list(never.list(""))
