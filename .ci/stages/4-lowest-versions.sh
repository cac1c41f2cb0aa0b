# The fast tests at the lowest versions that pyproject.toml declares, of everything but torch, which stays at the
# version of constraints.txt: its lowest is gigabytes on a machine that has a CPU build of one version only.
set -euo pipefail
cd "$CLONE"
.venv/bin/python -m venv "$WORK/lowest"
python=$WORK/lowest/bin/python
"$python" -m pip install --quiet -c constraints.txt torch uv

echo torch >"$WORK/excluded.txt"
"$python" -m uv pip compile --quiet --no-header --no-annotate --resolution lowest-direct --python "$python" \
    --excludes "$WORK/excluded.txt" --extra test pyproject.toml >"$WORK/lowest.txt"
cat "$WORK/lowest.txt"
"$python" -m pip install --quiet --no-deps -r "$WORK/lowest.txt"
"$python" -m pip install --quiet --no-deps -e .
"$python" -m pytest -n auto --maxprocesses 4 tests/storage tests/algebra tests/cli tests/report tests/formats
