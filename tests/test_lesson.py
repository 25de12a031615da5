"""The page that `bloodnb.lesson.severity_page` makes, as it is saved in the tutorial, opened in a real browser."""
import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "nbs" / "tutorials" / "severity.ipynb"
THEMES = {"light": ("#fff", "#212529"), "dark": ("#16141b", "#e8e4f0")}
# The mean of red, green and blue on a canvas, 0..255.
COLOUR = "canvas => { const sums = [0, 0, 0], data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;" \
         " data.forEach((value, i) => { if (i % 4 < 3) sums[i % 4] += value; }); return sums.map(sum => 4 * sum / data.length); }"


@pytest.fixture(scope="module")
def page_html() -> str:
    """The saved output: what the site shows."""
    cells = json.loads(TUTORIAL.read_text())["cells"]
    found = ["".join(o["data"]["text/html"]) for c in cells for o in c.get("outputs", []) if "severity-page" in "".join(o.get("data", {}).get("text/html", ""))]
    assert len(found) == 1, f"{TUTORIAL.name} is saved with {len(found)} pages, wanted 1. Run make outputs NOTEBOOKS=nbs/tutorials/severity.ipynb."
    return found[0]


@pytest.fixture
def opened(browser, page_html):
    """A function that opens the page in a window and theme; the test fails on a script error or a request."""
    tabs, errors, requests = [], [], []

    def open_page(width: int = 1280, theme: str = "light", **options):
        tab = browser.new_context(viewport={"width": width, "height": 844}, **options).new_page()
        tabs.append(tab)
        tab.on("pageerror", lambda error: errors.append(error))
        tab.on("request", lambda request: None if request.url.startswith("data:") else requests.append(request.url))
        background, colour = THEMES[theme]
        tab.set_content(f"<!doctype html><html lang=en><title>t</title><body style='margin: 12px; background: {background}; color: {colour}; color-scheme: {theme}'>{page_html}")
        return tab

    yield open_page
    for tab in tabs:
        tab.context.close()
    assert not errors and not requests, f"script errors {[str(e) for e in errors]}, requests {requests}"


def test_the_slider_changes_picture_and_prediction(opened, page_html):
    tab = opened()
    state = json.loads(re.search(r"const state = (\{.*?\}), page =", page_html)[1])
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([\w+/=]+)", page_html)[1]))))
    slider, verdict, (picture, heat) = tab.get_by_role("slider"), tab.get_by_role("status"), tab.locator("canvas").all()
    assert slider.input_value() == "0" and verdict.inner_text().endswith("right.")
    slider.focus()
    said = []
    for step in range(6):
        shares = state["y_prob"][0][0][step]
        assert f"says {state['names'][shares.index(max(shares))]} (" in verdict.inner_text() and tab.locator(".step").inner_text() == f"{step} of 5"
        for canvas, column in ((picture, step), (heat, 6 + step)):
            tile = sheet[:state["side"], column * state["side"]:(column + 1) * state["side"]]
            assert np.allclose(canvas.evaluate(COLOUR), tile.mean((0, 1)), atol=2), "what is drawn is the tile of this severity"
        said.append(verdict.inner_text())
        tab.keyboard.press("ArrowRight")
    assert "wrong: it is a" in said[-1] and len(set(said)) > 2, f"the first cell tips over: {said}"
    assert slider.get_attribute("aria-valuetext") == "severity 5 of 5" and "severity 5" in picture.get_attribute("aria-label")
    assert sum(int(text[:-2]) for text in tab.locator("tbody td:last-child").all_inner_texts()) in range(97, 104)


def test_cell_and_change_are_chosen_by_name(opened):
    tab = opened()
    picture = tab.locator("canvas").first
    looks = [picture.evaluate(COLOUR)]
    tab.get_by_label("Cell").select_option("lymphocyte")
    looks.append(picture.evaluate(COLOUR))
    assert "lymphocyte" in tab.get_by_role("status").inner_text() and tab.locator("tr.true th").inner_text() == "lymphocyte"
    tab.get_by_role("slider").fill("5")
    looks.append(picture.evaluate(COLOUR))
    tab.get_by_label("Change").select_option("cutout")
    looks.append(picture.evaluate(COLOUR))
    assert min(np.abs(np.subtract(a, b)).max() for a, b in zip(looks, looks[1:])) > 1, "each control changes the picture"
    assert picture.get_attribute("aria-label") == "lymphocyte, cutout, severity 5: the picture"
    tab.get_by_role("slider").fill("0")
    assert np.allclose(picture.evaluate(COLOUR), looks[1], atol=0.5), "severity 0 is the same picture under each change"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(opened, width, theme):
    tab = opened(width, theme)
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    board = tab.locator(".board").bounding_box()
    assert board["y"] + board["height"] <= 844, "slider, pictures and bars are in one window"
    colours = tab.locator(".severity-page :is(select, th, .verdict, figcaption, caption)").evaluate_all("all => all.filter(e => e.checkVisibility()).map(e => getComputedStyle(e).color)")
    assert set(colours) == {tab.evaluate("getComputedStyle(document.body).color")}, "text takes the colour of the page around it"
    assert min(box["height"] for box in (control.bounding_box() for control in tab.locator("select, input").all())) >= 24, "large enough to touch"


def test_without_script_all_looks_are_there(opened):
    tab = opened(java_script_enabled=False)
    sheet = tab.get_by_role("img")
    assert sheet.count() == 1 and sheet.bounding_box()["width"] > 300 and "heat maps of the same pictures" in sheet.get_attribute("alt")
    assert not tab.locator(".board").is_visible() and tab.locator("figcaption").first.is_visible()
