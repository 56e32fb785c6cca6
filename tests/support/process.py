"""Child processes that never outlive the test run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["exec_line", "run", "spawn", "stop"]

# The kernel sends a child its parent-death signal when the *thread* that forked it ends, so every
# child is forked by this one thread, which lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawn")


def exec_line(argv: Sequence[str | Path]) -> list[str]:
    """`argv` behind a wrapper that has it killed when this process dies, however that happens."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *map(str, argv)]


def spawn(
    argv: Sequence[str | Path],
    *,
    stdout: int = subprocess.DEVNULL,
    output: Path | None = None,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `argv` in the background; standard error is appended to `log`.

    Standard output is appended to `output`, else goes to `stdout` (e.g. `subprocess.PIPE`).
    The pid is that of `argv[0]` itself: nothing stands between.
    """
    with contextlib.ExitStack() as stack:
        stderr: int | None = None
        if output is not None:
            stdout = stack.enter_context(output.open("ab")).fileno()
        if log is not None:
            stderr = stack.enter_context(log.open("ab")).fileno()
        return _spawner.submit(
            subprocess.Popen,
            exec_line(argv),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else {**os.environ, **env},
        ).result()


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End `process` with SIGKILL and reap it; one that has ended already is only reaped."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
    process.wait(timeout=30)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def run(
    argv: Sequence[str | Path], *, timeout_s: float = 120.0, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `argv` to its end and return it with its output as text.

    Raises:
        AssertionError: it ended with another code than 0 and `check` is on; both its outputs are
            in the message.
    """
    done = subprocess.run(
        list(map(str, argv)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode != 0:
        line = " ".join(map(str, argv))
        raise AssertionError(f"{line} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done
