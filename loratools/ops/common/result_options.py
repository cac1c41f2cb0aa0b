"""The options of a call that its result depends on: for model cards, and for the plan of a run that may be resumed.

They are read off the signature of the verb's function, so that a new option cannot be forgotten.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping

# Parameters that say where the result goes, how the work is done, or what else is written: the result is the same.
_WITHOUT_EFFECT = frozenset({
    "out", "overwrite", "threads", "execution", "progress", "card", "plan", "resume", "residual",
})  # fmt: skip


def result_options(
    function: Callable[..., object], arguments: Mapping[str, object], *, inputs: Collection[str]
) -> dict[str, object]:
    """Return the arguments of a call that its result depends on, without the inputs.

    Args:
        function: The function of a verb.
        arguments: The value of each of its parameters, as `locals()` has them in the first line of the function.
        inputs: The names of the parameters that are the inputs.

    Returns:
        The options by name, in the order of the signature.
    """
    apart = _WITHOUT_EFFECT.union(inputs)
    return {name: arguments[name] for name in inspect.signature(function).parameters if name not in apart}
