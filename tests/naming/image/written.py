"""Names that are written for each published model: one module in every format of image models, as the docs have them.

PYTHONPATH=.:tests python -m naming.image.written       rewrite the table in docs/registries.md (needs diffusers)
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from naming.image import published
from naming.image.spellings import DOCS, RANK, write_without_values
from safetensors.torch import load_file

import loratools
from loratools.formats.image_parts.spellings import split

FORMATS = ("diffusers", "peft", "comfy", "kohya", "onetrainer", "bfl")
# What a format refuses to write, by the words of its refusal.
REFUSED = {"onetrainer": "of a UNet", "bfl": "of a model that is not Flux"}
# Formats beside its own that the loader of diffusers for a family reads, of those that are written here.
ALSO_READ: dict[str, set[str]] = {
    "sd3": set(),
    "auraflow": set(),
    "flux": {"kohya"},
    "cogvideox": set(),
    "mochi": set(),
    "ltx": {"comfy"},
    "ltx2": {"comfy"},
    "sana": set(),
    "hunyuan-video": set(),
    "hunyuan-video15": set(),
    "lumina2": {"comfy"},
    "kandinsky5": set(),
    "wan": {"comfy", "kohya"},
    "hidream": {"comfy"},
    "qwen-image": {"comfy", "kohya"},
    "krea2": {"comfy"},
    "z-image": {"kohya"},
    "flux2": {"comfy", "kohya"},
    "ideogram4": {"comfy"},
    "cosmos": set(),
}
_TABLE = re.compile(r"<!-- written -->\n(.*?)\n<!-- end -->", re.DOTALL)
_QUERY = re.compile(r"(?!.*(?:refiner|text)).*\.0\..*\.to_q(?:uery)?")


def query(family: str) -> str:
    """The queries of the first attention in the blocks of the denoiser, under its name in diffusers."""
    return next(name for name in published.modules(family) if _QUERY.fullmatch(name))


def write(folder: Path, family: str, format: str) -> Path | None:
    """Write an adapter of that one module in a format; its path, or None where the format has no such models."""
    name, component = query(family), published.family(family).component
    rows, columns = published.modules(family)[name]
    source = folder / "source.safetensors"
    full = f"{component}.{name}"
    write_without_values(source, {f"{full}.lora_A.weight": (RANK, columns), f"{full}.lora_B.weight": (rows, RANK)})
    out = folder / (format if format == "peft" else f"{format}.safetensors")
    try:
        loratools.convert(source, out, format=format, base=family)
    except loratools.UnsupportedError as error:
        if REFUSED.get(format, "\0") not in str(error):
            raise
        return None
    return out


def written_name(family: str, format: str, folder: Path) -> str | None:
    """The name of the module in the file; None where the format has no such models."""
    out = write(folder, family, format)
    if out is None:
        return None
    stored = load_file(out / "adapter_model.safetensors" if format == "peft" else out)
    names = {parts[0] for key in stored if (parts := split(key)) is not None}
    (name,) = names
    return name


def read_by_diffusers(family: str) -> set[str]:
    """The formats of a family that its loader in diffusers reads; empty where it has none."""
    if family in ("sd", "sdxl"):
        return {"diffusers", "kohya"}
    return {"diffusers", *ALSO_READ[family]} if family in ALSO_READ else set()


def row(family: str) -> str:
    names = []
    for format in FORMATS:
        with TemporaryDirectory() as folder:
            name = written_name(family, format, Path(folder))
        names.append("–" if name is None else f"`{name}`")
    loaded = ", ".join(f"`{format}`" for format in FORMATS if format in read_by_diffusers(family))
    return f"| `{family}` | {' | '.join(names)} | {loaded or '–'} |"


def head() -> list[str]:
    titles = ["family", *(f"`{format}`" for format in FORMATS), "what diffusers loads"]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def documented() -> list[str]:
    """The lines of the table in the docs."""
    match = _TABLE.search(DOCS.read_text(encoding="utf-8"))
    assert match is not None
    return match[1].split("\n")


def documented_names(family: str) -> dict[str, str]:
    """The names that the docs tell for a family, by the format that has them."""
    line = next(line for line in documented() if line.startswith(f"| `{family}` |"))
    cells = [cell.strip() for cell in line.split("|")[2:-2]]
    return {format: cell.strip("`") for format, cell in zip(FORMATS, cells, strict=True) if cell != "–"}


if __name__ == "__main__":
    table = "\n".join([*head(), *(row(family) for family in sorted(published.MODELS))])
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(_TABLE.sub(f"<!-- written -->\n{table}\n<!-- end -->", text), encoding="utf-8")
