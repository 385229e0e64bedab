"""A PostgreSQL server of a test's own, from the distribution's package, run by an unprivileged user on a socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def programs() -> Path | None:
    """Return the folder of the server's programs; None where they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def server() -> Iterator[str]:
    """Run a server while the block runs, and give its URL."""
    binaries = programs()
    assert binaries is not None
    # A socket's path is short, and the folders of pytest are root's alone.
    folder = Path(tempfile.mkdtemp(prefix="secateur-pg-"))
    who: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        who |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data, log = folder / "data", folder / "log"
    try:
        made = [
            binaries / "initdb",
            "-D",
            data,
            "-U",
            "secateur",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--no-locale",
        ]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, **who)
        options = f"-F -k {folder} -c listen_addresses=''"
        control = [binaries / "pg_ctl", "-D", data, "-l", log, "-w", "-t", "120"]
        subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, **who)
        try:
            yield f"postgresql://secateur@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, **who)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
