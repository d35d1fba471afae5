#!/bin/bash
# Runs the tests on the cluster that a marker expression chooses, on a cluster of their own that is
# taken down whatever happens. usage: [PYTHON=...] run.sh EXPRESSION [arguments of pytest]
# Exit codes: 0 passed, 1 failed, 3 no cluster is possible on this machine (a line "SKIPPED: ...").
set -uo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Not the cluster of `make slurm-up`: tests cancel every job and kill nodes.
export G2RPO_SLURM_TESTS_ROOT=${G2RPO_SLURM_TESTS_ROOT:-${TMPDIR:-/tmp}/g2rpo-slurm-tests}
export G2RPO_SLURM_ROOT=$G2RPO_SLURM_TESTS_ROOT G2RPO_SLURM_PORT=16917

# Another test run holds the lock while it uses the cluster; then it is not ours to take down.
# After a failure the logs stay.
down() { flock --nonblock "$G2RPO_SLURM_ROOT.lock" "$HERE/cluster/down.sh" "$@"; }
trap down EXIT
trap 'exit 1' INT TERM HUP

"$HERE/cluster/up.sh" || exit
"${PYTHON:-python}" -m pytest "$HERE" -m "$@" || exit 1
trap - EXIT
down --purge
