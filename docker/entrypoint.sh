#!/bin/bash
# Runs the first word of `docker run IMAGE WORD ...`: a g2rpo command, a make target, or a program.
set -euo pipefail

CODE=/opt/g2rpo
VERBS=/usr/share/g2rpo/verbs
RESULTS=$PWD/results

fail() {
    echo "error: $*" >&2
    exit 2
}

# Only Makefile targets that run the suite are allowed; the others need a checkout.
is_target() {
    grep -qE "^$1:.*## " "$CODE/Makefile"
}

runs_here() {
    case $1 in
        smoke | mini | tuning | mini-world | status | report | reproduce-* | bench-*) return 0 ;;
    esac
    return 1
}

need_results() {
    mkdir -p "$RESULTS/runs" 2>/dev/null && [ -w "$RESULTS/runs" ] || fail \
        "uid $(id -u) cannot write to $RESULTS; create a folder and mount it:" \
        "mkdir -p results, then -v \"\$PWD/results:/work/results\" --user \"\$(id -u):\$(id -g)\""
}

run_target() {
    need_results
    # The packages are installed, so nothing has to be set up first.
    exec make --no-print-directory --file "$CODE/Makefile" VENV=/opt/venv READY= "$@"
}

usage() {
    echo "usage: docker run [OPTIONS] IMAGE [WORD ...]      default: check image"
    echo "  a g2rpo command:    $(tr '\n' ' ' < "$VERBS")"
    echo "  a make target, with PROFILE=... and SEEDS=...:"
    sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)$/\1|\2/p' "$CODE/Makefile" \
        | while IFS='|' read -r name text; do
            if runs_here "$name"; then printf '    %-18s %s\n' "$name" "$text"; fi
        done
    echo "  a program:          bash, python, accelerate, nvidia-smi, ..."
}

# Cheap, since it runs every few minutes during training: checks disk space and GPUs.
health() {
    need_results
    local free
    free=$(df --output=avail -k "$RESULTS" | tail -n 1)
    [ "$free" -gt 102400 ] || fail "$RESULTS: less than 100 MiB free"
    if [ -e /dev/nvidiactl ] && command -v nvidia-smi >/dev/null; then
        nvidia-smi -L >/dev/null || fail "the GPUs do not respond"
    fi
}

word=${1-}
case $word in
    "" | help | --help | -h) usage; exit 0 ;;
    health) health; exit 0 ;;
    write-verbs)
        python -c 'import typer.main, reproduce.cli as cli
print(*typer.main.get_command(cli.app).commands, sep="\n")' > "$2"
        exit 0 ;;
esac
if grep -qxF -e "$word" "$VERBS"; then
    [ "$word" != reproduce ] || need_results
    exec g2rpo "$@"
elif is_target "$word"; then
    runs_here "$word" || fail "make $word needs a checkout, it does not run in the image"
    run_target "$@"
elif [ "${word#-}" != "$word" ]; then
    exec g2rpo "$@"
elif [ -n "$(type -P -- "$word")" ]; then
    exec "$@"
fi
fail "unknown command '$word'; list commands with \`docker run IMAGE help\`"
