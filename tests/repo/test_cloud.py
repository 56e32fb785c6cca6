"""Locations, and where credentials come from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from nbdpull.errors import StoreError, UsageError
from nbdpull.repo.cloud import parse_cloud
from nbdpull.repo.local import LocalStore
from nbdpull.repo.location import new_store, open_store
from nbdpull.repo.objects import ObjectStore

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "s3cret"}
AZURE = {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": "s3cret"}


@pytest.fixture
def home(tmp_path: Path) -> Mapping[str, str]:
    """An environment with nothing in it but a home of profiles."""
    folder = tmp_path / ".aws"
    folder.mkdir()
    (folder / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile minio]\nendpoint_url=https://minio.example:9000\n"
        "region=eu-north-1\n[profile sso]\nsso_session = x\n"
        f"[profile asked]\ncredential_process = {sys.executable} '{folder}/ask me.py'\n"
        f'[profile broken]\ncredential_process = {sys.executable} -c "print(1)" s3cret\n'
    )
    (folder / "credentials").write_text(
        "[default]\naws_access_key_id = dk\naws_secret_access_key = d%s3cret\n"
        "[minio]\naws_access_key_id=mk\naws_secret_access_key=ms3cret\naws_session_token=mt\n"
    )
    answer = (
        '{"Version": 1, "AccessKeyId": "ask", "SecretAccessKey": "s3cret%", "SessionToken": "tok",'
        ' "Expiration": "2099-01-01T00:00:00Z"}'
    )
    (folder / "ask me.py").write_text(f"print({answer!r})")
    return {"HOME": str(tmp_path)}


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b_c/", "s3://bucket/a/b_c"),
        ("s3://bucket/a?region=eu-west-1&endpoint=https://h:9", "s3://bucket/a"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("az://container/a?account=acc", "az://container/a"),
    ],
)
def test_a_location_is_a_bucket_and_a_prefix(location: str, text: str) -> None:
    assert str(parse_cloud(location, KEYS | AZURE)) == text


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("s3://", "no name of a bucket"),
        ("s3:///prefix", "no name of a bucket"),
        ("s3://b/../x", "bucket"),
        ("s3://bucket/../x", "can't be in a repository's prefix"),
        ("s3://bucket/a//b", "can't be in a repository's prefix"),
        ("s3://bucket/a b", "can't be in a repository's prefix"),
        ("s3://key:s3cret@bucket/a", "must not hold a user or a secret"),
        ("s3://bucket/a?secret=s3cret", "has no option 'secret'"),
        ("gs://bucket/a?endpoint=https://h", "has no option 'endpoint'"),
        ("s3://bucket/a#b", "'#'"),
    ],
)
def test_a_location_that_can_not_be_is_told_without_its_secrets(
    location: str, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        parse_cloud(location, KEYS)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "location", ["ftp://user:s3cret@host/x", "http://host", "S3://b", "file://h/x"]
)
def test_other_kinds_of_locations_are_refused(location: str) -> None:
    for call in (open_store, new_store):
        with pytest.raises(UsageError, match="of a kind that this version does not know") as caught:
            call(location)
        assert "s3cret" not in str(caught.value)


def test_a_folder_and_a_file_url_are_folders(tmp_path: Path) -> None:
    for location in (str(tmp_path), f"file://{tmp_path}"):
        store = open_store(location)
        assert isinstance(store, LocalStore)
        assert store.root == tmp_path
    with pytest.raises(UsageError, match="is empty"):
        open_store("")


def test_an_object_store_is_opened_without_any_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}).items():
        monkeypatch.setenv(name, value)
    assert isinstance(open_store("s3://bucket/prefix"), ObjectStore)


def test_keys_of_the_environment_come_first(home: Mapping[str, str]) -> None:
    cloud = parse_cloud("s3://bucket", {**home, **KEYS})
    assert cloud.credentials is None
    assert cloud.endpoint is None


def test_a_profile_gives_keys_region_and_endpoint(home: Mapping[str, str]) -> None:
    for cloud in (
        parse_cloud("s3://bucket", {**home, "AWS_PROFILE": "minio"}),
        parse_cloud("s3://bucket?profile=minio", {**home, **KEYS}),
    ):
        assert cloud.endpoint == "https://minio.example:9000"
        assert cloud.config["region"] == "eu-north-1"
        assert cloud.credentials is not None
        assert cloud.credentials() == {
            "access_key_id": "mk",
            "secret_access_key": "ms3cret",
            "token": "mt",
            "expires_at": None,
        }


def test_the_default_profile_needs_no_name_and_takes_any_character(
    home: Mapping[str, str],
) -> None:
    cloud = parse_cloud("s3://bucket", home)
    assert cloud.credentials is not None
    assert "d%s3cret" in cloud.credentials().values()
    assert cloud.config["region"] == "eu-west-1"


def test_without_any_profile_the_instance_is_asked(tmp_path: Path) -> None:
    assert parse_cloud("s3://bucket", {"HOME": str(tmp_path)}).credentials is None


def test_a_credential_process_is_asked(home: Mapping[str, str]) -> None:
    cloud = parse_cloud("s3://bucket?profile=asked", home)
    assert cloud.credentials is not None
    given = cloud.credentials()
    assert (given["access_key_id"], given["secret_access_key"]) == ("ask", "s3cret%")
    assert "tok" in given.values()
    assert given["expires_at"].year == 2099


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ("nosuch", "there is no AWS profile 'nosuch'"),
        ("sso", "uses sso_session, which nbdpull does not do itself; .*credential_process"),
    ],
)
def test_a_profile_that_can_not_be_used_is_told(
    home: Mapping[str, str], profile: str, problem: str
) -> None:
    with pytest.raises(StoreError, match=problem):
        parse_cloud(f"s3://bucket?profile={profile}", home)
    with pytest.raises(StoreError, match=problem):
        parse_cloud("s3://bucket", {**home, "AWS_PROFILE": profile})


def test_a_credential_process_that_fails_shows_none_of_its_words(home: Mapping[str, str]) -> None:
    cloud = parse_cloud("s3://bucket?profile=broken", home)
    assert cloud.credentials is not None
    with pytest.raises(StoreError, match="of AWS profile 'broken' gave no credentials") as caught:
        cloud.credentials()
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "allowed"),
    [("https://h:9000", False), ("http://127.0.0.1:9000", True), ("http://localhost", True)],
)
def test_plain_http_is_taken_on_this_machine(url: str, *, allowed: bool) -> None:
    cloud = parse_cloud("s3://bucket", KEYS | {"AWS_ENDPOINT_URL": url})
    assert (cloud.endpoint, cloud.allow_http) == (url, allowed)


def test_plain_http_elsewhere_must_be_told() -> None:
    env = KEYS | {"AWS_ENDPOINT_URL": "http://10.0.0.1:9000"}
    with pytest.raises(StoreError, match=r"not encrypted; use https, or set AWS_ALLOW_HTTP=true"):
        parse_cloud("s3://bucket", env)
    assert parse_cloud("s3://bucket", env | {"AWS_ALLOW_HTTP": "true"}).allow_http


@pytest.mark.parametrize(
    "url", ["host:9000", "ftp://h", "https://", "https://h:x", "https://h o", "http://h/?a=b"]
)
def test_an_endpoint_that_is_none_is_told(url: str) -> None:
    with pytest.raises((StoreError, UsageError), match="endpoint"):
        parse_cloud("s3://bucket", KEYS | {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "1"})


def test_the_endpoint_of_the_location_beats_the_environment() -> None:
    env = KEYS | {"AWS_ENDPOINT_URL": "https://other", "AWS_ENDPOINT_URL_S3": "https://s3"}
    assert parse_cloud("s3://bucket?endpoint=https://mine", env).endpoint == "https://mine"
    assert parse_cloud("s3://bucket", env).endpoint == "https://s3"


def test_azure_takes_a_connection_string_a_key_or_a_signature() -> None:
    text = "AccountName=acc;AccountKey=a2V5PT0=;EndpointSuffix=core.example"
    cloud = parse_cloud("az://cont", {"AZURE_STORAGE_CONNECTION_STRING": text})
    assert cloud.endpoint == "https://acc.blob.core.example"
    assert cloud.config["account_key"] == "a2V5PT0="
    signed = {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_SAS_TOKEN": "?sig=x"}
    assert parse_cloud("az://cont", signed).config["sas_key"] == "sig=x"
    with pytest.raises(StoreError, match="in no known account; set AZURE_STORAGE_ACCOUNT"):
        parse_cloud("az://cont", {})


def test_nothing_secret_is_in_what_a_place_shows(home: Mapping[str, str]) -> None:
    for cloud in (
        parse_cloud("s3://bucket?profile=minio", home),
        parse_cloud("az://cont", AZURE),
    ):
        assert "s3cret" not in f"{cloud} {cloud!r} {cloud.at}"


def test_a_certificate_that_is_not_there_is_told() -> None:
    with pytest.raises(StoreError, match="AWS_CA_BUNDLE: No such file"):
        parse_cloud("s3://bucket", KEYS | {"AWS_CA_BUNDLE": "/nonexistent/ca.pem"})
