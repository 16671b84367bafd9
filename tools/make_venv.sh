#!/bin/sh
# Makes a virtual environment with pip in it: make_venv.sh VENV [PYTHON]
# Asks for nothing but a Python 3.11 or newer; where that Python came without pip (Debian packages it
# apart), pip's wheel is fetched through apt without installing anything outside VENV.
set -eu
venv=$1
python=${2:-}

fail() {
    echo "error: $*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

version_of() {
    command -v "$1" >/dev/null || { echo "not there" && return; }
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "not a working Python"
}

[ ! -e "$venv/bin/python" ] || fail "$venv exists already; to make it anew, run: make distclean"
if [ -n "$python" ]; then
    new_enough "$python" || fail "PYTHON=$python is $(version_of "$python"), Forge needs Python 3.11 or newer;" \
        "name one, as in: make PYTHON=/usr/bin/python3.11"
else
    for candidate in python3.11 python3 python3.12 python3.13 python3.14; do
        if new_enough "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "found no Python 3.11 or newer (python3 is $(version_of python3)); install one" \
        "(Debian: apt install python3.11 python3.11-venv) or name one: make PYTHON=/path/to/python3.11"
fi

if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv "$venv" || { rm -rf "$venv" && fail "$python -m venv $venv failed; its message is above"; }
    exit 0
fi

name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
remedy="run: apt install $name-venv"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The wheel that ensurepip itself would install: already on disk, or else in a package that is
# unpacked into a scratch folder.
if command -v apt-get >/dev/null && ! ls /usr/share/python-wheels/pip-*.whl >/dev/null 2>&1; then
    (cd "$scratch" && apt-get download python3-pip-whl && dpkg-deb -x ./*.deb .) >"$scratch/log" 2>&1 || true
fi
wheel=$(ls /usr/share/python-wheels/pip-*.whl "$scratch"/usr/share/python-wheels/pip-*.whl 2>/dev/null | head -n 1)
[ -n "$wheel" ] || fail "$python has no ensurepip, so there is no pip for $venv, and apt had none to fetch; $remedy"

made=no
"$python" -m venv --without-pip "$venv" 2>"$scratch/log" &&
    "$venv/bin/python" "$wheel/pip" install --quiet --no-index "$wheel" 2>>"$scratch/log" && made=yes
if [ "$made" = no ]; then
    rm -rf "$venv"
    fail "$python cannot make a virtual environment ($(tail -n 1 "$scratch/log")); $remedy"
fi

# Debian's pip looks for the system's certificates only. Where there are none, and pip has not been told
# of others, it uses those it carries itself.
pip="$venv/bin/python -m pip"
if [ ! -e /etc/ssl/certs/ca-certificates.crt ] && ! $pip config get global.cert >/dev/null 2>&1; then
    $pip config --quiet --site set global.cert "$(ls "$PWD/$venv"/lib/*/site-packages/pip/_vendor/certifi/cacert.pem)"
fi
