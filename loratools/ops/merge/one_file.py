"""What a merge writes: a folder for a base that is a folder; one file for a base that is one file, under a name for it.

Whatever lies beside a model in a folder has no place in one file, so its record is in the header of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loratools._version import __version__
from loratools.checkpoints import Checkpoint
from loratools.errors import UsageError
from loratools.formats.common.source import counted, shown
from loratools.ops.merge.into_gguf import is_gguf
from loratools.ops.merge.plan import MergePlan
from loratools.ops.merge.provenance import HEADER_RECORD, inputs_record
from loratools.storage.commit import prepared_folder, scratch_folder, staged_file
from loratools.storage.files import quoted
from loratools.storage.ownership import MARK
from loratools.storage.resumption import Resumable
from loratools.storage.staging import Staging

# Names that promise one file of weights.
_FILES = (".safetensors", ".gguf", ".npz", ".bin", ".pt", ".pth", ".ckpt")


def is_one_file(out: Path, base: Checkpoint) -> bool:
    """Whether the result is one file: the base is, and the name of the output says so.

    Raises:
        UsageError: The name promises a file that a merge does not write.
    """
    suffix = out.suffix.lower()
    if is_gguf(base):
        if suffix != ".gguf":
            raise UsageError(
                f"{quoted(base.path)} is a GGUF file and gives a GGUF file, and {quoted(out)} is no name of one",
                hint=f"name it {out.with_suffix('').name}.gguf",
            )
        return True
    if suffix not in _FILES:
        return False
    if suffix != ".safetensors":
        raise UsageError(
            f"merge writes safetensors, and {quoted(out)} is the name of another file",
            hint=f"name it {out.with_suffix('.safetensors').name}"
            if _is_file(base)
            else "leave out the suffix: a base that is a folder gives a folder, which can then be converted"
            + (" with convert_hf_to_gguf.py of llama.cpp" if suffix == ".gguf" else ""),
        )
    if not _is_file(base):
        raise UsageError(
            f"{quoted(base.path)} is a folder and gives a folder, and {quoted(out)} is the name of a file",
            hint=f"leave out the suffix: -o {out.with_suffix('').name}",
        )
    return True


def as_one_file(plan: MergePlan) -> MergePlan:
    """The plan for one file: without what a folder would have beside it, of which a warning speaks.

    Raises:
        UsageError: The weights do not go into one file, as they are to be cut.
    """
    if len(plan.files) > 1:
        raise UsageError(
            f"the result would be {len(plan.files)} files, and {quoted(plan.out)} is the name of one",
            hint=f"leave out --max-shard-size, or write a folder: -o {plan.out.with_suffix('').name}",
        )
    warnings = plan.warnings
    if plan.side_files:
        names = ", ".join(shown([quoted(file.name) for file in plan.side_files]))
        warnings += (f"{counted(len(plan.side_files), 'file')} of the model left out, as one file is written: {names}",)
    (file,) = plan.files
    marked = replace(file, metadata={**file.metadata, MARK: __version__})
    return replace(plan, files=(marked,), side_files=(), warnings=warnings, one_file=True)


def recorded(plan: MergePlan) -> MergePlan:
    """The plan with the record of its inputs in the header of its one file. Reads the adapters for their hashes."""
    (file,) = plan.files
    record = json.dumps({"verb": "merge", **inputs_record(plan)})
    return replace(plan, files=(replace(file, metadata={**file.metadata, HEADER_RECORD: record}),))


@contextmanager
def staged_output(
    plan: MergePlan, out: Path, *, overwrite: bool, inputs: Sequence[Path], resumable: Resumable
) -> Iterator[Staging]:
    """Give a folder for the files of the plan; when the block ends in order, it, or its one file, becomes `out`.

    Raises the same errors as `prepared_folder` and `staged_file`.
    """
    if not plan.one_file:
        with prepared_folder(out, overwrite=overwrite, inputs=inputs, resumable=resumable) as prepared:
            yield prepared
        return
    with (
        staged_file(out, overwrite=overwrite, inputs=inputs) as staged,
        scratch_folder(out, resumable=resumable) as scratch,
    ):
        yield scratch
        (scratch.path / plan.files[0].name).replace(staged)


def _is_file(base: Checkpoint) -> bool:
    return base.path.is_file() and len(base.files) == 1
