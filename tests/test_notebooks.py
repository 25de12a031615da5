"""Every notebook's own tests, one notebook a test: `nbdev_test` runs them but prints no count."""
import os
import re
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("notebook", executed_notebooks())
def test_notebook(notebook):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([NBDEV_TEST, "--path", notebook, "--do_print"], cwd=ROOT, env=environment, capture_output=True, text=True)
    # nbdev_test also exits 0 when it found nothing to run.
    if run.returncode or "Success." not in run.stdout:
        print(run.stdout, run.stderr)
        pytest.fail(f"its tests fail; alone: nbdev_test --path {notebook}", pytrace=False)
