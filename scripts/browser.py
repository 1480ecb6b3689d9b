"""Headless Chromium, for pictures of pages and to see that they work."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


def browser() -> str | None:
    """Path of Chromium; None: it is not installed (Debian's package is `chromium`)."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def open_page(page: Path, picture: Path, size: tuple[int, int]) -> tuple[str, list[str]]:
    """Open a file, wait until it is drawn, and take a picture.

    Returns:
        The document as it is then, and what the page wrote to the console.
    """
    document, _ = _run(page, size, "--dump-dom")
    _, log = _run(page, size, f"--screenshot={picture}")
    return document, [line for line in log.splitlines() if ":CONSOLE" in line]


def _run(page: Path, size: tuple[int, int], what: str) -> tuple[str, str]:
    window = f"--window-size={size[0]},{size[1]}"
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [str(browser()), *_QUIET, f"--user-data-dir={profile}", window, what, page.as_uri()],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
    return done.stdout, done.stderr
