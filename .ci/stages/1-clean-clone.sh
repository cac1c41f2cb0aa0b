# The two commands of the README, in a clone in which nothing is installed.
set -euo pipefail
git clone --quiet --no-hardlinks "$CHECKOUT" "$CLONE"
if [ -d "$CHECKOUT/../shared" ]; then
    cp -R "$CHECKOUT/../shared" "$WORK/shared"
fi
cd "$CLONE"
git log --oneline -1
make demo
make test
