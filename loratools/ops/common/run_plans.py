"""What the plan of a run that can be resumed consists of: inputs by their content, options by their meaning, versions.

A plan (`storage.resumption.RunPlan`) holds all that the bytes of an output depend on, so that equal plans give equal
bytes, and a run goes on only with the work of its own plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from loratools._version import __version__
from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.storage.arrays import read_raw
from loratools.storage.files import fingerprint

# How the command line spells an option whose Python name is another.
_SPELLED = {"penalty": "--lambda", "from_format": "--from", "format": "--to"}


def spelled_options(values: Mapping[str, object]) -> dict[str, str]:
    """The options that have a value, as the command line spells them."""
    return {
        _SPELLED.get(name, f"--{name.replace('_', '-')}"): str(list(value) if isinstance(value, tuple) else value)
        for name, value in values.items()
        if value not in (None, (), [], False)
    }


def program_versions(*, torch: bool = False) -> dict[str, str]:
    """Versions of what computes: this program, numpy, torch where that is used, and the kind of processor."""
    import platform
    from importlib.metadata import version

    import numpy

    versions = {"loratools": __version__, "numpy": numpy.__version__, "machine": platform.machine()}
    return versions | ({"torch": version("torch")} if torch else {})


def checkpoint_inputs(checkpoint: Checkpoint, called: str) -> dict[str, str]:
    """A digest of each file with weights of a model, of pieces from all over it, and one of its config."""
    digests = {f"{f.name} of {called}": fingerprint(f.file, f.header_bytes) for f in checkpoint.files}
    config = json.dumps(checkpoint.config, sort_keys=True, default=str).encode()
    return {**digests, f"config of {called}": sha256(config).hexdigest()}


def adapter_files(adapter: Adapter) -> list[Path]:
    """Every file of the adapter that its tensors lie in, and its config."""
    files = {t.location.file.path for t in adapter.tensors().values() if t.location is not None}
    return sorted(files | {p.with_name("adapter_config.json") for p in files if _has_config(p)})


def digest_of_values(adapter: Adapter) -> str | None:
    """A digest of the values that are in memory, or in a file only in another form; None if there are none."""
    tensors = {name: tensor for name, tensor in sorted(adapter.tensors().items()) if tensor.location is None}
    if not tensors:
        return None
    import numpy as np

    digest = sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(read_raw(tensor)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _has_config(path: Path) -> bool:
    return path.with_name("adapter_config.json").is_file()
