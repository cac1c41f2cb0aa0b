"""Whether an adapter belongs to another base model than the one it is merged into, as far as both say what they are."""

from __future__ import annotations

from loratools.adapter import Adapter
from loratools.checkpoints import Checkpoint
from loratools.matching import Matches
from loratools.naming.same_model import is_named, other_model
from loratools.storage.files import quoted


def different_base_warning(adapter: Adapter, base: Checkpoint, matches: Matches) -> str | None:
    """The warning that an adapter seems to be for another model, or None if there is no evidence of that.

    Evidence is either that the base itself says that it is another model (`naming/same_model.py`), or that its names
    differ and modules of the adapter have no place in it.

    Args:
        adapter: The adapter; without a `base_model` there is nothing to compare.
        base: The checkpoint that it is merged into.
        matches: Where the modules of the adapter belong in the base.
    """
    if not adapter.base_model:
        return None
    if (other := other_model(adapter.base_model, base.path, base.config)) is not None:
        return f"'{adapter.name}' is for '{adapter.base_model}', and {quoted(base.path)} says that it is '{other}'"
    if is_named(adapter.base_model, base.path, base.config):
        return None
    if matches.leftovers:
        return (
            f"'{adapter.name}' is for '{adapter.base_model}', and {len(matches.leftovers)} of its names do not fit "
            f"{quoted(base.path)}, which may be another model"
        )
    return None
