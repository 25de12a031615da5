"""JupyterLab as a student uses it: notebooks opened in a real browser, run from its menu, saved, and looked at."""
import json
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from jobs import SMALL, job_environment

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("lab")
MINUTES = 60_000  # one, in milliseconds
# All cells in the page, not only those in view; no question about news, no look for updates.
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"}, "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}}
# A prompt shows [*] while its cell waits or runs, and a number when it is done; after an error those that waited show neither.
FINISHED = """() => {
  const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputArea-prompt')].map(prompt => prompt.textContent);
  return prompts.some(text => /\\d/.test(text)) && !prompts.some(text => text.includes('*'));
}"""


class Lab:
    """A JupyterLab server of its own, with its notebooks in `root`."""

    def __init__(self, root: Path, own: Path):
        self.root, self.token, self.log = root, secrets.token_hex(16), own / "lab.log"
        folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
                   "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib"}
        for name, value in SETTINGS.items():
            file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": root, "ServerApp.allow_root": True,
                   "IdentityProvider.token": self.token, "LabApp.expose_app_in_browser": True, "LabApp.extension_manager": "readonly",
                   "MappingKernelManager.cull_idle_timeout": 900, "ServerApp.shutdown_no_activity_timeout": 900}  # should the tests themselves be killed
        # IN_TEST keeps the notebooks' last cell from exporting the library.
        environment = job_environment({variable: str(own / folder) for variable, folder in folders.items()} | {"IN_TEST": "1"})
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", *(f"--{name}={value}" for name, value in options.items())],
                                            cwd=root, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        self.address = f"http://127.0.0.1:{port}/"

    def ask(self, path: str, method: str = "GET"):
        request = urllib.request.Request(self.address + path, method=method, headers={"Authorization": f"token {self.token}"})
        with urllib.request.build_opener().open(request, timeout=10) as answer:
            return json.loads(answer.read() or b"null")

    def wait_until_it_answers(self, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.ask("api/status")
                return
            except OSError:
                time.sleep(0.3)
        pytest.fail(f"JupyterLab does not answer at {self.address}:\n{self.log.read_text()[-3000:]}")

    def end_kernels(self) -> None:
        for kernel in self.ask("api/kernels"):
            self.ask(f"api/kernels/{kernel['id']}", "DELETE")

    def end(self) -> None:
        """SIGTERM lets the server end its kernels first."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def with_values(notebook, values: dict) -> None:
    """Write values into the assignments of a notebook's code, as a student would into the cell of parameters."""
    for name, value in values.items():
        found = 0
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source, n = re.subn(rf"^{name} = [^#\n]*?(?=  #|$)", f"{name} = {value!r}", cell.source, flags=re.M)
                found += n
        assert found == 1, f"{found} lines set {name}, wanted 1"


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    root, own = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    shutil.copy(ROOT / "settings.ini", root)
    changes = {"train": SMALL, "02_cleaning": {}, "tutorials/severity": {"data": "drawn:n=160,seed=1"}}
    for name, values in changes.items():
        notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
        with_values(notebook, values)
        for cell in notebook.cells:
            cell.source = cell.source.replace("epochs=10", "epochs=1")  # of the lesson's training
            if cell.cell_type == "code":
                cell.outputs = []
        (root / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, root / "nbs" / f"{name}.ipynb")
    server = Lab(root, own)
    try:
        server.wait_until_it_answers()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def tab(lab, browser):
    """One page for all notebooks, that reaches this server alone."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith((lab.address, "data:", "blob:")) else route.abort())
    page = context.new_page()
    page.goto(f"{lab.address}lab?token={lab.token}", timeout=2 * MINUTES)
    page.wait_for_function("() => window.jupyterapp?.commands", timeout=2 * MINUTES)
    page.evaluate("() => window.jupyterapp.restored")
    yield page
    context.close()


def run_all(tab, lab, name: str):
    """Open a notebook, run all cells from the menu, save; the notebook as it then lies on disk."""
    tab.evaluate("path => window.jupyterapp.commands.execute('docmanager:open', {path, factory: 'Notebook'})", f"nbs/{name}.ipynb")
    tab.get_by_text(re.compile(r"\| Idle")).wait_for(timeout=2 * MINUTES)
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    tab.wait_for_function(FINISHED, timeout=8 * MINUTES, polling=500)
    tab.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    saved = nbformat.read(lab.root / "nbs" / f"{name}.ipynb", as_version=4)
    errors = [f"{o.ename}: {o.evalue}" for cell in saved.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert not errors, f"{name}: {errors}"
    assert all(cell.execution_count for cell in saved.cells if cell.cell_type == "code" and cell.source.strip()), f"{name}: cells that did not run"
    return saved


def close(tab, lab) -> None:
    """Close the notebook and end its kernel: they would take memory to the end."""
    tab.evaluate("() => window.jupyterapp.commands.execute('application:close-all')")
    lab.end_kernels()


def figures(saved) -> int:
    return sum(mime.startswith("image/") for cell in saved.cells for o in cell.get("outputs", []) for mime in o.get("data", {}))


@pytest.mark.parametrize("name, least", [("train", 5), ("02_cleaning", 4)])
def test_a_notebook_runs_from_the_menu(tab, lab, name, least):
    saved = run_all(tab, lab, name)
    widths = tab.locator(".jp-Notebook .jp-RenderedImage img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert figures(saved) == len(widths) >= least and all(widths), f"{name}: {figures(saved)} figures saved, shown with widths {widths}"
    if name == "train":
        assert (lab.root / "nbs" / SMALL["output"] / "metrics.json").is_file(), "the run folder lies beside the notebook"
    close(tab, lab)


def test_sliders_move_the_lesson(tab, lab):
    run_all(tab, lab, "tutorials/severity")
    box = tab.locator(".jp-OutputArea .widget-box").first
    shown = box.locator(".widget-html-content")
    picture = shown.locator("img").first
    picture.wait_for(timeout=MINUTES)
    before, said = picture.get_attribute("src"), shown.inner_text()
    handles = box.get_by_role("slider")
    assert handles.count() == 4 and "The model says" in said
    handles.first.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("([image, before]) => !image.isConnected || image.src !== before", arg=[picture.element_handle(), before], timeout=MINUTES)
    assert picture.get_attribute("src") != before and box.locator(".widget-readout").first.inner_text() == "1"
    page = tab.locator(".severity-page")  # what the site shows works here too
    page.get_by_role("slider").fill("5")
    assert "5 of 5" in page.locator(".step").inner_text() and "The model says" in page.get_by_role("status").inner_text()
    close(tab, lab)
