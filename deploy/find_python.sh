#!/bin/sh
# A Python for jest, as a path: $PYTHON where it is set, else the first that will do of python3, those named by version,
# pyenv's and uv's, which uv installs where there is none. `find_python.sh 3.11 3.12` takes these versions alone, in this
# order, and installs none; `find_python.sh --check .venv` prints nothing, and refuses an environment that will not do.
set -eu

# Why the Python $1 will not do, as it lacks one of the modules after it; nothing where it will. Only running it tells:
# pyenv has names for versions that it does not run.
objection() {
  "$@" 2>/dev/null <<'END' || echo "does not run"
import sys
name = "Python %d.%d" % sys.version_info[:2]
missing = []
for module in sys.argv[1:]:
    try:
        __import__(module)
    except ImportError:
        missing.append(module)
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    print("is " + name)
elif missing:
    print("is %s without %s" % (name, " and ".join(missing)))
END
}

refuse() {
  echo "jest needs Python 3.11 to 3.14: $1" >&2
  exit 1
}

if [ "${1-}" = --check ]; then
  why=$(objection "$2/bin/python" - pip)
  [ -z "$why" ] || refuse "that of $2 $why; \`make clean\` removes it, and the next make makes another"
  exit
fi

if [ $# -eq 0 ] && [ -n "${PYTHON-}" ]; then
  why=$(objection "$PYTHON" - venv ensurepip)
  [ -z "$why" ] || refuse "$PYTHON $why"
  echo "$PYTHON"
  exit
fi

seen=
try() {
  path=$(command -v "$1") || return 0
  why=$(objection "$path" - venv ensurepip)
  if [ -z "$why" ]; then
    echo "$path"
    exit
  fi
  seen="$seen; $1 $why"
}

any=
if [ $# -eq 0 ]; then
  any=yes
  try python3
  set -- 3.14 3.13 3.12 3.11
fi
for version; do
  try "python$version"
  for path in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do try "$path"; done
  path=$(UV_PYTHON_PREFERENCE=only-managed uv python find --no-project "$version" 2>/dev/null) && try "$path"
done
if [ -n "$any" ] && command -v uv >/dev/null; then
  echo "no Python 3.11 to 3.14 here: uv installs 3.13" >&2
  uv python install 3.13 >&2 && try "$(UV_PYTHON_PREFERENCE=only-managed uv python find --no-project 3.13)"
fi
refuse "none is here${seen}. Install one with its venv (Debian, Ubuntu: apt install python3-venv), or uv, or name one: make PYTHON=/where/it/is"
