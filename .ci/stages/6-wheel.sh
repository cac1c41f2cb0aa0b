# A wheel, installed where there is no clone and no torch.
set -euo pipefail
cd "$CLONE"
.venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir "$WORK/dist" .
.venv/bin/python -m venv "$WORK/installed"
"$WORK/installed/bin/python" -m pip install --quiet -c constraints.txt click jinja2 numpy pyyaml rich safetensors
"$WORK/installed/bin/python" -m pip install --quiet --no-deps "$WORK"/dist/loratools-*.whl
mkdir "$WORK/elsewhere"
cp -R fixtures/llama-tiny fixtures/llama-tiny-science "$WORK/elsewhere"
cd "$WORK/elsewhere"
loratools=$WORK/installed/bin/loratools
"$loratools" --version
"$loratools" inspect llama-tiny-science --html page.html
grep -q "model.layers.2.mlp.up_proj" page.html
"$loratools" merge llama-tiny llama-tiny-science -o merged
"$WORK/installed/bin/python" -c "import loratools; print(loratools.inspect('merged'))"
