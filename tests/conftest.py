"""What several tests need: the repository, real data and weights where this machine has them."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # here and in every process that a test starts
ROOT = Path(__file__).resolve().parent.parent


def folder_or_skip(variable: str, default: Path) -> Path:
    """The folder that the environment names, else `default`; the test is skipped where there is none."""
    folder = Path(os.environ.get(variable) or default)
    if not folder.is_dir():
        pytest.skip(f"no folder at {variable}={folder}: set {variable} to run this test")
    return folder


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
