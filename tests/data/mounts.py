"""File systems of a test's own: full, read-only, and gone with the process that mounted them."""

import subprocess
from pathlib import Path

import pytest

NOT_MOUNTED = 77


def in_own_mounts(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a bash script, in which $1 … are the arguments, in a mount namespace of its own.

    It ends with NOT_MOUNTED where a mount is refused; then, and where there are no such namespaces
    for us (some containers), the test is skipped.
    """
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "-", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode == NOT_MOUNTED or "unshare failed" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    return done
