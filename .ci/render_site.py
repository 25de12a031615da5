"""Render the site into `_docs` of the repository that holds this script: with Quarto where it is installed, else with smalldocs, and say which.

    python .ci/render_site.py              # into _docs
    python .ci/render_site.py --preview    # and serve it on this machine, until Ctrl-C

`nbdev_docs` does the same but downloads Quarto when it is missing; this works offline. Folders that begin with `.` or `_` are left out.
"""
import contextlib
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Code and data hold no pages: copying them into _proc would cost time and, with photos beside the notebooks, disk.
SKIP_FOLDERS = r"^[_.]|^(bloodnb|tests|benchmarks|build|dist|data)$|\.egg-info$"
SKIP_FILES = r"^[_.]|\.(npz|zip|h5|keras|whl)$"


def prepare() -> None:
    """Fill `_proc` with pages: notebooks with their outputs and the documentation of what they export, everything else as it is."""
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    shutil.rmtree("_proc", ignore_errors=True)  # a page whose notebook is gone must go too
    refresh_quarto_yml()
    proc_nbs(n_workers=0, skip_folder_re=SKIP_FOLDERS, skip_file_re=SKIP_FILES)


def drop_numbers(site: Path) -> None:
    """Call `nbs/00_data.html` `nbs/data.html`, as nbdev's `output-file` asks and Quarto does; smalldocs does not read it."""
    numbered = [p for p in site.rglob("*.html") if re.match(r"\d\d_", p.name)]
    names = "|".join(re.escape(p.name[3:]) for p in numbered)
    for path in [p for p in site.rglob("*") if numbered and p.suffix in (".html", ".json", ".xml") and "site_libs" not in p.parts]:
        path.write_text(re.sub(rf"\b\d\d_({names})\b", r"\1", path.read_text()))
    for path in numbered:
        path.rename(path.with_name(path.name[3:]))


STAND_IN = """rendered by smalldocs, a stand-in for Quarto that needs no network: pages look nearly, not exactly, as published ones do.
To have Quarto itself: `conda env create -f environment.yml`, or `pip install quarto-cli` in .venv, or https://quarto.org/docs/get-started; then make docs again."""


def serve(folder: Path) -> None:
    """Show the site to this machine's browsers, until Ctrl-C."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        print(f"preview: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it; after a change call it again)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def main() -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # the pages document this copy of the library, wherever another one is installed
    prepare()
    quarto = bool(shutil.which("quarto"))
    if quarto:
        subprocess.run(["quarto", "render"], cwd="_proc", check=True)
    else:
        run = subprocess.run([sys.executable, "-m", "smalldocs.cli", "render"], cwd="_proc", capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"smalldocs could not render _proc:\n{run.stdout}{run.stderr}")
        drop_numbers(Path("_proc/_docs"))
    shutil.rmtree("_docs", ignore_errors=True)
    shutil.move("_proc/_docs", "_docs")
    print("site: _docs/index.html", "rendered by Quarto" if quarto else STAND_IN, sep="\n")
    if "--preview" in sys.argv[1:]:
        serve(ROOT / "_docs")


if __name__ == "__main__":
    main()
