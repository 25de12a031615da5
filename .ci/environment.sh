#!/usr/bin/env bash
# Make .venv hold exactly requirements.lock and this project, editable. `make` calls this when either has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

fitting_python() {  # the path of the first candidate that runs and is 3.11 or 3.12
    local candidate version seen=
    for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
        version=$(python_version "$candidate")
        case $version in
            3.11 | 3.12) "$candidate" -c 'import sys; print(sys.executable)'; return ;;
            ?*) seen+=" $candidate is $version;" ;;
        esac
    done
    echo "make: no fitting Python. Got:${seen:- none that runs;} wanted 3.11 or 3.12." >&2
    echo "make: install one (on Debian 12: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

fetch_uv() {  # uv installs the lock in seconds where pip takes minutes; it lands in .venv/uv unless the machine has it
    command -v uv >/dev/null && return
    if "$1" -m pip --version >/dev/null 2>&1; then
        "$1" -m pip install -qq --root-user-action=ignore --target .venv/uv --upgrade uv
    elif "$1" -c 'import ensurepip' 2>/dev/null; then
        "$1" -m venv .venv/uv && .venv/uv/bin/python -m pip install -qq uv
    else
        echo "make: $1 has neither pip nor ensurepip, wanted one of them to fetch uv. On Debian: apt-get install python3-venv" >&2
        return 1
    fi
}

# An interrupted install may leave half a package that counts as whole: start afresh then. A finished .venv is brought up to date.
if [ ! -x .venv/bin/python ] || [ -e .venv/unfinished ]; then
    python=$(fitting_python)
    echo "make: setting up .venv with $python ($(python_version "$python")); about a minute, and 3 GB of disk"
    "$python" -m venv --clear --without-pip .venv
else
    python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')
    echo "make: bringing .venv ($(python_version "$python")) up to date with requirements.lock"
fi
rm -f .venv/installed
touch .venv/unfinished

# uv reads UV_* settings but not pip's, so pass on the index that pip was told to use.
if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ] && [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
export PATH="$PWD/.venv/uv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
fetch_uv "$python"
# Compiled now: where PYTHONDONTWRITEBYTECODE is set, every process would compile all that it imports, TensorFlow among it.
uv pip sync --quiet --compile-bytecode requirements.lock
uv pip install --quiet --no-deps --editable .
rm .venv/unfinished
