"""What the plan of a run that can be resumed consists of: inputs by their content, options by their meaning, versions.

A plan (`storage.resumption.RunPlan`) holds all that the bytes of an output depend on, so that equal plans give equal
bytes, and a run goes on only with the work of its own plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

from loratools._version import __version__
from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.formats import Base
from loratools.storage.arrays import read_raw
from loratools.storage.files import fingerprint
from loratools.storage.files import sha256 as file_sha256
from loratools.storage.resumption import RunPlan
from loratools.tensors.lazy import LazyTensor, viewed
from loratools.updates.parts.protocol import Update

# How the command line spells an option whose Python name is another.
_SPELLED = {"penalty": "--lambda", "from_format": "--from", "format": "--to"}


def spelled_options(values: Mapping[str, object], renamed: Mapping[str, str] | None = None) -> dict[str, str]:
    """The options that have a value, as the command line spells them; `renamed`: those of one verb alone."""
    spelled = {**_SPELLED, **(renamed or {})}
    return {
        spelled.get(name, f"--{name.replace('_', '-')}"): str(list(value) if isinstance(value, tuple) else value)
        for name, value in values.items()
        if value not in (None, (), [], {}, False)
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


def adapters_plan(
    verb: str,
    adapters: Sequence[Adapter],
    base: Base | None,
    options: Mapping[str, object],
    *,
    weights: Sequence[str] = (),
) -> RunPlan:
    """The plan of a verb that makes one adapter of others.

    Args:
        verb: The verb.
        adapters: What the result is made of, in the order of the arguments.
        base: What is known of the model that they are for.
        options: Keyword arguments of the verb that change the result, by their names in Python.
        weights: The weight of each adapter in words, of a verb that has weights.
    """
    inputs: dict[str, str] = {}
    for number, adapter in enumerate(adapters, 1):
        inputs |= _adapter_inputs(adapter, f"adapter {number}" if len(adapters) > 1 else "the adapter")
    if base is not None:
        shapes = sorted((name, list(shape)) for name, shape in base.shapes.items())
        inputs["names, shapes and config of the base"] = _digest([shapes, base.config, base.family])
    renamed = {} if verb == "convert" else {"format": "--format"}
    weight_of = {f"weight of adapter {number}": weight for number, weight in enumerate(weights, 1)}
    return RunPlan(inputs, {"verb": verb} | spelled_options(options, renamed) | weight_of, program_versions(torch=True))


def _adapter_inputs(adapter: Adapter, called: str) -> dict[str, str]:
    """A digest of every file of an adapter, of its values that are in memory, and of what its modules are."""
    tensors = sorted(adapter.tensors().items())
    leaves = [(name, leaf) for name, tensor in tensors for leaf in viewed(tensor)]
    files = _files_of(leaf for _, leaf in leaves)
    inputs = {f"{_name_in(adapter.path, path)} of {called}": file_sha256(path) for path in files}
    # An adapter that a caller has changed in memory has the files of the one that it was read from.
    places = [(name, leaf.dtype, leaf.shape, leaf.location and leaf.location.offset) for name, leaf in leaves]
    modules = [(name, update.kind, _numbers_of(update)) for name, update in adapter.updates.items()]
    replaced = [(name, replacement.declared, replacement.rows) for name, replacement in adapter.replacements.items()]
    inputs[f"modules of {called}"] = _digest([modules, replaced, places, adapter.notes, adapter.base_model])
    in_memory = [(name, leaf) for name, leaf in leaves if leaf.location is None]
    if in_memory:
        inputs[f"values of {called}"] = _digest_of(in_memory)
    return inputs


def _name_in(folder: Path | None, path: Path) -> str:
    """The name of a file of an adapter, which stays when the adapter is moved."""
    inside = folder is not None and path != folder and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if inside and folder is not None else path.name


def _numbers_of(update: Update) -> dict[str, object]:
    """What an update has beside its tensors."""
    return {f.name: value for f in fields(update) if not isinstance(value := getattr(update, f.name), LazyTensor)}  # type: ignore[arg-type]


def _digest(document: object) -> str:
    return sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def adapter_files(adapter: Adapter) -> list[Path]:
    """Every file of the adapter that its tensors lie in, and its config."""
    return _files_of(adapter.tensors().values())


def digest_of_values(adapter: Adapter) -> str | None:
    """A digest of the values that are in memory, or in a file only in another form; None if there are none."""
    tensors = [(name, tensor) for name, tensor in sorted(adapter.tensors().items()) if tensor.location is None]
    return _digest_of(tensors) if tensors else None


def _digest_of(tensors: Sequence[tuple[str, LazyTensor]]) -> str:
    import numpy as np

    digest = sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(read_raw(tensor)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _files_of(tensors: Iterable[LazyTensor]) -> list[Path]:
    """The files that tensors lie in as they are, and the configs beside them, in order."""
    files = {tensor.location.file.path for tensor in tensors if tensor.location is not None}
    configs = {path.with_name("adapter_config.json") for path in files}
    return sorted(files | {config for config in configs if config.is_file()})
