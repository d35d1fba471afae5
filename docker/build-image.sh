#!/bin/bash
# Builds the image with docker, podman or buildah.
# usage: docker/build-image.sh [options of `build`, e.g. --build-arg BASE_IMAGE=debian:bookworm-slim]
# Variables: IMAGE (its name), ENGINE (the command that builds).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_engine() {
    if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
        echo docker
    elif command -v podman >/dev/null; then
        echo podman
    elif command -v buildah >/dev/null; then
        echo buildah
    else
        echo "error: found no running docker, podman or buildah; install one of them" \
            "(Debian, Ubuntu: apt-get install buildah)" >&2
        exit 2
    fi
}

read -ra engine <<< "${ENGINE:-$(find_engine)}"
[ "${#engine[@]}" -gt 0 ] || exit 2
# The image has no git: pass it the commit, and whether the code differs from it.
revision=$(git rev-parse HEAD 2>/dev/null || true)
if [ -n "$revision" ] && [ -n "$(git status --porcelain -- g2rpo reproduce benchmarks slurm docker pyproject.toml uv.lock)" ]; then
    revision=$revision-dirty
fi
format=()
# The OCI format has no place for HEALTHCHECK.
case "$(basename "${engine[0]}")" in podman | buildah) format=(--format docker) ;; esac
exec "${engine[@]}" build "${format[@]}" \
    --build-arg REVISION="$revision" \
    --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)" \
    --build-arg CREATED="$(date -u +%Y-%m-%dT%H:%M:%SZ)" \
    --tag "${IMAGE:-g2rpo}" --file docker/Dockerfile "$@" .
