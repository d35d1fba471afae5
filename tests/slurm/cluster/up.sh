#!/bin/bash
# Brings up a SLURM cluster of two nodes on the loopback address: munged, MariaDB, slurmdbd,
# slurmctld, and one slurmd for each of node1 and node2, two fake GPUs each. No systemd is needed.
# What runs already is left alone. Everything is below G2RPO_SLURM_ROOT, but for two names that are
# added to /etc/hosts and removed by down.sh: torch.distributed wants to resolve the nodes' names.
# Exit codes: 0 up, 1 failed, 3 not possible on this machine (one line "SKIPPED: ...").
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/common.sh"
HOST=$(hostname -s)
PACKAGES=(munge slurm-client slurmctld slurmd slurmdbd mariadb-server)

installed() { dpkg-query -W -f '${db:Status-Abbrev}\n' "${PACKAGES[@]}" 2>/dev/null | grep -c '^ii'; }

install_packages() {
    [ "$(installed)" = "${#PACKAGES[@]}" ] && return
    local log=$ROOT/log/apt.log
    echo "installing ${PACKAGES[*]}"
    # RUNLEVEL keeps the packages from starting system services of their own.
    export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >"$log" 2>&1 || true
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 \
        "${PACKAGES[@]}" >>"$log" 2>&1 || skip "apt-get cannot install ${PACKAGES[*]} ($log)"
    unset RUNLEVEL
}

render() {
    local name
    for name in slurm.conf gres.conf slurmdbd.conf; do
        # slurmdbd refuses a configuration that others can read.
        (umask 077 && sed -e "s#@ROOT@#$ROOT#g" -e "s#@HOST@#$HOST#g" \
            -e "s#@CONTROLLER_PORT@#$FIRST_PORT#" -e "s#@ACCOUNTING_PORT@#$((FIRST_PORT + 1))#" \
            -e "s#@DATABASE_PORT@#$((FIRST_PORT + 2))#" -e "s#@NODE1_PORT@#$((FIRST_PORT + 3))#" \
            -e "s#@NODE2_PORT@#$((FIRST_PORT + 4))#" "$HERE/$name.in" >"$ROOT/etc/$name")
    done
    chmod 644 "$ROOT/etc/slurm.conf" "$ROOT/etc/gres.conf"
    echo CgroupAutomount=no >"$ROOT/etc/cgroup.conf"
    [ -s "$ROOT/etc/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$ROOT/etc/munge.key")
}

prepare_machine() {
    local number node
    for number in 0 1; do
        [ -c "$ROOT/dev/nvidia$number" ] || mknod -m 666 "$ROOT/dev/nvidia$number" c 1 3 \
            2>"$ROOT/log/mknod.log" || skip "no permission to make device files below $ROOT"
    done
    for node in "${NODES[@]}"; do
        grep -qF "127.0.0.1 $node $HOSTS_MARK" /etc/hosts \
            || echo "127.0.0.1 $node $HOSTS_MARK" >>/etc/hosts
    done
}

start_munged() {
    own munged "$ROOT/run/munged.pid" >/dev/null || munged --num-threads=4 \
        --socket="$ROOT/run/munge.sock" --key-file="$ROOT/etc/munge.key" \
        --pid-file="$ROOT/run/munged.pid" --log-file="$ROOT/log/munged.log" \
        --seed-file="$ROOT/state/munged.seed"
    wait_for munged munge_answers
}
munge_answers() { munge -n -S "$ROOT/run/munge.sock" | unmunge -S "$ROOT/run/munge.sock"; }

start_database() {
    local client=(--no-defaults --socket="$ROOT/run/mysql.sock")
    if [ ! -e "$ROOT/mysql/installed" ]; then
        rm -rf "$ROOT/mysql"
        mkdir "$ROOT/mysql"
        mariadb-install-db --no-defaults --user=root --datadir="$ROOT/mysql" --skip-test-db \
            --auth-root-authentication-method=socket >"$ROOT/log/mariadb-install.log" 2>&1
        touch "$ROOT/mysql/installed"
    fi
    own mariadbd "$ROOT/run/mysql.pid" >/dev/null || setsid mariadbd --no-defaults --user=root \
        --datadir="$ROOT/mysql" --socket="$ROOT/run/mysql.sock" --pid-file="$ROOT/run/mysql.pid" \
        --log-error="$ROOT/log/mariadb.log" --bind-address=127.0.0.1 \
        --port=$((FIRST_PORT + 2)) --innodb-buffer-pool-size=64M \
        --innodb-lock-wait-timeout=900 </dev/null >/dev/null 2>&1 &
    wait_for MariaDB mariadb-admin "${client[@]}" ping
    mariadb "${client[@]}" <<'SQL'
CREATE DATABASE IF NOT EXISTS slurm_accounting;
CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS slurm@127.0.0.1 IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_accounting.* TO slurm@localhost;
GRANT ALL ON slurm_accounting.* TO slurm@127.0.0.1;
SQL
}

start_accounting() {
    own slurmdbd "$ROOT/run/slurmdbd.pid" >/dev/null || slurmdbd
    wait_for slurmdbd timeout 10 sacctmgr -n show cluster
    # The controller looks for its cluster when it starts.
    [ -n "$(timeout 10 sacctmgr -nP show cluster g2rpo)" ] || timeout 10 sacctmgr -i add cluster g2rpo >/dev/null
}

start_nodes() {
    local node fresh=
    if ! own slurmctld "$ROOT/run/slurmctld.pid" >/dev/null; then
        slurmctld -f "$SLURM_CONF"
        fresh=yes
    fi
    wait_for slurmctld timeout 5 scontrol ping
    # A cluster that was not taken down in order remembers jobs that nobody wants any more.
    [ -z "$fresh" ] || timeout 10 scancel --user=root
    for node in "${NODES[@]}"; do
        own slurmd "$ROOT/run/slurmd-$node.pid" >/dev/null || slurmd -f "$SLURM_CONF" -N "$node"
    done
    wait_for "two nodes" nodes_answer
}
nodes_answer() {
    [ "$(sinfo -h -N -p main -o %T | grep -cE '^(idle|mixed|allocated|completing)$')" = "${#NODES[@]}" ]
}

[ "$(id -u)" = 0 ] || skip "a SLURM cluster can only be brought up by root"
if [ "$(installed)" != "${#PACKAGES[@]}" ] && ! command -v apt-get >/dev/null; then
    skip "SLURM is not installed and there is no apt-get"
fi
mkdir -p "$ROOT"/{etc,run,log,state,dev}
for node in "${NODES[@]}"; do mkdir -p "$ROOT/spool/$node"; done
install_packages
own slurmctld "$ROOT/run/slurmctld.pid" >/dev/null || render
prepare_machine
start_munged
start_database
start_accounting
start_nodes
echo "up; to use it: export SLURM_CONF=$SLURM_CONF"
