"""How mlx-lm names the modules of models that see or hear, where transformers names them otherwise.

Facts from mlx-lm 0.32 (models/*.py), held against it by test: its class for such a model has the language model with
its head at `language_model`, and nothing else that could be adapted.
"""

from __future__ import annotations

_IN_TRANSFORMERS = "model.language_model."
_IN_MLX = "language_model.model."
# Models that mlx-lm builds as transformers does, with the layers right below `model.language_model`.
_AS_IN_TRANSFORMERS = frozenset({"gemma3n"})


def has_inner_language_model(name: str) -> bool:
    """Whether a name of transformers shows that the language model is one part of the model."""
    return name.startswith(_IN_TRANSFORMERS)


def model_name(name: str, model_type: str | None, *, inner: bool) -> str:
    """The name that mlx-lm has for a module or weight which transformers calls `name`.

    Args:
        name: As in memory in transformers 5.
        model_type: Of the base's config, where it is known.
        inner: Whether the language model is one part of the model, so that its head is inside of it in mlx-lm.
    """
    if model_type in _AS_IN_TRANSFORMERS:
        return name
    if name.startswith(_IN_TRANSFORMERS):
        return _IN_MLX + name.removeprefix(_IN_TRANSFORMERS)
    return f"language_model.{name}" if inner and name.split(".")[0] == "lm_head" else name


def reason_absent(name: str, *, inner: bool) -> str | None:
    """Why mlx-lm has no module of this name (as `model_name` gives it), where it is one of eyes or ears."""
    if not inner or name.startswith(("language_model.", _IN_TRANSFORMERS)):
        return None
    return "mlx-lm has only the language part of such a model"
