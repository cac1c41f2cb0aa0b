"""The record of a merge, in `loratools.json` or in the header of one file: what went in, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools._version import __version__
from loratools.errors import LoraToolsError
from loratools.ops.common.run_plans import adapter_files
from loratools.ops.merge.plan import MergePlan
from loratools.sources.cache import cached_repository
from loratools.storage.files import fingerprint, identify, sha256
from loratools.storage.gguf_reader import read_gguf
from loratools.storage.json_file import parse_json, read_json
from loratools.storage.ownership import MAX_RECORD_BYTES, RECORD
from loratools.storage.safetensors_reader import read_header

# In the header of one file: what `loratools.json` of a folder has of the inputs.
HEADER_RECORD = "loratools.merge"


def inputs_record(plan: MergePlan) -> dict[str, Any]:
    """What goes into the merge: base and adapters, with their hashes and weights."""
    return {
        "base": {
            "path": _shown(plan.base.path),
            "files": [
                {
                    "name": f.name,
                    "bytes": f.file.size,
                    "fingerprint": fingerprint(f.file, f.header_bytes),
                }
                for f in plan.base.files
            ],
        },
        "adapters": [
            {
                "path": _shown(a.path) if a.path is not None else None,
                "weight": w,
                "format": a.format,
                "base_model": a.base_model,
                "files": [{"name": p.name, "bytes": identify(p).size, "sha256": sha256(p)} for p in adapter_files(a)],
            }
            for a, w in zip(plan.adapters, plan.weights, strict=True)
        ],
        **_settings(plan),
        "side_files": {f.name: f.origin if f.text is None else "written anew" for f in plan.side_files},
        "not_copied": {skipped.name: skipped.why for skipped in plan.base.left_out},
    }


def _settings(plan: MergePlan) -> dict[str, object]:
    """What the values depend on beside the inputs, without which the result cannot be made again.

    A rounding other than to nearest, with its seed, its penalty (None: the usual one of each weight) and the file of
    moments; and how the base was quantised in training.
    """
    settings: dict[str, object] = {}
    if plan.trained_on is not None:
        settings["trained_on"] = asdict(plan.trained_on)
    roundings = [o.merged.rounding for o in plan.outputs if o.merged.rounding.mode != "nearest"]
    if not roundings:
        return settings
    penalties = {rounding.penalty for rounding in roundings}
    settings |= {
        "rounding": plan.rounding,
        "seed": roundings[0].seed,
        "penalty": penalties.pop() if len(penalties) == 1 else None,
    }
    located = (r.moments.location for r in roundings if r.moments is not None)
    if (moments := next((place.file.path for place in located if place is not None), None)) is not None:
        settings["moments"] = {"name": moments.name, "sha256": sha256(moments)}
    return settings


def recorded_inputs(path: Path) -> Mapping[str, object]:
    """What the record of a merged model says went into it; empty if there is none that can be read.

    Args:
        path: The folder of the model, or its one file.
    """
    record: object
    try:
        if path.is_dir():
            record = read_json(path / RECORD, max_bytes=MAX_RECORD_BYTES)
        else:
            text = _header_record(path)
            record = parse_json(text.encode(), HEADER_RECORD) if text is not None else None
    except LoraToolsError:
        return {}
    return record if isinstance(record, Mapping) and record.get("verb") == "merge" else {}


def _header_record(path: Path) -> str | None:
    """The record in the header of one file."""
    if path.suffix.lower() == ".gguf":
        text = read_gguf(path).fields.get(HEADER_RECORD)
        return text if isinstance(text, str) else None
    return read_header(path).metadata.get(HEADER_RECORD)


def provenance_text(inputs: Mapping[str, object], report: dict[str, object]) -> str:
    """JSON of version, inputs, and the report without its list of tensors."""
    result = {k: v for k, v in report.items() if k not in ("adapters", "tensors", "output", "seconds")}
    document = {"loratools": __version__, "verb": "merge", **inputs, "result": result}
    return json.dumps(document, indent=2) + "\n"


def _shown(path: Path) -> str:
    """The name of the folder or file, without where it happens to lie on this machine; of one from the hub, its id
    and the commit."""
    if (cached := cached_repository(path)) is not None and cached.commit is not None:
        return cached.address
    return path.absolute().name
