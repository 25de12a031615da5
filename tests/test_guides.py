"""What README and the guides tell people to type: code that runs, commands whose parameters exist."""
import re
import shlex
from pathlib import Path

import forks
import nbformat
import pytest

from bloodnb import command
from bloodnb.models import find_backbone
from bloodnb.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "nbs" / "guides").glob("*.md"))]
RUN = ["own_augmentation", "own_backbone", "own_data"]  # their code needs no files


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path, word: str) -> list[list[str]]:
    """The words of each line that begins with `word`, without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{word} ")]


def parameters_of(job: str) -> set[str]:
    (cell,) = [c for c in nbformat.read(ROOT / job, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    return set(re.findall(r"^(\w+) =", cell.source, re.M))


def run_blocks(page: str) -> int:
    names = {"__name__": "__main__"}
    for block in blocks(ROOT / "nbs" / "guides" / f"{page}.md", "python"):
        exec(compile(block, page, "exec"), names)
    return 0


@pytest.mark.parametrize("page", RUN)
def test_code_of_a_guide_runs(page, tmp_path):
    run = forks.call(run_blocks, page, folder=tmp_path)
    assert run.returncode == 0, f"{page}: {run.stdout}{run.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_papermill_is_called_with_parameters_that_exist(page):
    for words in commands(page, "papermill"):
        job, pairs = words[1], [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "-p"]
        assert (ROOT / job).is_file() and words[2].endswith(".ipynb"), words
        unknown = {name for name, _ in pairs} - parameters_of(job)
        assert not unknown, f"{page.name}: {job} has no parameters {sorted(unknown)}"
        choices = dict(pairs)
        assert choices.get("recipe", "default") in RECIPES, words
        find_backbone(choices.get("backbone", "MobileNetV2"))  # or it says what is wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_command_understands_what_is_typed(page):
    for words in commands(page, "bloodnb"):
        command.build_parser().parse_args(words[1:])


def test_guides_hold_commands():
    assert sum(len(commands(page, "papermill")) for page in PAGES) > 15 and sum(len(commands(page, "bloodnb")) for page in PAGES) > 8
