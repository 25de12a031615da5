"""The browser that tests drive."""
import os
import shutil

import pytest

# Chromium asks for its own services at every start; a test has no business with them.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def find_chromium() -> str:
    """The path of Chromium; without one the test is skipped, and in continuous integration it fails."""
    names = [os.environ.get("BLOODNB_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    found = next((shutil.which(name) for name in names if name and shutil.which(name)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no Chromium: install the package chromium, or set BLOODNB_CHROMIUM to a browser")
    return found
