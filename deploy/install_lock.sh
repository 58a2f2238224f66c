#!/bin/sh
# Install all that a lock names, and nothing else, into an environment: install_lock.sh .venv deploy/locks/run.txt
# With uv, in the release that dev.txt names: it takes less than half of pip's time. With pip where uv cannot be had or fails, as
# where only pip's configuration names the index.
set -eu
venv=$1 lock=$2
cut_short=$venv/.cut-short-$(basename "$lock")

with_pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes "$@"; }

if [ ! -x "$venv/bin/uv" ]; then
  sed -n '/^uv==/,/[^\\]$/p' "$(dirname "$0")/locks/dev.txt" >"$venv/uv.txt"
  with_pip -r "$venv/uv.txt" || echo "uv could not be had" >&2
fi

set -- --no-deps --compile-bytecode --require-hashes -r "$lock"
[ ! -e "$cut_short" ] || set -- --reinstall "$@" # uv and pip take a package that is half there for a whole one
: >"$cut_short"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@" || {
  echo "pip installs what $lock names, as uv did not" >&2
  with_pip --force-reinstall -r "$lock"
}
rm "$cut_short"
