#!/bin/bash
# Runs the tests of the report in a headless Chromium, which it installs where that is possible.
# usage: [PYTHON=...] run.sh [arguments of pytest]
# Exit codes: 0 passed, 1 failed, 3 no Chromium is possible on this machine (a line "SKIPPED: ...").
set -uo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$HERE/../.." || exit 1
PACKAGES=(chromium chromium-driver)

skip() {
    echo "SKIPPED: $1"
    exit 3
}

there() {
    command -v chromium chromium-browser google-chrome >/dev/null \
        && command -v chromedriver chromium.chromedriver >/dev/null
}

install_packages() {
    command -v apt-get >/dev/null || skip "no Chromium with its driver, and no apt-get to install them"
    [ "$(id -u)" = 0 ] || skip "no Chromium with its driver; install ${PACKAGES[*]} (here only root can)"
    local log
    log=$(mktemp)
    echo "installing ${PACKAGES[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >"$log" 2>&1 || true
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 \
        "${PACKAGES[@]}" >>"$log" 2>&1 || skip "apt-get cannot install ${PACKAGES[*]} ($log)"
    rm -f "$log"
}

"${PYTHON:-python}" -c 'import selenium' || { echo "no selenium: run make setup"; exit 1; }
there || install_packages
rm -rf build/report-screenshots
HF_HUB_OFFLINE=1 "${PYTHON:-python}" -m pytest "$HERE" -m browser "$@" || exit 1
echo "screenshots: build/report-screenshots"
