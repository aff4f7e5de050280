#!/bin/bash
# Two hosts on one machine, for what needs several: each has its own network, processes, host name and sshd.
#
#   two_hosts.sh up FOLDER       makes FOLDER for keys and settings, starts node1 and node2, prints "ready" and stays:
#                                the hosts end with this process
#   two_hosts.sh run FOLDER N COMMAND...    on host number N, in the present folder
#   two_hosts.sh down FOLDER     ends them from elsewhere
#
# Files are shared, as on a cluster with one file system. Needs root, iproute2, util-linux, procps, openssh, pdsh.
# Nothing of it has a name on this machine: the namespaces live as long as their processes, which the kernel ends with
# this one, kill -9 included. The one cable goes from host to host, so the subnet collides with nothing, and what lies
# over /etc and ~/.ssh lies there only as the hosts see it.
set -euo pipefail

subnet=10.77.0

make_keys() {
    local number
    ssh-keygen -q -t ed25519 -N "" -C two-hosts -f client
    for number in 1 2; do
        ssh-keygen -q -t ed25519 -N "" -C "node$number" -f "node$number"
        echo "node$number,$subnet.$number $(cut -d " " -f 1,2 "node$number.pub")" >>known_hosts
        # As Debian has it: a host's own name is a loopback address, so libraries must be told the interface.
        printf "%s\n" "127.0.0.1 localhost" "127.0.1.1 node$number" "$subnet.$((3 - number)) node$((3 - number))" \
            >"hosts$number"
    done
}

write_settings() {
    local number
    cat >ssh_config <<END
IdentityFile $PWD/client
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile $PWD/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
END
    for number in 1 2; do
        cat >"sshd_config$number" <<END
HostKey $PWD/node$number
AuthorizedKeysFile $PWD/client.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
PrintMotd no
END
    done
}

# What becomes the first process of a host; its end is the end of all others.
host() {
    hostname "node$1"
    mount -t tmpfs tmpfs /run # sshd's folder, and who is logged in
    mount -t tmpfs tmpfs /var/log
    mkdir /run/sshd
    touch /var/log/lastlog
    mount --bind ssh_config /etc/ssh/ssh_config
    mount --bind "hosts$1" /etc/hosts
    if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
    exec "$(command -v sshd)" -D -e -f "$PWD/sshd_config$1"
}

start_host() {
    local unshared
    setpriv --pdeathsig KILL unshare --net --mount --uts --pid --mount-proc --fork --kill-child \
        "$script" host "$PWD" "$1" </dev/null >"sshd$1.log" 2>&1 &
    unshared=$!
    until pgrep -P "$unshared" >"pid$1"; do
        kill -0 "$unshared" || { cat "sshd$1.log" >&2 && exit 1; }
        sleep 0.05
    done
}

connect() {
    local number
    nsenter --net -t "$(<pid1)" ip link add lan0 type veth peer name lan0 netns "$(<pid2)"
    for number in 1 2; do
        nsenter --net -t "$(<"pid$number")" ip address add "$subnet.$number/24" dev lan0
        nsenter --net -t "$(<"pid$number")" ip link set lan0 up
        nsenter --net -t "$(<"pid$number")" ip link set lo up
    done
}

on_host() {
    exec nsenter --net --mount --uts --pid -t "$(<"$folder/pid$1")" env --chdir="$PWD" "${@:2}"
}

await_sshd() {
    local number
    for number in 1 2; do
        for _ in {1..100}; do
            if (on_host 1 ssh -o ConnectTimeout=5 "node$number" true) 2>ssh.log; then continue 2; fi
            sleep 0.1
        done
        cat ssh.log "sshd$number.log" >&2
        exit 1
    done
}

up() {
    umask 077
    mkdir "$folder"
    cd "$folder"
    make_keys
    write_settings
    start_host 1
    start_host 2
    connect
    await_sshd
    echo $$ >pid
    echo ready
    wait
}

down() {
    local pid
    pid=$(<"$folder/pid")
    # Another process may have this number by now.
    if [ "$(readlink "/proc/$pid/cwd")" = "$folder" ]; then kill "$pid"; fi
    rm -r "$folder"
}

script=$(realpath "$0")
folder=$(realpath -m "$2")
case $1 in
up) up ;;
host) cd "$folder" && host "$3" ;;
run) on_host "${@:3}" ;;
down) down ;;
*) exit 2 ;;
esac
