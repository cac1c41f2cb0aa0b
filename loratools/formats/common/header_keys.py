"""Keys of a file header whose texts come from the tensors or from loratools, never from a person or another file."""

from __future__ import annotations

from typing import Final

from loratools.storage.ownership import MARK

LIBRARY: Final = "format"
"""Which library reads the file: every format writes its own."""

FAMILY: Final = "loratools.family"
"""The family of image models that the file is for, which its names do not always determine."""

NETWORK_RANK: Final = "ss_network_dim"
NETWORK_ALPHA: Final = "ss_network_alpha"
"""kohya's rank and alpha, which are corrected if a change of rank makes them wrong."""

NEVER_COPIED: Final = frozenset({FAMILY, MARK, "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash"})
"""Texts about one file: they are recomputed for another file, or left out of it."""

NEVER_SET: Final = NEVER_COPIED | {LIBRARY, NETWORK_RANK, NETWORK_ALPHA}
"""A person's text under these keys would be replaced, or would be wrong."""
