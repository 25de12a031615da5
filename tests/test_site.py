"""The site as a reader meets it: rendered, then opened in a real browser."""
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p.relative_to(ROOT) for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
# Left out of the copy: what is made, what is large.
NOT_FOR_THE_SITE = [".git", ".venv", "_runs", "_docs", "_proc", "__pycache__", "build", "dist", "data", "*.egg-info", "*.npz", "*.zip"]


def page_of(notebook: Path) -> str:
    """Where the site keeps a notebook's page: without the number that orders it in the folder."""
    return notebook.with_name(re.sub(r"^\d\d[a-zA-Z]?_", "", notebook.stem) + ".html").as_posix()


def has_picture(notebook: Path) -> bool:
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    return any(mime.startswith("image/") for c in cells for o in c.get("outputs", []) for mime in o.get("data", {}))


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The rendered site, made in a copy: rendering writes beside its sources."""
    copy = tmp_path_factory.mktemp("site") / "repo"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_FOR_THE_SITE))
    run = subprocess.run([sys.executable, ".ci/render_site.py"], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, f"the site does not render:\n{run.stdout}{run.stderr}"
    return copy / "_docs"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address(site):
    """The site served on this machine only: search does not work from file:// addresses."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def tab(browser, address):
    """A browser tab that reaches the site alone, and fails the test on a script error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith((address, "data:")) else route.abort())
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    yield page
    context.close()
    assert not errors, f"script errors on the page: {[str(e) for e in errors]}"


def test_index_shows_the_readme(tab, address):
    tab.goto(address)
    assert "bloodnb" in tab.title()
    assert tab.locator("main h1").first.inner_text() == re.search(r"^# (.+)", (ROOT / "README.md").read_text(), re.M)[1]
    assert len(tab.locator("main p").all_inner_texts()) > 2


def test_sidebar_leads_to_every_notebook(tab, address):
    tab.goto(address)
    links = {urljoin(address, a.get_attribute("href")) for a in tab.locator("#quarto-sidebar a[href]").all()}
    missing = [str(n) for n in NOTEBOOKS if address + page_of(n) not in links]
    assert not missing, f"not in the sidebar: {missing}. List them in _quarto.yml."


@each_notebook
def test_notebook_page(tab, address, notebook):
    response = tab.goto(address + page_of(notebook))
    assert response.ok, f"no page {page_of(notebook)}: HTTP {response.status}"
    first_cell = json.loads((ROOT / notebook).read_text())["cells"][0]["source"]
    heading = re.search(r"^# (.+)", "".join(first_cell), re.M)[1]
    assert tab.locator("h1").first.inner_text().strip() == re.sub(r"[`*]", "", heading).strip()
    widths = tab.locator("main img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert all(widths), f"{notebook}: pictures that do not show on its page (widths {widths})"
    assert widths or not has_picture(notebook), f"{notebook} holds figures, but its page shows none"


@pytest.mark.parametrize("width", [1280, 400])
def test_pages_fit_the_window(tab, address, width):
    tab.set_viewport_size({"width": width, "height": 900})
    for page in ["index.html", *map(page_of, NOTEBOOKS)]:
        tab.goto(address + page)
        overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"{page} is {overflow} px wider than a window of {width} px"


def test_search_finds_a_page(tab, address):
    tab.goto(address)
    index = tab.evaluate("fetch('search.json').then(r => r.json())")
    assert {page_of(n) for n in NOTEBOOKS} <= {entry["href"].split("#")[0] for entry in index}


class Links(HTMLParser):
    """The addresses that a page points at, and the ids that can be pointed at."""

    def __init__(self, text: str):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids |= {value for name, value in attrs if name == "id"}
        self.targets += [value for name, value in attrs if value and ((tag in ("a", "link") and name == "href") or (tag in ("img", "script") and name == "src"))]


def test_no_link_is_broken(site):
    pages = {p: Links(p.read_text()) for p in site.rglob("*.html") if "site_libs" not in p.parts}
    broken = set()
    for page, links in pages.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = (site / unquote(url.path).lstrip("/") if url.path.startswith("/") else page.parent / unquote(url.path)).resolve() if url.path else page
            path = path / "index.html" if path.is_dir() else path
            anchor_missing = url.fragment and path in pages and unquote(url.fragment) not in pages[path].ids
            if not path.is_file() or anchor_missing:
                broken.add(f"{page.relative_to(site)} -> {target}")
    assert not broken, f"broken links: {sorted(broken)}"
