# Style and types.
set -euo pipefail
cd "$CLONE"
make lint
