"""The state dict of a whole PeftModel: the weights of a model, with the factors of an adapter unmerged among them.

base_model.model.<module>.base_layer.weight          the model's own weight
base_model.model.<module>.lora_A.default.weight      a factor, with the name of the adapter
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from loratools.errors import UnsupportedError
from loratools.storage.files import quoted

# Some models have adapters of their own, named after what they see or hear (`lora_A.vision`), among their weights.
_FACTOR = re.compile(r"(?P<module>(?P<wrapped>.*base_model\.model\.)?.+)\.lora_A\.(?P<adapter>[^.]+)\.weight")


def is_dump(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a PeftModel with its base: each module with factors has its weight as well."""
    names = list(names)
    # Every adapter is asked, and hardly any has such a weight.
    if ".base_layer.weight" not in "\n".join(names):
        return False
    every = set(names)
    factors = [parsed for name in every if ".lora_A." in name and (parsed := _FACTOR.fullmatch(name))]
    if not all(parsed["wrapped"] or parsed["adapter"] == "default" for parsed in factors):
        return False
    modules = {parsed["module"] for parsed in factors}
    return bool(modules) and all(f"{module}.base_layer.weight" in every for module in modules)


def dump_refusal(path: Path) -> UnsupportedError:
    """What is said where such a file is given as a model."""
    return UnsupportedError(
        f"{quoted(path)} is the state dict of a PeftModel: the factors of its adapter are not merged into its weights",
        hint="give it as an adapter, and as the base the model that was trained: loratools merge BASE "
        f"{quoted(path)} -o FOLDER",
    )
