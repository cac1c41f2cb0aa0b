"""A checkpoint of one model, from its weights: what all layouts of one folder or file share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loratools.checkpoints import Checkpoint
from loratools.checkpoints.common.dumped import dump_refusal, is_dump
from loratools.checkpoints.common.side_files import STRAY_SHARD, sort_out
from loratools.checkpoints.common.tied import tied_weights
from loratools.checkpoints.common.unsupported import adapter_refusal, is_adapter
from loratools.checkpoints.common.weights import Weights, read_config
from loratools.errors import FormatError
from loratools.quantization import recognise
from loratools.storage.files import quoted


def open_model(path: Path, layout: str, weights: Weights, *, config_file: str = "config.json") -> Checkpoint:
    """The checkpoint at `path`, a folder or one file, with these weights, and what lies beside them.

    Raises:
        FormatError: It has no tensors.
        UnsupportedError: It is an adapter.
    """
    folder = path if path.is_dir() else path.parent
    config = read_config(folder, config_file)
    stored = weights.component.tensors
    if not stored:
        raise FormatError(f"{quoted(path)} has no tensors")
    if is_adapter(stored):
        raise adapter_refusal(path)
    if is_dump(stored):
        raise dump_refusal(path)
    quantisation = recognise(stored, config)
    logical = quantisation.logical(stored) if quantisation is not None else stored
    side_files, left_out = sort_out(folder, weights.file_names) if path.is_dir() or config else ((), ())
    stray = [
        f"{quoted(skipped.name)} is {skipped.why}; it is left out" for skipped in left_out if skipped.why == STRAY_SHARD
    ]
    return Checkpoint(
        path=path,
        layout=layout,
        components=(weights.component,),
        stored=stored,
        weights=logical,
        config=config,
        config_file=config_file,
        tied=tied_weights(logical.keys(), config),
        quantisation=quantisation,
        side_files=side_files,
        left_out=left_out,
        warnings=(*weights.warnings, *stray),
    )


def without_repetitions(weights: Weights, config: Mapping[str, object]) -> Weights:
    """The weights of pickles without the names that transformers ties to another that has the same values.

    torch.save writes both names of a tied weight, and its values once. Stored on its own in the result, such a name
    would be overwritten by what it is tied to as soon as the model is loaded.
    """
    component = weights.component
    stored = component.tensors

    def repeats(name: str) -> bool:
        follows = tied_weights(stored.keys() - {name}, config).get(name)
        return follows is not None and stored[follows].source == stored[name].source

    # Few are ever looked at: those whose values another name has too.
    counts = Counter((t.location.file, t.location.offset) for t in stored.values() if t.location is not None)
    shared = [n for n, t in stored.items() if t.location is not None and counts[t.location.file, t.location.offset] > 1]
    dropped = {name for name in shared if repeats(name)}
    files = tuple(
        replace(f, tensors={name: t for name, t in f.tensors.items() if component.prefix + name not in dropped})
        for f in component.files
    )
    return replace(weights, component=replace(component, files=files))
