"""The repository's own order: library in step, notebooks clean and well formed, versions that agree, nothing of one machine in it."""
import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p.relative_to(ROOT) for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]
LIBRARY = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
JOBS = [p for p in NOTEBOOKS if p not in LIBRARY and p.parent.name == "nbs"]
TUTORIALS = [p for p in NOTEBOOKS if p.parent.name == "tutorials"]
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)


def cells_of(notebook: Path) -> list:
    return nbformat.read(ROOT / notebook, as_version=4).cells


def run_nbdev(command: str, folder: Path) -> None:
    """Run an nbdev command in `folder`; `IN_TEST` would make nbdev_export do nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    run = subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{command} failed:\n{run.stdout}{run.stderr}"


def modules_in(library: Path) -> dict[str, str]:
    return {str(p.relative_to(library)): p.read_text() for p in sorted(library.rglob("*.py"))}


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what nbdev reads and writes, so that a check never changes the user's files."""
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("_*", ".*"))
    (tmp_path / "bloodnb").mkdir()
    return tmp_path


def test_library_is_in_step_with_notebooks(sources):
    run_nbdev("nbdev_export", sources)
    wanted, got = modules_in(sources / "bloodnb"), modules_in(ROOT / "bloodnb")
    stale = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    assert not stale, f"bloodnb/ differs from what the notebooks export: {stale}. Run nbdev_export (and delete modules that no notebook exports)."


def test_notebooks_are_clean(sources):
    run_nbdev("nbdev_clean", sources)
    dirty = [str(p) for p in NOTEBOOKS if (ROOT / p).read_bytes() != (sources / p).read_bytes()]
    assert not dirty, f"notebooks with metadata that git should not see: {dirty}. Run nbdev_clean."


@each_notebook
def test_notebook_opens_with_its_only_h1(notebook):
    cells = cells_of(notebook)
    headings = [n for n, c in enumerate(cells) if c.cell_type == "markdown" and re.search(r"^# ", re.sub(r"```.*?```", "", c.source, flags=re.S), re.M)]
    assert headings == [0], f"{notebook}: wanted one H1, in the first cell; got H1s in cells {headings}"


@each_notebook
def test_notebook_saves_no_error(notebook):
    errors = [o.ename for c in cells_of(notebook) for o in c.get("outputs", []) if o.output_type == "error"]
    assert not errors, f"{notebook}: saved with {errors}. Run it again from top to bottom."


@each_notebook
def test_notebook_saves_no_log(notebook):
    noise = [o.text[:60] for c in cells_of(notebook) for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert not noise, f"{notebook}: what libraries log is saved in it: {noise}. Run make outputs NOTEBOOKS={notebook}."


@pytest.mark.parametrize("notebook", LIBRARY, ids=str)
def test_library_notebook_exports_its_module(notebook):
    names = [m for c in cells_of(notebook) if c.cell_type == "code" for m in re.findall(r"^#\| *default_exp +(\S+)", c.source, re.M)]
    assert names == [notebook.stem[3:]], f"{notebook}: wanted one `#| default_exp {notebook.stem[3:]}`, got {names}"


@each_notebook
def test_imports_stand_in_cells_of_their_own(notebook):
    """nbdev runs every cell that imports when it makes a page, and none of the others: what else stands in it would miss its variables."""
    mixed = []
    for cell in cells_of(notebook):
        if cell.cell_type != "code" or re.search(r"^#\| *export|nbdev_export\(\)", cell.source, re.M):
            continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.M)).body}
        if kinds == {True, False}:
            mixed.append(cell.source[:80])
    assert not mixed, f"{notebook}: cells that import and do more: {mixed}. Move the imports into a cell of their own."


@pytest.mark.parametrize("notebook", JOBS, ids=str)
def test_job_notebook_takes_parameters_and_exports_nothing(notebook):
    cells = [c for c in cells_of(notebook) if c.cell_type == "code"]
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{notebook}: wanted one cell tagged `parameters`, for papermill; got {len(tagged)}"
    flags = [f for c in cells for f in re.findall(r"^#\| *(export\w?|hide|eval|notest|slow|default_exp)\b", c.source, re.M)]
    assert not flags, f"{notebook}: papermill runs every cell, whatever its flags; got {flags}. Take them out of the job."


def test_tutorials_name_tests_that_exist():
    texts = "".join(c.source for p in NOTEBOOKS if p.parent.name == "tutorials" for c in cells_of(p) if c.cell_type == "markdown")
    named = set(re.findall(r"`(tests/\w+\.py)::(\w+)`", texts))
    missing = sorted(f"{file}::{name}" for file, name in named if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text())
    assert named and not missing, f"tests that a tutorial names and that do not exist: {missing}. Correct the tutorial's table."


@pytest.mark.parametrize("notebook", TUTORIALS, ids=str)
def test_tutorial_exports_nothing(notebook):
    flags = [f for c in cells_of(notebook) if c.cell_type == "code" for f in re.findall(r"^#\| *(export\w?|default_exp)\b|nbdev_export\(\)", c.source, re.M)]
    assert not flags, f"{notebook}: a lesson uses the library and makes none of it; got {len(flags)} cells that export. Move them to a library notebook."


@pytest.mark.parametrize("notebook", TUTORIALS, ids=str)
def test_tutorial_was_run_from_top_to_bottom(notebook):
    """nbdev_clean takes the counts of cells away, so it is the last expressions that must have left something."""
    code = [c for c in cells_of(notebook) if c.cell_type == "code" and not c.source.startswith("#| hide") and "_sliders(" not in c.source]  # a widget lives with its kernel alone
    silent = [c.source[:60] for c in code if isinstance(ast.parse(c.source).body[-1], ast.Expr) and not c.outputs]
    assert not silent, f"{notebook}: cells that end in a value and show none: {silent}. Run make outputs NOTEBOOKS={notebook}."


@pytest.mark.parametrize("notebook", TUTORIALS, ids=str)
def test_each_figure_of_a_tutorial_is_told_in_words(notebook):
    """Quarto gives `fig-alt` to the picture; without it a screen reader says nothing."""
    wordless = []
    for cell in cells_of(notebook):
        if any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {})) and not re.search(r"^#\| fig-alt: \"[^\"]{20,}\"$", cell.source, re.M):
            wordless.append(cell.source[:60])
    assert not wordless, f'{notebook}: figures without a line `#| fig-alt: "..."` of 20 letters or more: {wordless}'


@pytest.mark.parametrize("notebook", TUTORIALS, ids=str)
def test_links_of_a_tutorial_lead_to_files(notebook):
    links = [link for c in cells_of(notebook) if c.cell_type == "markdown" for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", c.source)]
    lost = [link for link in links if not (ROOT / notebook).parent.joinpath(link).is_file()]
    assert not lost, f"{notebook}: links to files that are not there: {lost}"


def test_sidebar_lists_every_notebook():
    sidebar = (ROOT / "_quarto.yml").read_text()
    listed = set(re.findall(r"^ *- (nbs/\S+\.ipynb)$", sidebar, re.M))
    present = {p.as_posix() for p in NOTEBOOKS}
    assert not present - listed, f"notebooks that the sidebar in _quarto.yml does not list: {sorted(present - listed)}. List them there."
    assert not listed - present, f"the sidebar in _quarto.yml lists notebooks that do not exist: {sorted(listed - present)}. Remove them there."


def test_nbdev_yml_is_what_nbdev_writes(sources):
    shutil.copy(ROOT / "_quarto.yml", sources)
    run = subprocess.run([sys.executable, "-c", "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"], cwd=sources, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (sources / "nbdev.yml").read_text() == (ROOT / "nbdev.yml").read_text(), "nbdev.yml is not what settings.ini gives. Run make docs, and commit it."


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    got = re.search(r'__version__ = "(.+)"', (ROOT / "bloodnb" / "__init__.py").read_text())[1]
    assert got == settings["DEFAULT"]["version"], "bloodnb/__init__.py has another version than settings.ini. Run nbdev_export."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "what a citation file must have: https://citation-file-format.github.io"
    assert str(citation["version"]) == got and citation["license"] == "Apache-2.0"


def test_workflows_call_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            called |= {target for step in job["steps"] for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
    assert called == {"test", "test-all", "docs"} <= targets


def test_environment_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{project['requires-python']}" in dependencies
    assert dependencies[-1] == {"pip": ["-r requirements.lock", "-e ."]}
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.M))
    ranges = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.match(r"[\w.-]+", r)[0] for r in ranges} - {"bloodnb"}
    assert names <= locked.keys(), f"not in requirements.lock: {sorted(names - locked.keys())}. Run make lock."
    exact = dict(r.split("==") for r in ranges if "==" in r)
    assert exact.items() <= locked.items(), f"pinned in pyproject.toml but not so in requirements.lock: {sorted(exact.items() - locked.items())}. Run make lock."


def committed_files() -> list[Path]:
    """Files that git has, and new ones that it would take."""
    run = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if (ROOT / name).is_file()]


MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home)/\S*|\b[A-Z]:\\Users\\\S*")
REGISTRY = re.compile(r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs|deb[.]debian[.]org|conda[.]anaconda[.]org")


def test_nothing_of_one_machine_is_committed():
    found = []
    for path in committed_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        text = re.sub(r'"image/[^"]+": "[^"]*"', "", text)  # pictures in notebooks are base64, in which anything may occur
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for pattern in (MACHINE_PATH, REGISTRY) for m in pattern.finditer(text)]
    assert not found, f"paths of one machine, or hosts of a package registry: {found}"


def test_committed_files_are_small():
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in committed_files() if p.stat().st_size > 3_000_000}
    assert not large, f"over 3 MB, in bytes: {large}. Keep data out of git, and save figures smaller."


def test_library_has_no_unused_or_undefined_name():
    run = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "F", "--quiet", "bloodnb"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"ruff found in the exported library:\n{run.stdout}{run.stderr}"


def test_ci_entry_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK), ".ci/run is not executable. Run chmod +x .ci/run."


def test_library_needs_no_notebook_tools():
    tools = {"nbdev", "fastcore", "execnb", "papermill", "jupyterlab", "nbformat"}
    for path in (ROOT / "bloodnb").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        used = {name.split(".")[0] for name in imported} & tools
        assert not used, f"{path.name} imports {sorted(used)}: the library must run without notebook tools"


def test_tests_of_a_file_stay_together(request):
    """Where two processes divide the tests: else what is dear to make is made in both (see requirements.lock's pytest in pyproject.toml)."""
    name = request.node.nodeid
    assert name.endswith("@test_repository") or not request.config.getoption("loadgroup", False), f"{name}: pytest-xdist has not put it into its file's group"
