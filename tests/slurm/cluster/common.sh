# Shared by up.sh and down.sh: where the cluster lives, and which processes are its own.
ROOT=${G2RPO_SLURM_ROOT:-${TMPDIR:-/tmp}/g2rpo-slurm}
# Five ports from here on.
FIRST_PORT=${G2RPO_SLURM_PORT:-16817}
NODES=(node1 node2)
# Each cluster has lines of its own in /etc/hosts, so that two of them do not take them from each other.
HOSTS_MARK="# g2rpo-slurm: $ROOT/"
SKIPPED=3
export SLURM_CONF=$ROOT/etc/slurm.conf

# skip REASON: this machine cannot have a cluster; callers tell it from a failure by the exit code.
skip() {
    echo "SKIPPED: $1"
    exit "$SKIPPED"
}

# own NAME PIDFILE: prints the process id if that process lives, has that name, and is ours.
# The pid file alone could name a stranger that was given the number of a dead daemon.
own() {
    local id
    id=$(cat "$2" 2>/dev/null) && [ -n "$id" ] || return 1
    [ "$(cat "/proc/$id/comm" 2>/dev/null)" = "$1" ] || return 1
    grep -qzF -e "$ROOT/" "/proc/$id/cmdline" "/proc/$id/environ" 2>/dev/null || return 1
    echo "$id"
}

# wait_for WHAT COMMAND...: until the command succeeds, 30 s at most.
wait_for() {
    local what=$1 deadline=$((SECONDS + 30))
    shift
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $deadline ]; then
            echo "error: $what not there after 30 s; the last lines of the logs:" >&2
            tail -n 15 "$ROOT"/log/*.log >&2
            exit 1
        fi
        sleep 0.2
    done
}
