#!/bin/bash
# Converts the built image to one file for Apptainer or SingularityCE.
# usage: docker/build-sif.sh [FILE.sif]
# Variables: IMAGE (the image to convert; build it with `make image`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SIF=${1:-build/g2rpo.sif}
IMAGE=${IMAGE:-g2rpo}
ARCHIVE=build/g2rpo.tar

fail() {
    echo "error: $*" >&2
    exit 2
}

builder=$(command -v apptainer || command -v singularity) \
    || fail "found no apptainer or singularity; install one, or build on a machine that has it"
mkdir -p build
trap 'rm -f "$ARCHIVE"' EXIT
rm -f "$ARCHIVE"
if command -v docker >/dev/null && docker image inspect "$IMAGE" >/dev/null 2>&1; then
    docker save --output "$ARCHIVE" "$IMAGE"
elif command -v podman >/dev/null && podman image exists "$IMAGE"; then
    podman save --format docker-archive --output "$ARCHIVE" "$IMAGE"
elif command -v buildah >/dev/null && buildah inspect --type image "$IMAGE" >/dev/null 2>&1; then
    buildah push "$IMAGE" "docker-archive:$ARCHIVE"
else
    fail "no image $IMAGE; build it with \`make image\`"
fi
"$builder" build --force "$SIF" docker/g2rpo.def
echo "$SIF"
