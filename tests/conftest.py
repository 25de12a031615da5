"""What several tests need: the repository, real data and weights where this machine has them."""
import os
from pathlib import Path

import browser as chromium
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # here and in every process that a test starts
ROOT = Path(__file__).resolve().parent.parent


def folder_or_skip(variable: str, default: Path) -> Path:
    """The folder that the environment names, else `default`; the test is skipped where there is none."""
    folder = Path(os.environ.get(variable) or default)
    if not folder.is_dir():
        pytest.skip(f"no folder at {variable}={folder}: set {variable} to run this test")
    return folder


# Tests of these files share nothing that is dear to make, so two processes may divide them; the others' tests stay together.
DIVIDED = {"test_interrupt", "test_models", "test_notebooks", "test_recipes"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep the tests of a file in one process, where fixtures of the file are made once (`--dist=loadgroup`, see Makefile)."""
    for item in items:
        if item.module.__name__ not in DIVIDED:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache folder that begins empty, for the tests and all processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOODNB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of this checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets: `BLOODNB_DATA`, else `shared/data` beside the checkout."""
    return folder_or_skip("BLOODNB_DATA", ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The folder of published weights: `BLOODNB_WEIGHTS`, else `shared/weights` beside the checkout."""
    return folder_or_skip("BLOODNB_WEIGHTS", ROOT.parent / "shared" / "weights")


@pytest.fixture(scope="session")
def browser():
    """Chromium, one for all tests of a process: Playwright does not run twice in one."""
    executable = chromium.find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=chromium.FLAGS)
        yield opened
        opened.close()
