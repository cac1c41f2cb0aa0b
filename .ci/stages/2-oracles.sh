# The peers, and the tests that need one; all others have run.
set -euo pipefail
cd "$CLONE"
make oracles
make test ARGS="-m oracle"
