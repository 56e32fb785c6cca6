"""nbdpull doctor."""

from __future__ import annotations

import click

from nbdpull import api
from nbdpull.cli.backup import chain_option
from nbdpull.cli.console import Console
from nbdpull.cli.options import repository_option, source_argument, verb
from nbdpull.cli.password import keys_of_user
from nbdpull.cli.run import EXIT_FAILURE, EXIT_WARNINGS
from nbdpull.cli.tables import table
from nbdpull.model.outcomes import FindingKind

__all__ = ["command"]


@click.command("doctor", short_help="Tell what would go wrong in a backup.")
@source_argument
@repository_option(needed=False, text="A repository to look at too.")
@chain_option
@click.option("--vm", metavar="NAME", help="What the VM is called in the repository.")
@click.option("--guest-first", is_flag=True, help="As for 'backup'.")
@click.option("--nbd-address", metavar="URI", help="As for 'backup'.")
@click.option("--scratch", metavar="FOLDER", help="As for 'backup'.")
@verb
def command(
    console: Console,
    source: tuple[str, ...],
    repository: str | None,
    chain: str,
    vm: str | None,
    guest_first: bool,
    nbd_address: str | None,
    scratch: str | None,
) -> int:
    """Look at SOURCE, the scratch folder and the repository, and tell what a backup would stumble over.

    Ends with 1 when a backup would fail, with 3 when there are warnings only.
    """
    result = api.doctor(
        source,
        repository,
        vm=vm,
        chain=chain,
        guest_first=guest_first,
        nbd_address=nbd_address,
        scratch=scratch,
        keys=keys_of_user(),
    )
    rows = [(finding.kind, finding.subject, finding.text) for finding in result.findings]
    console.result(result, lambda: table(("", "what", "found"), rows), needed=True)
    if not result.ok:
        return EXIT_FAILURE
    warned = any(finding.kind is FindingKind.WARNING for finding in result.findings)
    return EXIT_WARNINGS if warned else 0
