"""Short labels for things that are named by their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence


def labels(paths: Sequence[str]) -> tuple[str, ...]:
    """Return paths without the folders that all of them begin with: what tells them apart."""
    folder = common_folder(paths)
    return tuple(path[len(folder) :] for path in paths)


def common_folder(paths: Sequence[str]) -> str:
    """Return the folders that all of several paths begin with, such as `models/loras/`; empty if there are none."""
    if len(paths) < 2:
        return ""
    shared = 0
    # Letter by letter as they are given: os.path.commonpath refuses `a` beside `/a`, and drops a leading `./`.
    folders = [re.split(re.escape(os.sep), path) for path in paths]
    while all(shared < len(each) for each in folders) and len({each[shared] for each in folders}) == 1:
        shared += 1
    return "".join(name + os.sep for name in folders[0][:shared]) if any(folders[0][:shared]) else ""
