#!/bin/bash
# Builds the image on a Debian base, without a registry or a Docker engine, and tests it. Needs root
# and apt; uses 20 GB, which are removed at the end.
# usage: docker/check-image.sh [FOLDER]     copies the list of packages (SBOM) to FOLDER
# Variables: KEEP_STORAGE=1 keeps images and layers for the next run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUTPUT=$(realpath -m "${1:-build/image}")
ROOT=${TMPDIR:-/tmp}/g2rpo-check-image
BASE=localhost/debian-base:bookworm
IMAGE=localhost/g2rpo:check
STORAGE=(--root "$ROOT/storage" --runroot "$ROOT/run" --storage-driver overlay)
CALLER=12345 # a user that the image does not know
REVISION=$(git rev-parse HEAD)

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "SKIPPED: make check-image needs root and apt; nothing was checked" >&2
    exit 0
fi

say() { printf -- '-- %s (%d s)\n' "$*" "$SECONDS"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

clean() {
    podman "${STORAGE[@]}" rm --all --force >/dev/null 2>&1 || true
    if [ -z "${KEEP_STORAGE-}" ]; then
        buildah "${STORAGE[@]}" rm --all >/dev/null 2>&1 || true
        buildah "${STORAGE[@]}" rmi --all --force >/dev/null 2>&1 || true
        umount "$ROOT/storage/overlay" 2>/dev/null || true
        rm -rf "$ROOT"
    fi
}

install_tools() {
    local packages=(buildah podman runc mmdebstrap debian-archive-keyring)
    if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${packages[@]}" >/dev/null
    fi
}

build_base() {
    if buildah "${STORAGE[@]}" inspect --type image "$BASE" >/dev/null 2>&1; then return; fi
    local mirror container
    # The mirror of this machine.
    mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources \
        2>/dev/null || true)
    mmdebstrap --quiet --variant=minbase bookworm "$ROOT/base.tar" \
        "deb ${mirror:-http://deb.debian.org/debian} bookworm main"
    container=$(buildah "${STORAGE[@]}" from scratch)
    buildah "${STORAGE[@]}" add --quiet "$container" "$ROOT/base.tar" /
    buildah "${STORAGE[@]}" config --cmd /bin/bash \
        --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    # Behind a proxy that opens TLS, pip and uv need its certificate, as in a site's own base image.
    if [ -n "${SSL_CERT_FILE-}" ]; then
        buildah "${STORAGE[@]}" add --quiet "$container" "$SSL_CERT_FILE" /etc/site-ca.crt
        buildah "${STORAGE[@]}" config --env SSL_CERT_FILE=/etc/site-ca.crt \
            --env PIP_CERT=/etc/site-ca.crt "$container"
    fi
    buildah "${STORAGE[@]}" commit --quiet --rm "$container" "$BASE" >/dev/null
    rm -f "$ROOT/base.tar"
}

build_image() {
    local layers=()
    # Through the environment of the caller secrets come near a build: this one must stay out.
    head -c 24 /dev/urandom | base64 | tr -dc 'A-Za-z0-9' | sed 's/^/hf_planted/' > "$ROOT/secrets"
    # Layers are what a next build starts from: where there is none, they are minutes of copying.
    [ -z "${KEEP_STORAGE-}" ] || layers=(--layers)
    HF_TOKEN=$(cat "$ROOT/secrets") IMAGE=$IMAGE ENGINE="buildah ${STORAGE[*]}" \
        docker/build-image.sh --isolation chroot --build-arg BASE_IMAGE="$BASE" \
        "${layers[@]}" > "$ROOT/build.log" 2>&1 \
        || fail "the image does not build: $(tail -n 30 "$ROOT/build.log")"
}

# Without network, and without health checks, which podman leaves to systemd.
run() {
    podman "${STORAGE[@]}" --runtime runc --cgroup-manager cgroupfs run --rm --network none \
        --no-healthcheck \
        --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --shm-size 1g "$@"
}

# refused STATUS TEXT OPTIONS... IMAGE WORD...: exits with STATUS and one line that contains TEXT.
refused() {
    local wanted=$1 text=$2 status=0 output
    shift 2
    output=$(run "$@" 2>&1) || status=$?
    [ "$status" = "$wanted" ] || fail "exit code $status instead of $wanted: $*: $output"
    [[ $output == *"$text"* ]] || fail "'$text' is missing: $*: $output"
    [ "$(wc -l <<< "$output")" = 1 ] || fail "more than one line: $*: $output"
}

use_image() {
    local results=$ROOT/results output status
    say "docker run IMAGE"
    output=$(run "$IMAGE") || fail "g2rpo check: $output"
    echo "$output"
    [[ $(tail -n 1 <<< "$output") == "verdict: ready"* ]] || fail "the check has no verdict"
    [[ $output == *"all as locked"* ]] || fail "packages differ from the lock"
    say "a table, by a user of another uid, on a read-only image"
    rm -rf "$results" && mkdir -p "$results" && chown "$CALLER:$CALLER" "$results"
    run --user "$CALLER:$CALLER" --read-only --volume "$results:/work/results" \
        "$IMAGE" reproduce-table1 PROFILE=smoke SEEDS=1 > "$ROOT/table.log" 2>&1 \
        || fail "no table: $(tail -n 30 "$ROOT/table.log")"
    [ -s "$results/runs/smoke/table1/table1.md" ] || fail "no table in the mounted folder"
    [ -z "$(find "$results" ! -uid "$CALLER")" ] || fail "files of another owner in the folder"
    grep -q "$REVISION" "$results"/runs/smoke/table1/cells/*.json \
        || fail "results do not name the commit"
    say "unknown commands, and folders without write permission"
    refused 2 "unknown command 'tabel1'" "$IMAGE" tabel1
    refused 2 "make lint needs a checkout" "$IMAGE" lint
    chown root:root "$results" && chmod 755 "$results"
    mkdir -p "$ROOT/closed"
    refused 2 "uid $CALLER cannot write to" --user "$CALLER:$CALLER" \
        --volume "$ROOT/closed:/work/results" "$IMAGE" smoke
    status=0
    output=$(run "$IMAGE" check --quick --require-gpu) || status=$?
    [ "$status" = 2 ] && [[ $(tail -n 1 <<< "$output") == *"failed"*"GPU"* ]] \
        || fail "a required GPU that is missing: exit code $status: $output"
    say "the other commands"
    run "$IMAGE" health
    [[ $(run "$IMAGE" help) == *reproduce-table1* ]] || fail "help does not list the targets"
    [ "$(run "$IMAGE" bash -c 'id -u')" = 1000 ] || fail "bash does not run as user 1000"
    [ "$(run --user "$CALLER" "$IMAGE" python -c 'import getpass, pathlib
print(getpass.getuser(), pathlib.Path.home())')" = "g2rpo /home/g2rpo" ] || fail "no home"
    [[ $(run "$IMAGE" g2rpo --help) == *reproduce* ]] || fail "g2rpo does not run"
    [[ $(run "$IMAGE" weights list --profile flux) == *FLUX* ]] || fail "a verb does not run"
    if run "$IMAGE" bash -c 'command -v git || python -c "import tkinter"' 2>/dev/null; then
        fail "git or tkinter is in the image, so that this shows nothing about their absence"
    fi
}

inspect_image() {
    local found wanted
    say "secrets of the caller in layers and configuration"
    # A file that a later layer deletes is still in an earlier one: all of them are in what is saved.
    found=$(podman "${STORAGE[@]}" save "$IMAGE" \
        | { LC_ALL=C grep -czaFf "$ROOT/secrets" || [ $? = 1 ]; })
    [ "$found" = 0 ] || fail "secrets of the caller are in the image, in $found places"
    say "labels, health check, list of packages"
    podman "${STORAGE[@]}" image inspect "$IMAGE" > "$ROOT/inspected.json"
    for wanted in "image.revision\": \"$REVISION" 'image.version": "[0-9]' 'image.created": "2' \
        '"Healthcheck": {'; do
        grep -q "$wanted" "$ROOT/inspected.json" || fail "the image's configuration lacks $wanted"
    done
    mkdir -p "$OUTPUT"
    run --user 0 --volume "$OUTPUT:/out" "$IMAGE" bash -c 'cp /usr/share/g2rpo/*.json \
        /usr/share/g2rpo/debian-packages.txt /out/'
    grep -q '"bomFormat": "CycloneDX"' "$OUTPUT/sbom.cdx.json" \
        && grep -q '"name": "torch"' "$OUTPUT/sbom.cdx.json" || fail "no list of packages"
}

# Jobs that run in the image, started by the code of this checkout.
use_on_slurm() {
    local status=0
    if [ ! -x .venv/bin/python ]; then
        echo "SKIPPED: no .venv (make setup): no SLURM job ran in the image" >&2
        return
    fi
    G2RPO_CONTAINER_IMAGE=$IMAGE G2RPO_CONTAINER_STORAGE=$ROOT PYTHON=.venv/bin/python \
        tests/slurm/run.sh container > "$ROOT/slurm.log" 2>&1 || status=$?
    tail -n 3 "$ROOT/slurm.log"
    [ "$status" = 0 ] || [ "$status" = 3 ] || fail "jobs in the image: $(cat "$ROOT/slurm.log")"
}

mkdir -p "$ROOT"
trap clean EXIT
say "packages that build and run images"
install_tools
say "Debian base"
build_base
say "image"
build_image
say "built"
use_image
inspect_image
say "jobs in the image, on SLURM"
use_on_slurm
say "the image passed all checks"
