#!/usr/bin/env bash
# The programs that tests use, from Debian's packages; run as root. What is there already is left as it is. Without the policy some
# packages would start daemons of their own.
set -euo pipefail
packages=(
	chromium                                       # the report in a browser
	iproute2                                       # hosts of a cluster: network namespaces
	slurmctld slurmd slurm-client munge tini       # Slurm
	openssh-server openssh-client rsync            # Ray's cluster launcher
	debootstrap                                    # the image's packages
	prometheus                                     # metrics and alerts
)
missing=()
for package in "${packages[@]}"; do
	dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q ' installed$' || missing+=("$package")
done
((${#missing[@]})) || exit 0
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
	trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends "${missing[@]}"
