"""What the stand-in that renders the site here cannot tell: that Quarto itself knows every key of _quarto.yml and of the pages' front matter.

Keys are those that https://quarto.org/docs/reference documents for websites and for pages in HTML; the stand-in's list of page options is generated from
the schema of Quarto 1.8. A key that is written wrongly, or stands in the wrong place, is ignored by both without a word.
"""
import re
from pathlib import Path

import jsonschema
import nbformat
import pytest
import yaml
from smalldocs.quarto_keys import QUARTO_PAGE_OPTIONS

ROOT = Path(__file__).resolve().parent.parent
FLAG, TEXT = {"type": "boolean"}, {"type": "string"}


def closed(**properties) -> dict:
    """An object with these keys and no others."""
    return {"type": "object", "properties": {name.replace("_", "-"): kind for name, kind in properties.items()}, "additionalProperties": False}


def listed(kind: dict) -> dict:
    return {"type": "array", "items": kind}


ENTRY = {"anyOf": [TEXT, closed(text=TEXT, href=TEXT, icon=TEXT, aria_label=TEXT, target=TEXT, rel=TEXT, menu=listed({"$ref": "#/$defs/entry"}))]}
SECTION = {"anyOf": [{"$ref": "#/$defs/entry"}, {**closed(section=TEXT, href=TEXT, contents=listed({"$ref": "#/$defs/section"})), "required": ["section", "contents"]}]}
NAVBAR = closed(title=TEXT, logo=TEXT, logo_alt=TEXT, background=TEXT, foreground=TEXT, search=FLAG, pinned=FLAG, collapse=FLAG, left=listed({"$ref": "#/$defs/entry"}),
                right=listed({"$ref": "#/$defs/entry"}), tools=listed({"$ref": "#/$defs/entry"}))
SIDEBAR = closed(id=TEXT, title=TEXT, style={"enum": ["docked", "floating"]}, background=TEXT, foreground=TEXT, border=FLAG, search=FLAG, alignment=TEXT,
                 collapse_level={"type": "integer", "minimum": 1}, pinned=FLAG, contents=listed({"$ref": "#/$defs/section"}))
SITE = {
    **closed(
        project=closed(title=TEXT, type={"enum": ["default", "website", "book", "manuscript"]}, render=listed(TEXT), resources=listed(TEXT), output_dir=TEXT, lib_dir=TEXT, execute_dir={"enum": ["file", "project"]}),
        website=closed(title=TEXT, description=TEXT, site_url={"type": "string", "pattern": "^https://"}, repo_url=TEXT, repo_branch=TEXT, repo_subdir=TEXT, repo_actions=listed(TEXT), favicon=TEXT,
                       image=TEXT, open_graph={"anyOf": [FLAG, closed(title=TEXT, description=TEXT, image=TEXT, image_alt=TEXT, locale=TEXT, site_name=TEXT)]},
                       twitter_card={"anyOf": [FLAG, closed(title=TEXT, description=TEXT, image=TEXT, image_alt=TEXT, creator=TEXT, site=TEXT, card_style={"enum": ["summary", "summary_large_image"]})]},
                       navbar=NAVBAR, sidebar=SIDEBAR, page_navigation=FLAG, back_to_top_navigation=FLAG, bread_crumbs=FLAG, page_footer=closed(left=TEXT, center=TEXT, right=TEXT, background=TEXT, border=FLAG),
                       search={"anyOf": [FLAG, closed(location={"enum": ["navbar", "sidebar"]}, type={"enum": ["overlay", "textbox"]}, limit={"type": "integer"})]}),
        format=closed(html={"type": "object", "propertyNames": {"enum": sorted(QUARTO_PAGE_OPTIONS | {"code-overflow", "fig-align", "code-fold"})}}),
        metadata_files=listed(TEXT),
    ),
    "$defs": {"entry": ENTRY, "section": SECTION},
}
PAGE = QUARTO_PAGE_OPTIONS | {"description", "categories", "draft", "format", "execute", "skip_exec", "skip_showdoc", "nbflags"}  # the last three are nbdev's
CELL = {"echo", "eval", "output", "warning", "error", "include", "label", "fig-alt", "fig-cap", "fig-align", "fig-width", "fig-height", "tbl-cap", "code-fold", "code-summary", "column", "classes"}
NBDEV = {"default_exp", "export", "exports", "exporti", "exec_doc", "hide", "hide_line", "hide_input", "hide_output", "filter_stream", "notest", "slow", "skip_showdoc", "default_cls_lvl"}
PAGES = [p.relative_to(ROOT) for p in sorted([*(ROOT / "nbs" / "guides").glob("*.md"), ROOT / "index.qmd"])]
NOTEBOOKS = [p.relative_to(ROOT) for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]


@pytest.mark.parametrize("name", ["_quarto.yml", "nbdev.yml"])
def test_quarto_knows_every_key(name):
    errors = list(jsonschema.Draft202012Validator(SITE).iter_errors(yaml.safe_load((ROOT / name).read_text())))
    assert not errors, "\n".join(f"{name}, {'/'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors)


@pytest.mark.parametrize("wrong", ["website: {navbar: {background: dark, serach: true}}", "website: {sidebar: {contents: [{section: A, content: []}]}}", "format: {html: {thme: default}}", "website: {sidebar: {collapse-level: 0}}"])
def test_a_wrong_key_is_seen(wrong):
    assert list(jsonschema.Draft202012Validator(SITE).iter_errors(yaml.safe_load(wrong)))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_front_matter(page):
    head = re.match(r"---\n(.*?)\n---\n", (ROOT / page).read_text(), re.S)
    assert head, f"{page}: no front matter"
    keys = yaml.safe_load(head[1])
    assert not keys.keys() - PAGE, f"{page}: keys that Quarto does not know: {sorted(keys.keys() - PAGE)}"
    assert page.suffix != ".md" or {"title", "description"} <= keys.keys()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_options_of_cells(notebook):
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    front = set(re.findall(r"^- ([\w-]+):", cells[0].source, re.M)) if cells[0].cell_type == "markdown" else set()
    assert not front - PAGE, f"{notebook}: front matter that Quarto does not know: {sorted(front - PAGE)}"
    used = {name for cell in cells if cell.cell_type == "code" for name in re.findall(r"^#\| *([\w-]+)", cell.source, re.M)}
    assert not used - CELL - NBDEV, f"{notebook}: cell options that neither Quarto nor nbdev knows: {sorted(used - CELL - NBDEV)}"
