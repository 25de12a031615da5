"""What needs more than one module of the machines notebook: the doctor with real faults, a job as Kaggle would run it, and the cell that fetches bloodnb."""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jobs
import nbformat
import numpy as np
import psutil
import pytest

from bloodnb import machines
from bloodnb.data import load

ROOT = jobs.ROOT
REACH = machines.unreachable
JOBS = sorted(path.stem for path in (ROOT / "nbs").glob("[a-z]*.ipynb"))
# Kaggle's documentation, docs/kernels_metadata.md: each field with what it may hold. Flags are texts there.
FLAG, OWNED = r"true|false", r"[\w-]+/[\w-]+"
SCHEMA = {"id": r"[\w-]+/[a-z0-9-]{5,50}", "title": r".{5,50}", "code_file": r"[\w-]+\.ipynb", "language": r"python|r|rmarkdown", "kernel_type": r"script|notebook",
          "is_private": FLAG, "enable_gpu": FLAG, "enable_internet": FLAG, "machine_shape": r"|NvidiaTeslaT4|NvidiaTeslaP100|NvidiaL4|TpuV5E8",
          "dataset_sources": [OWNED], "competition_sources": [r"[\w-]+"], "kernel_sources": [OWNED], "model_sources": [r"([\w.-]+/){4}\d+"]}


def command(*words: str) -> int:
    """Exit code of `bloodnb WORDS`, through a parser of this file's own."""
    parser = argparse.ArgumentParser(prog="bloodnb")
    commands = parser.add_subparsers(required=True)
    machines.add_doctor(commands), machines.add_kaggle(commands)
    args = parser.parse_args(words)
    return args.function(args)


@pytest.fixture(scope="module")
def install_cell():
    """The module `.ci/install_cell.py`."""
    spec = importlib.util.spec_from_file_location("install_cell", ROOT / ".ci" / "install_cell.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The doctor

@pytest.fixture
def well(monkeypatch, tmp_path):
    """A machine without faults but those that a test makes; TensorFlow is not started for each."""
    monkeypatch.setattr(machines, "ask_backend", lambda: {"keras": "3.10.0", "backend": "tensorflow", "version": "2.19.0", "accelerators": [], "cuda": True})
    monkeypatch.setattr(machines, "nvidia_driver", lambda: (False, None))
    monkeypatch.setattr(machines, "unreachable", lambda url, timeout=3: None)
    monkeypatch.setattr(machines, "free_disk", lambda folders: dict.fromkeys(folders, 50 * machines.GIB))
    monkeypatch.setattr(machines, "memory_limit", lambda: (8 * machines.GIB, 8 * machines.GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * machines.GIB, available=16 * machines.GIB))
    monkeypatch.setattr(machines, "cpu_cores", lambda: 4)
    monkeypatch.setattr(machines, "kernel_command", lambda: ["python"])
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("BLOODNB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def faults(capsys, *words: str) -> tuple[int, dict[str, dict]]:
    """Exit code of the doctor, and the checks that are not ok."""
    code = command("doctor", "--json", *words)
    checks = json.loads(capsys.readouterr().out)
    assert [set(check) for check in checks] == [{"name", "state", "found", "remedy"}] * 12
    bad = {check["name"]: check for check in checks if check["state"] != "ok"}
    assert all(check["remedy"] for check in bad.values()), bad
    return code, bad


def broken(*_, **__):
    raise OSError("a broken part")


FAULTS = {
    "no kernel": (lambda m: m.setattr(machines, "kernel_command", lambda: []), "kernel", "problem", "ipykernel install"),
    "another Python's kernel": (lambda m: m.setattr(machines, "kernel_command", lambda: ["/opt/other/bin/python"]), "kernel", "problem", "ipykernel install"),
    "full disk": (lambda m: m.setattr(machines, "free_disk", lambda folders: dict.fromkeys(folders, 2**20)), "disk", "problem", "Delete"),
    "no disk": (lambda m: m.setattr(machines, "free_disk", broken), "disk", "problem", "message"),
    "no backend": (lambda m: m.setattr(machines, "ask_backend", lambda: {"error": "No module named 'tensorflow'"}), "backend", "problem", "tensorflow>=2.18"),
    "no driver": (lambda m: m.setattr(machines, "nvidia_driver", lambda: (True, None)), "device", "warning", "nvidia-smi"),
    "little memory": (lambda m: m.setattr(machines, "memory_limit", lambda: (2 * machines.GIB, machines.GIB)), "memory", "problem", "more"),
    "old Keras": (lambda m: m.setattr(machines, "_version", lambda name: "2.15.0" if name == "keras" else "99"), "packages", "problem", "keras>=3.8"),
    "one core": (lambda m: m.setattr(machines, "cpu_cores", lambda: 1), "CPU cores", "warning", "2 cores"),
    "a check that hangs": (lambda m: m.setattr(machines, "run_check", hanging("disk")), "disk", "warning", "again"),
}


def hanging(name: str):
    """`run_check` with one check that sleeps."""
    true = machines.run_check
    return lambda asked, check: true(asked, lambda: time.sleep(60), timeout=0.1) if asked == name else true(asked, check)


def test_doctor_finds_nothing_where_nothing_is_wrong(well, capsys):
    # The versions are this machine's own: Kaggle's range must hold where the tests run.
    assert faults(capsys) == (0, {})


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_names_the_fault_and_a_remedy(well, capsys, fault):
    make, name, state, remedy = FAULTS[fault]
    make(well)
    code, bad = faults(capsys)
    assert (list(bad), code) == ([name], int(state == "problem")), bad
    assert bad[name]["state"] == state and remedy in bad[name]["remedy"], bad


def test_doctor_without_a_network(well, capsys, monkeypatch):
    for name, value in jobs.NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machines, "unreachable", REACH)
    began = time.monotonic()
    code, bad = faults(capsys)
    assert time.monotonic() - began < 120, "it waited for a network"
    assert (code, list(bad)) == (0, ["weights", "data"]), "drawn cells and random weights still do"
    code, bad = faults(capsys, "--weights", "imagenet", "--data", "bloodmnist_64")
    assert (code, {check["state"] for check in bad.values()}) == (1, {"problem"})
    assert faults(capsys, "--weights", "none", "--data", "drawn") == (0, {})


def test_doctor_as_text_of_this_machine():
    """The whole of it, TensorFlow included, in a process of its own: what is printed, and that it ends."""
    code = "import argparse, sys; from bloodnb import machines; p = argparse.ArgumentParser(); machines.add_doctor(p.add_subparsers()); a = p.parse_args(sys.argv[1:]); sys.exit(a.function(a))"
    run = subprocess.run([sys.executable, "-c", code, "doctor", "--weights", "nothing.h5"], env=jobs.job_environment(jobs.NO_NETWORK), capture_output=True, text=True, timeout=300)
    assert run.returncode == 1, run.stderr
    assert re.search(r"^problem  weights +there is no file nothing.h5\n +remedy: -p weights", run.stdout, re.M), run.stdout
    assert re.search(r"^ok       backend +Keras 3\.\d+", run.stdout, re.M) and re.search(r"\d problems?, \d warnings?\n\Z", run.stdout), run.stdout
    assert "Traceback" not in run.stdout + run.stderr


def test_the_module_needs_nothing_to_be_imported():
    """The doctor has to work where the packages that it looks for are broken or missing."""
    code = "import sys; before = set(sys.modules); import bloodnb.machines; print(sorted({m.split('.')[0] for m in sys.modules if m not in before} - sys.stdlib_module_names))"
    run = subprocess.run([sys.executable, "-c", code], env=jobs.job_environment(), capture_output=True, text=True)
    assert run.stdout.strip() == "['bloodnb']", run.stdout + run.stderr


# Kaggle

def kaggle_folder(tmp_path: Path, *words: str, parameters: dict | None = None) -> Path:
    pairs = [word for name, value in (parameters or {}).items() for word in ("-p", name, str(value))]
    assert command("kaggle", *pairs, "--username", "student", *words, "--output", str(tmp_path / "push")) == 0
    return tmp_path / "push"


@pytest.mark.parametrize("words", [(), ("--no-gpu", "--slug", "cells-3"), ("--job", "evaluate", "-p", "run", "/kaggle/input/train/run", "--kernel", "student/bloodnb-train"),
                                   ("--dataset", "teacher/blood", "teacher/more", "--competition", "cells", "--model", "keras/mobilenet/keras/small/1")], ids=["plain", "cpu", "evaluate", "sources"])
def test_kernel_metadata_is_as_documented(tmp_path, words):
    folder = kaggle_folder(tmp_path, *words)
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    assert metadata.keys() == SCHEMA.keys()
    for name, wanted in SCHEMA.items():
        if isinstance(wanted, list):
            assert isinstance(metadata[name], list) and all(re.fullmatch(wanted[0], value) for value in metadata[name]), name
        else:
            assert isinstance(metadata[name], str) and re.fullmatch(wanted, metadata[name]), name
    assert metadata["title"].lower().replace(" ", "-") == metadata["id"].split("/")[1], "Kaggle makes the address from the title"
    assert metadata["is_private"] == metadata["enable_internet"] == "true"
    assert metadata["enable_gpu"] == str("--no-gpu" not in words).lower() and bool(metadata["machine_shape"]) == ("--no-gpu" not in words)
    notebook = nbformat.read(folder / metadata["code_file"], as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3", "Kaggle refuses a notebook that names no kernel"
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("words, wanted", [
    (["-p", "backbon", "MobileNet"], "'backbone'"), (["-p", "recipe", "robst"], "'robust'"), (["-p", "data", "homework.npz"], "--dataset"),
    (["-p", "unfreeze", "after dinner"], "unfreeze"), (["--slug", "run"], "5 to 50"), (["--dataset", "blood"], "OWNER/NAME"), (["--job", "trian"], "'train'"),
    (["--job", "evaluate", "-p", "run", "_runs/a"], "/kaggle/input"), (["--username", ""], "KAGGLE_USERNAME"),
])
def test_what_kaggle_would_refuse_later_is_refused_now(tmp_path, capsys, monkeypatch, words, wanted):
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    assert command("kaggle", "--username", "student", *words, "--output", str(tmp_path / "push")) == 2
    assert wanted in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", broken)
    assert command("kaggle", "--username", "student", "--output", str(tmp_path / "push")) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_pushed_job_runs_as_on_kaggle(tmp_path):
    """The folder's notebook, executed in a made-up /kaggle with the data set where Kaggle mounts it, leaves its run below /kaggle/working."""
    cells = load("drawn:n=120,seed=1", 32)
    for folder in ("kaggle/working", "kaggle/input/datasets/teacher/blood"):
        (tmp_path / folder).mkdir(parents=True)
    np.savez(tmp_path / "kaggle/input/datasets/teacher/blood/homework.npz", images=cells.images, labels=cells.labels)
    small = {name: value for name, value in jobs.SMALL.items() if name not in ("data", "output")} | {"epochs": 1}
    folder = kaggle_folder(tmp_path, "--dataset", "teacher/blood", parameters=small)
    run = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", folder / "train.ipynb", "__notebook__.ipynb"], cwd=tmp_path / "kaggle",
                         env=jobs.job_environment(jobs.NO_NETWORK | {"BLOODNB_ROOT": str(tmp_path)}), capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    done, = (tmp_path / "kaggle/working/_runs").iterdir()
    record = json.loads((done / "run.json").read_text())
    assert record["data"] == {"data": "find:"} and record["choices"]["epochs"] == 1 and (done / "metrics.json").is_file()
    printed = "".join(o.get("text", "") for c in nbformat.read(tmp_path / "kaggle/__notebook__.ipynb", 4).cells for o in c.get("outputs", []))
    assert "find: is " in printed and "homework.npz" in printed and "vanishes" not in printed


# The cell that fetches bloodnb

@pytest.mark.parametrize("job", JOBS)
def test_jobs_carry_the_install_cell_and_the_badges(install_cell, tmp_path, job):
    path = ROOT / "nbs" / f"{job}.ipynb"
    (tmp_path / path.name).write_bytes(path.read_bytes())
    install_cell.add_to(tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes(), f"{job}.ipynb is behind .ci/install_cell.py: run it"
    tags = [cell.metadata.get("tags", []) for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert tags[:2] == [["parameters"], ["install"]], "parameters first: papermill puts its own after them"


FAKE_PIP = """
import json, os, pathlib, sys
given = pathlib.Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text().splitlines()
pathlib.Path("pip.json").write_text(json.dumps({"words": sys.argv[1:], "held": given}))
(pathlib.Path(os.environ["FAKE"]) / "bloodnb.py").write_text("")
sys.exit(int(os.environ.get("FAKE_EXIT", 0)))
"""


def run_install(install_cell, folder: Path, job: str = "train", there: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Run the cell in an empty folder with a pip that only writes down what it was asked, and with bloodnb hidden unless `there`."""
    (folder / "fake" / "pip").mkdir(parents=True)
    (folder / "fake" / "pip" / "__main__.py").write_text(FAKE_PIP)
    (folder / "fake" / "pip" / "__init__.py").touch()
    hide = "import sys; sys.path[:] = [p for p in sys.path if p != sys.argv[1]]; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
    code = f"{'' if there else hide}import os\nexec({install_cell.cell_of(job)!r})\nimport bloodnb\nprint(os.path.dirname(bloodnb.__file__))"
    path = os.pathsep.join([str(folder / "fake"), *([str(ROOT)] if there else [])])
    return subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=folder, env={**os.environ, "PYTHONPATH": path, "FAKE": str(folder / "fake"), **environment}, capture_output=True, text=True)


def test_install_cell_does_nothing_where_bloodnb_is(install_cell, tmp_path):
    run = run_install(install_cell, tmp_path, there=True)
    assert run.returncode == 0 and Path(run.stdout.strip()) == ROOT / "bloodnb", run.stderr
    assert not (tmp_path / "pip.json").exists()


def test_install_cell_holds_what_is_installed(install_cell, tmp_path):
    run = run_install(install_cell, tmp_path, "tune")
    assert run.returncode == 0 and Path(run.stdout.strip()) == tmp_path / "fake", run.stdout + run.stderr
    asked = json.loads((tmp_path / "pip.json").read_text())
    assert asked["words"][-1] == "bloodnb[tune] @ git+https://github.com/bloodnb/bloodnb" and "--upgrade" not in asked["words"]
    held = dict(line.split("==") for line in asked["held"])
    for name in ("keras", "numpy", "tensorflow", "pandas", "scikit-learn"):
        assert held[name] == importlib.metadata.version(name)
    assert len(held) == len(asked["held"]), "one line a package"


def test_install_cell_says_why_it_failed(install_cell, tmp_path):
    run = run_install(install_cell, tmp_path, FAKE_EXIT="1", BLOODNB_SOURCE="git+https://example.org/fork")
    assert run.returncode == 1 and "could not be fetched from git+https://example.org/fork" in run.stderr and "Internet" in run.stderr


# Photos that are looked for

def test_a_job_refuses_what_is_ambiguous_before_it_starts(tmp_path, monkeypatch):
    cells = load("drawn:n=16,seed=1", 32)
    (tmp_path / "content/drive/MyDrive/course").mkdir(parents=True)
    for name in ("homework.npz", "second.npz"):
        np.savez(tmp_path / "content/drive/MyDrive/course" / name, images=cells.images, labels=cells.labels)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("BLOODNB_DATA", raising=False)
    monkeypatch.setenv("BLOODNB_ROOT", str(tmp_path))
    error = jobs.settings_error("train", data="find:", recipe="demo")
    assert isinstance(error, ValueError) and all(word in str(error) for word in ("homework.npz", "second.npz", "find:NAME")), error
    assert jobs.settings_error("train", data="find:second", recipe="demo") is None
    assert len(load("find:second", 32)) == 16
    missing = jobs.settings_error("train", data="find:third", recipe="demo")
    assert isinstance(missing, FileNotFoundError) and "mount Drive" in str(missing)


def test_colab_says_that_a_run_will_vanish(tmp_path, monkeypatch, capsys):
    from bloodnb.runs import default_output, start_run

    (tmp_path / "content/drive/MyDrive").mkdir(parents=True)
    monkeypatch.setenv("BLOODNB_ROOT", str(tmp_path))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-1")
    monkeypatch.chdir(tmp_path / "content")
    start_run(default_output("a")).abandon()
    assert "drive.mount" in capsys.readouterr().out
    start_run("drive/MyDrive/a").abandon()
    assert capsys.readouterr().out == ""
