"""The record `loratools.json` beside a merged model: what went into it, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from loratools._version import __version__
from loratools.adapter import Adapter
from loratools.ops.merge.plan import MergePlan
from loratools.storage.files import fingerprint, identify, sha256


def inputs_record(plan: MergePlan) -> dict[str, object]:
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
                "files": _adapter_files(a),
            }
            for a, w in zip(plan.adapters, plan.weights, strict=True)
        ],
        **_rounding(plan),
        "side_files": {f.name: f.origin if f.text is None else "written anew" for f in plan.side_files},
        "not_copied": {left.name: left.why for left in plan.base.left_out},
    }


def _rounding(plan: MergePlan) -> dict[str, object]:
    """The settings of a rounding other than to nearest, without which the result cannot be made again."""
    roundings = [o.rounding for o in plan.outputs if o.rounding.mode != "nearest"]
    if not roundings:
        return {}
    return {"seed": roundings[0].seed, "penalty": roundings[0].penalty}


def provenance_text(inputs: dict[str, object], report: dict[str, object]) -> str:
    """JSON of version, inputs, and the report without its list of tensors."""
    result = {k: v for k, v in report.items() if k not in ("adapters", "tensors", "output", "seconds")}
    document = {"loratools": __version__, "verb": "merge", **inputs, "result": result}
    return json.dumps(document, indent=2) + "\n"


def _adapter_files(adapter: Adapter) -> list[dict[str, object]]:
    """Every file of the adapter that its tensors lie in, and its config, hashed whole."""
    files = {t.location.file.path for t in adapter.tensors().values() if t.location is not None}
    files |= {p.with_name("adapter_config.json") for p in files if p.with_name("adapter_config.json").is_file()}
    return [{"name": p.name, "bytes": identify(p).size, "sha256": sha256(p)} for p in sorted(files)]


def _shown(path: Path) -> str:
    """The name of the folder or file, without where it happens to lie on this machine."""
    return path.absolute().name
