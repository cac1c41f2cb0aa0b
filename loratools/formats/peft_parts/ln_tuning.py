"""LN tuning: whole copies of norms, trained, below the name of the tuner.

base_model.model.<module>.ln_tuning_layers[.<adapter>].weight    takes the place of <module>.weight
"""

from __future__ import annotations

import re
from dataclasses import replace

from loratools.errors import FormatError
from loratools.formats.common.source import AdapterSource, counted, shown
from loratools.storage.files import quoted

_SEGMENT = re.compile(r"\.ln_tuning_layers(?:\.[^.]+)?(?=\.(?:weight|bias)$)")


def with_plain_keys(source: AdapterSource) -> AdapterSource:
    """The source with the keys of the weights that its tensors replace.

    Raises:
        FormatError: A weight that is there twice, as those of several adapters are.
    """
    tensors = {}
    twice = []
    for key, tensor in source.tensors.items():
        plain = _SEGMENT.sub("", key)
        if plain in tensors:
            twice.append(quoted(plain))
        tensors[plain] = tensor
    if twice:
        raise FormatError(
            f"{quoted(source.file)} has {counted(len(twice), 'norm')} with more than one copy",
            details=shown(sorted(twice)),
            hint="save each adapter on its own, with PEFT's save_pretrained",
        )
    return replace(source, tensors=tensors)
