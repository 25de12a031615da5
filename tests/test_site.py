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
PAGES = [*NOTEBOOKS, *(p.relative_to(ROOT) for p in sorted((ROOT / "nbs" / "guides").glob("*.md")))]
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
    assert "rendered by Quarto" in run.stdout or "a stand-in for Quarto" in run.stdout
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
    """A browser tab that reaches the site alone, and fails the test on a script error or a request beyond the site."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    beyond, errors = [], []

    def answer(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        beyond.append(route.request.url)
        route.abort()

    context.route("**/*", answer)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(error))
    yield page
    context.close()
    assert not errors, f"script errors on the page: {[str(e) for e in errors]}"
    assert not beyond, f"the page asks for addresses beyond the site: {beyond}"


def test_index_shows_the_readme(tab, address):
    tab.goto(address)
    assert "bloodnb" in tab.title()
    assert tab.locator("main h1").first.inner_text() == re.search(r"^# (.+)", (ROOT / "README.md").read_text(), re.M)[1]
    assert len(tab.locator("main p").all_inner_texts()) > 2


def test_sidebar_leads_to_every_notebook(tab, address):
    tab.goto(address)
    links = {urljoin(address, a.get_attribute("href")) for a in tab.locator("#quarto-sidebar a[href]").all()}
    missing = [str(n) for n in PAGES if address + page_of(n) not in links]
    assert not missing, f"not in the sidebar: {missing}. List them in _quarto.yml."


def test_sidebar_order_is_reading_order(tab, address):
    """As _quarto.yml has it, the library by its numbers, and each page's link to the next leads to the one below."""
    wanted = [page_of(Path(entry)) for entry in re.findall(r"^ +- (?:href: )?(nbs/\S+)$", (ROOT / "_quarto.yml").read_text().partition("  sidebar:")[2], re.M)]
    numbers = [int(name[4:6]) for name in re.findall(r"^ +- (nbs/\d\d_\S+)$", (ROOT / "_quarto.yml").read_text(), re.M)]
    tab.goto(address)
    shown = [urljoin(address, a.get_attribute("href")).removeprefix(address) for a in tab.locator("#quarto-sidebar a.sidebar-item-text[href], #quarto-sidebar a.sidebar-link[href]").all()]
    assert list(dict.fromkeys(page for page in shown if page.startswith("nbs/"))) == wanted and numbers == sorted(numbers)
    for page, after in list(zip(wanted, wanted[1:]))[::5]:
        tab.goto(address + page)
        (following,) = tab.locator(".nav-page-next a[href]").all()
        assert urljoin(address + page, following.get_attribute("href")) == address + after, page


@each_notebook
def test_notebook_page(tab, address, notebook):
    response = tab.goto(address + page_of(notebook))
    assert response.ok, f"no page {page_of(notebook)}: HTTP {response.status}"
    first_cell = json.loads((ROOT / notebook).read_text())["cells"][0]["source"]
    heading = re.search(r"^# (.+)", "".join(first_cell), re.M)[1]
    assert tab.locator("h1").first.inner_text().strip() == re.sub(r"[`*]", "", heading).strip()
    tab.locator("main img").evaluate_all("images => Promise.all(images.map(i => (i.loading = 'eager', i.decode().catch(() => null))))")
    widths = tab.locator("main img").evaluate_all("images => images.map(i => i.naturalWidth)")
    unsaid = tab.locator("main img").evaluate_all("images => images.filter(i => !i.alt).length")
    assert not unsaid, f"{notebook}: {unsaid} pictures without a text for those who do not see them. Give their cells a line `#| fig-alt: ...`."
    assert all(widths), f"{notebook}: pictures that do not show on its page (widths {widths})"
    assert widths or not has_picture(notebook), f"{notebook} holds figures, but its page shows none"


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window(tab, address, width):
    tab.set_viewport_size({"width": width, "height": 900})
    for page in ["index.html", "CHANGELOG.html", "CONTRIBUTING.html", *map(page_of, PAGES)]:
        assert tab.goto(address + page).ok, page
        overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"{page} is {overflow} px wider than a window of {width} px"


def test_search_finds_a_page(tab, address):
    tab.goto(address)
    index = tab.evaluate("fetch('search.json').then(r => r.json())")
    assert {page_of(n) for n in PAGES} <= {entry["href"].split("#")[0] for entry in index}


def test_search_finds_clean(tab, address):
    """Typed as a reader does."""
    tab.goto(address)
    tab.locator(".navbar input[type=search], #quarto-search input").first.press_sequentially("clean")
    found = tab.locator("a[href*='cleaning.html']:visible, a[href*='clean.html']:visible")
    found.first.wait_for(timeout=10_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page(tab, address, scheme):
    """WCAG's ratio of luminances is 4.5 or more for text and links."""
    tab.emulate_media(color_scheme=scheme)
    tab.goto(address + "nbs/guides/own_backbone.html")
    colours = tab.evaluate("""() => ['p', 'main p a', 'main p code', 'h2', 'main pre code', '#quarto-sidebar a'].map(name => {
        const at = document.querySelector('main ' + name) ?? document.querySelector(name);
        let under = at;
        while (under.parentElement && /rgba|transparent/.test(getComputedStyle(under).backgroundColor)) under = under.parentElement;  // a mere tint counts as what it lies on
        return [name, getComputedStyle(at).color, getComputedStyle(under).backgroundColor]})""")

    def luminance(text: str) -> float:
        r, g, b = ((c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in map(float, re.findall(r"[\d.]+", text)[:3]))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for name, text, ground in colours:
        low, high = sorted((luminance(text), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} in the {scheme} theme: {text} on {ground}"
    assert (luminance(colours[0][2]) > 0.5) == (scheme == "light")


def test_a_link_to_the_site_has_a_picture(site):
    head = (site / "index.html").read_text().partition("</head>")[0]
    (picture,) = set(re.findall(r'<meta (?:property="og:image"|name="twitter:image") content="([^"]+)"', head))
    assert picture.endswith("nbs/images/card.jpg") and (site / "nbs" / "images" / "card.jpg").is_file()


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
