# The peers, and the tests that need one; all others have run.
set -euo pipefail
cd "$CLONE"
make oracles
# Tests of pages drive a browser, and those of completion other shells. Where these cannot be had (no root, no apt, no
# network), they are skipped and say so.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { timeout 60 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends \
        chromium chromium-driver; } >"$WORK/chromium.log" 2>&1 || printf '\n*** NOT INSTALLED: chromium\n'
fi
if ! { command -v zsh && command -v fish; } >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { timeout 60 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends \
        zsh fish; } >"$WORK/shells.log" 2>&1 || printf '\n*** NOT INSTALLED: zsh, fish\n'
fi
make test ARGS="-m oracle"
make test ARGS="tests/cli/test_shells.py"
