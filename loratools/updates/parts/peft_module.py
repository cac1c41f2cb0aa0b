"""What PEFT stores for one module, as every kind takes it to make its updates of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loratools.errors import FormatError
from loratools.hints import DAMAGED_ADAPTER
from loratools.storage.untrusted_regex import UntrustedRegexes
from loratools.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class PeftModule:
    """One module of an adapter of PEFT, with its tensors and what the config says of it.

    `parts`: the tensors under the module, by PEFT's names without the adapter's (`hada_w1_a`, `vera_lambda_b`).

    config    all fields of adapter_config.json. rank      what the config says for this module, patterns included; None
    if it says nothing. alpha     likewise; `alpha_source` is config or assumed. shared    tensors that belong to no
    module (`vera_A`), by name. modules   names of all modules of the adapter, in the order of the file. regexes
    matches patterns of the config against these names, within one budget for the whole adapter.
    """

    name: str
    parts: Mapping[str, LazyTensor]
    config: Mapping[str, object]
    rank: int | None
    alpha: float
    alpha_source: str
    shared: Mapping[str, LazyTensor] = field(default_factory=dict)
    modules: Sequence[str] = ()
    regexes: UntrustedRegexes = field(default_factory=lambda: UntrustedRegexes([]))

    def need(self, *names: str) -> list[LazyTensor]:
        """These parts.

        Raises:
            FormatError: One is missing.
        """
        missing = [name for name in names if name not in self.parts]
        if missing:
            raise FormatError(
                f"'{self.name}' has {', '.join(sorted(self.parts))} without {', '.join(missing)}",
                hint=DAMAGED_ADAPTER,
            )
        return [self.parts[name] for name in names]
