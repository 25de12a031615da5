"""Put the cell that fetches bloodnb on Colab and Kaggle, and the two badges, into the job notebooks: the same in all of them.

    python .ci/install_cell.py                     # every job, after a change of the text below
    python .ci/install_cell.py nbs/new_job.ipynb   # some
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/bloodnb/bloodnb"
EXTRAS = {"tune": "[tune]"}  # jobs that need more than the library
# A lent machine's packages fit its driver and one another, so every one of them is held to its version.
CELL = '''
try:  # on Colab and Kaggle: fetches bloodnb if it is not there; what is installed keeps its version
    import bloodnb
except ImportError:
    import importlib.metadata, os, re, subprocess, sys, tempfile
    source = os.environ.get("BLOODNB_SOURCE", "git+REPOSITORY")
    there = reversed(list(importlib.metadata.distributions()))  # of two versions the one that is imported
    held = {re.sub("[-_.]+", "-", one.name).lower(): one.version for one in there if one.name and re.fullmatch("[0-9][0-9A-Za-z.+!]*", one.version or "")}
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as constraints:
        constraints.write("\\n".join(f"{name}=={version}" for name, version in held.items()))
    if subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, f"bloodnbEXTRA @ {source}"]).returncode:
        raise RuntimeError(f"bloodnb could not be fetched from {source}: pip's lines above say why. On Kaggle, is Internet on (Settings)?") from None
    importlib.invalidate_caches()
'''.strip()
BADGE = re.compile(r"\A\[!\[Open in Colab\].*\n\n")


def cell_of(job: str) -> str:
    """The source of the cell for a job, by its name."""
    return CELL.replace("REPOSITORY", REPOSITORY).replace("EXTRA", EXTRAS.get(job, ""))


def badges_of(job: str) -> str:
    """Markdown links that open a job on Colab and on Kaggle."""
    address = f"{REPOSITORY}/blob/main/nbs/{job}.ipynb"
    return (f"[![Open in Colab](images/open_in_colab.svg)]({address.replace('https://github.com', 'https://colab.research.google.com/github')}) "
            f"[![Open in Kaggle](images/open_in_kaggle.svg)](https://kaggle.com/kernels/welcome?src={address})\n\n")


def add_to(path: Path) -> None:
    """Bring a job notebook's cell and badges up to date; the rest stays as it is."""
    notebook, job = json.loads(path.read_text(encoding="utf-8")), path.stem
    cells = [cell for cell in notebook["cells"] if "install" not in cell["metadata"].get("tags", [])]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    install = {"cell_type": "code", "execution_count": None, "id": "b100d1b0", "metadata": {"tags": ["install"]}, "outputs": [], "source": cell_of(job).splitlines(True)}
    introduction = next(cell for cell in cells[1:] if cell["cell_type"] == "markdown")
    introduction["source"] = (badges_of(job) + BADGE.sub("", "".join(introduction["source"]))).splitlines(True)
    notebook["cells"] = [*cells[:at + 1], install, *cells[at + 1:]]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    jobs = sorted(path for path in (ROOT / "nbs").glob("[a-z]*.ipynb"))
    for path in [Path(name) for name in sys.argv[1:]] or jobs:
        add_to(path)


if __name__ == "__main__":
    main()
