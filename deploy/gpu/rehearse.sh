#!/bin/bash
# Run check.sh on the CPU as a machine with a GPU would: in an environment of Python 3.12 that has what machine.txt names
# and nothing else, from the archive of `make gpu-bundle`, and without a network where this user may make a namespace.
# rehearse.sh build/gpu-rehearsal [arguments of check.sh]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$1
shift
mkdir -p "$work"
work=$(cd "$work" && pwd)
if [ ! -e "$work/.installed" ] || [ "$here/machine.txt" -nt "$work/.installed" ]; then
  python=${PYTHON:-$(sh "$here/../find_python.sh" 3.12)}
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "$python is not Python 3.12" >&2; exit 2; }
  "$python" -m venv --clear "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/machine.txt"
  # which other releases of these packages bring along, and such a machine lacks
  "$work/venv/bin/python" -m pip uninstall --quiet --yes pydantic pydantic-core annotated-types typing-inspection
  touch "$work/.installed"
fi

rm -rf "${work:?}/home" "$work/out"
mkdir "$work/home"
set -- bash "$here/check.sh" "$work/out" --device cpu --small "$@"
set -- env -i HOME="$work/home" PATH=/usr/local/bin:/usr/bin:/bin PYTHON="$work/venv/bin/python" "$@"
if unshare --net true 2>/dev/null; then # of root
  apart=(unshare --net)
elif unshare --map-root-user --net true 2>/dev/null; then
  apart=(unshare --map-root-user --net)
else
  echo "unshare is not allowed here: the network stays" >&2
  exec "$@"
fi
# Ray's processes speak to each other over the loopback device, which a new namespace has switched off
exec "${apart[@]}" "$work/venv/bin/python" -c '
import fcntl, os, socket, struct, sys
request = struct.pack("16sH14s", b"lo", 1, b"")  # ifreq with IFF_UP
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, request)  # SIOCSIFFLAGS
os.execvp(sys.argv[1], sys.argv[1:])' "$@"
