"""The plan of an extraction, by which a run that goes on with a killed one knows that it is the same."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.checkpoints import Checkpoint
from loratools.ops.common.run_plans import checkpoint_inputs, program_versions, spelled_options
from loratools.storage.origins import origin_of
from loratools.storage.resumption import RunPlan


def run_plan(base: Checkpoint, tuned: Checkpoint, options: Mapping[str, object]) -> RunPlan:
    """All that the bytes of the adapter depend on.

    Args:
        base: The model before fine-tuning; the adapter has its name.
        tuned: The fine-tuned model.
        options: Keyword arguments of `extract` that change the result.
    """
    inputs = checkpoint_inputs(base, "the base") | checkpoint_inputs(tuned, "the fine-tuned model")
    named = {"name of the base": base.name if origin_of(base.path) is not None else base.path.absolute().name}
    return RunPlan(inputs, {"verb": "extract"} | spelled_options(options) | named, program_versions(torch=True))
