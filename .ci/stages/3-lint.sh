# Style, types, and the site, which is built without a warning.
set -euo pipefail
cd "$CLONE"
make lint
make docs
