#!/bin/bash
# Measure all that jest does on a GPU: bash deploy/gpu/check.sh OUT [--device cpu] [--small] [--only kernels,steps]
# Where ray, pydantic or open_clip are not installed, they come from the archive that `make gpu-bundle` made.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
archive=$root/build/gpu/site.tar.xz
names=$(mktemp -d "${TMPDIR:-/tmp}/jest-gpu-names-XXXXXX")
trap 'rm -rf "$names"' EXIT

# The names under which an installed jest has these folders
ln -s "$root/pipelines" "$names/jest_pipelines"
ln -s "$root/deploy" "$names/jest_deploy"
export PYTHONPATH=$names:$root

if ! "$python" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("ray", "pydantic", "open_clip"))))'; then
  [ -f "$archive" ] || { echo "Ray is not installed, and there is no $archive: run make gpu-bundle" >&2; exit 2; }
  site=${TMPDIR:-/tmp}/jest-gpu-site-$(id -u)-$(cksum <"$archive" | tr ' ' -)
  if [ ! -d "$site" ]; then # a second call finds it unpacked
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="tar")' "$archive" "$site.partial"
    mv "$site.partial" "$site"
  fi
  export PYTHONPATH=$names:$site:$root
fi

export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
"$python" -m deploy.gpu.check "$@"
