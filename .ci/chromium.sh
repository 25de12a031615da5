#!/usr/bin/env bash
# The site's tests drive a real browser. Find Chromium, or install Debian's when this machine lets us.
set -euo pipefail
for name in "${BLOODNB_CHROMIUM:-chromium}" chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo 'make: installing Debian packages chromium and fonts-dejavu-core for the browser tests'
    export DEBIAN_FRONTEND=noninteractive
    if apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; then exit 0; fi
fi
echo 'make: no Chromium, so the browser tests cannot run. Install the package chromium, or set BLOODNB_CHROMIUM to a browser.' >&2
