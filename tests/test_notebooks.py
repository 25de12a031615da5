"""Every notebook's own tests, one notebook a test: `nbdev_test` runs them but prints no count."""
import re
import subprocess
import sys
from pathlib import Path

import forks
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBDEV_TEST = Path(sys.executable).with_name("nbdev_test")


def is_executed(notebook: Path) -> bool:
    """Whether nbdev runs `notebook`: jobs say `skip_exec: true` under their heading, and papermill runs those."""
    cells = nbformat.read(notebook, as_version=4).cells[:2]
    return not any(re.search(r"^(- )?skip_exec: *true", cell.source, re.M) for cell in cells)


def executed_notebooks() -> list[str]:
    """Paths of the notebooks to test, from the root, in reading order."""
    found = (p.relative_to(ROOT) for p in sorted((ROOT / "nbs").rglob("*.ipynb")))
    return [str(p) for p in found if not any(part[0] in "._" for part in p.parts) and is_executed(ROOT / p)]


def has_slow_cells(notebook: str) -> bool:
    return any(cell.source.startswith("#| slow\n") for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "code")


def run_nbdev_test(notebook: str, flags: str = "") -> int:
    """What the command does with one notebook, in this process."""
    from nbdev.config import get_config
    from nbdev.test import test_nb

    passed, _ = test_nb(ROOT / notebook, skip_flags=get_config().tst_flags.split(), force_flags=flags.split(), basepath=ROOT)
    return int(not passed)


@pytest.mark.parametrize(("notebook", "flags"), [pytest.param(name, "slow" * ("tutorials/" in name), id=name) for name in executed_notebooks()])
def test_notebook(notebook, flags):
    """As the command does it, but tutorials to their end."""
    run = forks.call(run_nbdev_test, notebook, flags)
    if run.returncode:
        print(run.stdout, run.stderr)
        pytest.fail(f"its tests fail; alone: nbdev_test --path {notebook}{f' --flags {flags}' if flags else ''}", pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", [name for name in executed_notebooks() if has_slow_cells(name) and "tutorials/" not in name])
def test_notebook_with_its_slow_cells(notebook):
    test_notebook(notebook, "slow")


def test_the_command_itself():
    run = subprocess.run([NBDEV_TEST, "--path", "nbs/00_drawn.ipynb", "--do_print"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "Success." in run.stdout, f"{run.stdout}{run.stderr}"  # it exits 0 too when it found nothing to run
