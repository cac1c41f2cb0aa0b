"""Install the `oracles` extra: the tools that tests and benchmarks compare loratools with.

All at once where that works, otherwise one at a time. An oracle that cannot be installed on this machine
is named on stderr and left out; its tests are then skipped. Never exits with an error because of one.
"""

import re
import subprocess
import sys
from importlib.metadata import requires

EXTRA = re.compile(r"""(\band )?\bextra == ['"]oracles['"]""")


def oracles() -> list[str]:
    """The requirements of the extra, as pip takes them: markers for the system kept, the extra's own removed."""
    found = []
    for requirement in requires("loratools") or []:
        name, _, marker = requirement.partition(";")
        if EXTRA.search(marker):
            marker = EXTRA.sub("", marker).strip()
            found.append(f"{name.strip()}; {marker}" if marker else name.strip())
    return found


def install(*requirements: str) -> bool:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-c", "constraints.txt"]
    return subprocess.run([*command, *sys.argv[1:], *requirements]).returncode == 0


def main() -> int:
    wanted = oracles()
    if not wanted:
        print("error: loratools is not installed here, or has no extra named oracles", file=sys.stderr)
        return 1
    if install(*wanted):
        return 0
    print("\nThe oracles do not install together here; trying each alone.\n", file=sys.stderr)
    failed = [requirement for requirement in wanted if not install(requirement)]
    for requirement in failed:
        print(f"\n*** NOT INSTALLED: {requirement}\n*** Tests that compare with it are SKIPPED.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
