"""docs/cli.md and the command line say the same."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import click
import pytest

import nbdpull
from nbdpull.cli.main import program

DOCS = Path(__file__).parents[2] / "docs"
CLI_MD = (DOCS / "cli.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {title}.*?(?=^## |\Z)", CLI_MD, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[0]


@pytest.mark.parametrize("verb", program.list_commands(click.Context(program)))
def test_every_option_is_documented(verb: str) -> None:
    command = program.get_command(click.Context(program), verb)
    assert command is not None
    text = section(f"nbdpull {verb}") + section("Every command")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for option in parameter.opts:
                assert f"`{option}" in text, option


def test_every_exit_code_is_documented() -> None:
    codes = {
        value.exit_code
        for value in (getattr(nbdpull, name) for name in nbdpull.__all__)
        if inspect.isclass(value) and issubclass(value, nbdpull.Error)
    }
    for text in (section("Exit codes"), (DOCS.parent / "README.md").read_text(encoding="utf-8")):
        assert [code for code in (0, 3, *codes) if f"\n| {code} |" not in text] == []


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("nbdpull init", nbdpull.InitResult),
        ("nbdpull backup", nbdpull.BackupResult),
        ("nbdpull backup", nbdpull.DiskInfo),
        ("nbdpull backup", nbdpull.GuestCost),
        ("nbdpull backup", nbdpull.Quiesced),
        ("nbdpull restore", nbdpull.RestoreResult),
        ("nbdpull restore", nbdpull.RestoredDisk),
        ("nbdpull verify", nbdpull.VerifyResult),
        ("nbdpull verify", nbdpull.Damage),
        ("nbdpull cleanup", nbdpull.CleanupResult),
        ("nbdpull forget", nbdpull.ForgetResult),
        ("nbdpull forget", nbdpull.Forgotten),
        ("nbdpull undo", nbdpull.UndoResult),
        ("nbdpull protect", nbdpull.ProtectResult),
        ("nbdpull unprotect", nbdpull.ProtectResult),
        ("nbdpull gc", nbdpull.GcResult),
        ("nbdpull copy", nbdpull.CopyResult),
        ("nbdpull repack", nbdpull.RepackResult),
        ("nbdpull estimate", nbdpull.EstimateResult),
        ("nbdpull estimate", nbdpull.DiskEstimate),
        ("nbdpull doctor", nbdpull.DoctorResult),
        ("nbdpull doctor", nbdpull.Finding),
    ],
)
def test_every_json_key_is_documented(title: str, kind: type) -> None:
    text = section(title)
    for field in dataclasses.fields(kind):
        assert f"`{field.name}`" in text or f'"{field.name}":' in text, field.name


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in (DOCS.parent / "README.md", *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
