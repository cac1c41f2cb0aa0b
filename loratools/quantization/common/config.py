"""The quantisation that a model's config describes, in any of the known spellings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratools.tensors.dtypes import parse_float_dtype

# llm-compressor once wrote `compression_config`; MLX writes `quantization`, and a copy under the usual name.
_SECTIONS = (
    ("quantization_config", "unknown"),
    ("compression_config", "compressed-tensors"),
    ("quantization", "mlx"),
)


def declared_method(config: Mapping[str, object]) -> str | None:
    """The scheme that the config names; `unknown` if it describes a quantisation without naming the scheme."""
    for section, default in _sections(config):
        return _method(section, default)
    return None


def settings(config: Mapping[str, object]) -> Mapping[str, object]:
    """The first section of the config that describes a quantisation; empty if there is none."""
    return next((section for section, _ in _sections(config)), {})


def find_setting(config: Mapping[str, object], *keys: str) -> object:
    """The value of the first of the keys that a section has, at any depth; None if none has."""
    for section, _ in _sections(config):
        for key in keys:
            if (value := _inside(section, key)) is not None:
                return value
    return None


def model_dtype(config: Mapping[str, object]) -> str | None:
    """The floating-point dtype that the model computes in, by its config; None if the config does not state it."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(value := part.get(key), str):
                return parse_float_dtype(value.removeprefix("torch."))
    return None


def without_quantisation(config: Mapping[str, object]) -> dict[str, object]:
    """The config of the same model with plain weights: without the sections that describe a quantisation."""
    names = {name for name, _ in _SECTIONS}
    plain = {key: value for key, value in config.items() if not (key in names and isinstance(value, Mapping))}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {k: v for k, v in text.items() if not (k in names and isinstance(v, Mapping))}
    return plain


def _sections(config: Mapping[str, object]) -> Iterator[tuple[Mapping[str, object], str]]:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key, default in _SECTIONS:
            if isinstance(section := part.get(key), Mapping) and section:
                yield section, default


def _inside(section: Mapping[str, object], key: str) -> object:
    if section.get(key) is not None:
        return section[key]
    inner = (value for value in section.values() if isinstance(value, Mapping))
    return next((value for part in inner if (value := _inside(part, key)) is not None), None)


def _method(section: Mapping[str, object], default: str) -> str:
    method = section.get("quant_method")
    if isinstance(method, str) and method:
        return method
    # transformers of 2023 wrote no quant_method for bitsandbytes.
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    return "mlx" if {"group_size", "bits"} <= section.keys() else default
