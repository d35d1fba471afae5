#!/bin/bash
# Takes the cluster of up.sh down: its jobs, its daemons, its lines in /etc/hosts. Only processes
# that belong to this cluster are ended. Logs stay; with --purge the whole folder goes.
set -uo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/common.sh"

# end NAME PIDFILE: asks the daemon to end, and insists after 10 s.
end() {
    local id deadline=$((SECONDS + 10))
    if id=$(own "$1" "$2"); then
        kill "$id"
        while own "$1" "$2" >/dev/null; do
            [ $SECONDS -lt $deadline ] || kill -KILL "$id"
            sleep 0.2
        done
    fi
    rm -f "$2"
}

end_jobs() {
    local deadline=$((SECONDS + 20))
    own slurmctld "$ROOT/run/slurmctld.pid" >/dev/null || return 0
    timeout 10 scancel --user=root
    while [ $SECONDS -lt $deadline ] && [ -n "$(timeout 5 squeue -h)" ]; do sleep 0.5; done
}

# What a killed node leaves behind: steps and their processes know the cluster by its SLURM_CONF.
end_strays() {
    local folder
    for folder in /proc/[0-9]*; do
        grep -qzxF "SLURM_CONF=$SLURM_CONF" "$folder/environ" 2>/dev/null || continue
        grep -qz '^SLURM_JOB_ID=' "$folder/environ" 2>/dev/null \
            || [ "$(cat "$folder/comm" 2>/dev/null)" = slurmstepd ] || continue
        kill -KILL "${folder#/proc/}" 2>/dev/null
    done
}

[ -d "$ROOT" ] || exit 0
end_jobs
for file in "$ROOT"/run/slurmd-*.pid; do
    [ -e "$file" ] && end slurmd "$file"
done
end_strays
end slurmctld "$ROOT/run/slurmctld.pid"
end slurmdbd "$ROOT/run/slurmdbd.pid"
end mariadbd "$ROOT/run/mysql.pid"
end munged "$ROOT/run/munged.pid"
if grep -qF "$HOSTS_MARK" /etc/hosts; then
    # Written in place: inside of a container the file is often a mount.
    kept=$(grep -vF "$HOSTS_MARK" /etc/hosts)
    printf '%s\n' "$kept" >/etc/hosts
fi
[ "${1:-}" = --purge ] && rm -rf "$ROOT"
exit 0
