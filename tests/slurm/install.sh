#!/usr/bin/env bash
# Debian's Slurm, for the tests of this folder; run as root. Without the policy its packages would start daemons of their own.
set -euo pipefail
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	printf '#!/bin/sh\nexit 101\n' > "$policy"
	chmod 755 "$policy"
	trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge tini
