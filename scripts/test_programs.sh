#!/usr/bin/env bash
# Installs the Debian packages of programs that some tests start: a browser, Slurm, sshd. Those tests skip, with their
# reason, where they lack one. Does nothing where the programs are there, without root, or without apt-get.
set -uo pipefail

missing=()
need() { # PACKAGE PROGRAM...
    local package=$1 program
    shift
    for program; do
        command -v "$program" >/dev/null || { missing+=("$package") && return; }
    done
}

command -v chromium-browser google-chrome >/dev/null || need chromium chromium
need munge munged
need slurm-wlm slurmctld slurmd srun sbatch scontrol sinfo
need openssh-server sshd
need openssh-client ssh ssh-keygen
need iproute2 ip
need util-linux setpriv unshare nsenter
need procps pgrep
need hostname hostname

[ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0

# Daemons that come with a package are not to be started: the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ] && printf '#!/bin/sh\nexit 101\n' 2>/dev/null >"$policy"; then
    trap 'rm -f "$policy"' EXIT
    chmod +x "$policy"
fi

echo "test programs: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60)
failed=()
"${apt[@]}" update >/dev/null 2>&1
for package in "${missing[@]}"; do
    "${apt[@]}" install -y --no-install-recommends "$package" >/dev/null 2>&1 || failed+=("$package")
done
[ ${#failed[@]} -eq 0 ] || echo "test programs: no ${failed[*]}, so the tests that start them skip" >&2
exit 0
