"""Adapters of published models in every spelling of their names, as files without values, and what is read of them.

A file has every linear layer of the model with factors of rank 1. Its header has the published shapes; its values are a
hole in the file, so that hundreds of large adapters take neither time nor disk.

    PYTHONPATH=.:tests python -m naming.image.spellings       rewrite the table in docs/registries.md (needs diffusers)
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from naming.image import published

import loratools

Shapes = published.Shapes
RANK = 1
DOCS = Path(__file__).resolve().parents[3] / "docs" / "registries.md"
_TABLE = re.compile(r"<!-- spellings -->\n(.*?)\n<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Spelling:
    """How a tool spells the names of an adapter.

    Attributes:
        title: the heading of its column.
        naming: `original` for the names of the model's authors, `diffusers` for those of diffusers.
        named: the name of a module in the file, from its name in the model and the component.
        down: what follows the name for factor A.
        up: what follows the name for factor B.
        alpha: whether each module has a tensor of its alpha.
        folder: whether it is a PEFT folder, whose config names the model's class or does not.
    """

    title: str
    naming: str
    named: Callable[[str, str], str]
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alpha: bool = False
    folder: str = ""


def _flat(prefix: str) -> Callable[[str, str], str]:
    return lambda name, _: prefix + name.replace(".", "_")


def _dotted(prefix: str) -> Callable[[str, str], str]:
    return lambda name, component: prefix.format(component) + name


_KOHYA = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
_DEFAULT = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
SPELLINGS = (
    Spelling("`diffusion_model.`", "original", _dotted("diffusion_model.")),
    Spelling("`diffusion_model.`, names of diffusers", "diffusers", _dotted("diffusion_model.")),
    Spelling("`lora_unet_`", "original", _flat("lora_unet_"), **_KOHYA, alpha=True),
    Spelling("`lora_unet_`, names of diffusers", "diffusers", _flat("lora_unet_"), **_KOHYA, alpha=True),
    Spelling("`lora_unet__`", "diffusers", _flat("lora_unet__"), **_KOHYA, alpha=True),
    Spelling("`transformer.` or `unet.`", "diffusers", _dotted("{}.")),
    Spelling("`lora_transformer_` (OneTrainer)", "diffusers", _flat("lora_transformer_"), **_KOHYA, alpha=True),
    Spelling("`lycoris_`", "diffusers", _flat("lycoris_"), **_KOHYA, alpha=True),
    Spelling("bare", "diffusers", _dotted("")),
    Spelling("bare, `.default`", "diffusers", _dotted(""), **_DEFAULT),
    Spelling("bare, names of the authors", "original", _dotted("")),
    Spelling("bare, names of the authors, `.default`", "original", _dotted(""), **_DEFAULT),
    Spelling("PEFT folder with the class", "diffusers", _dotted("base_model.model."), folder="class"),
    Spelling("PEFT folder without it", "diffusers", _dotted("base_model.model."), folder="bare"),
    Spelling("`transformer.base_model.model.`", "diffusers", _dotted("{}.base_model.model.")),
)


def write(folder: Path, family: str, spelling: Spelling, *, only: str = ".*") -> tuple[Path, Shapes]:
    """Write an adapter of a published model; its path, and the modules of diffusers that it adapts.

    Args:
        folder: where to write it.
        family: the family of the model.
        spelling: how the names are spelled.
        only: the names in diffusers of the modules that are adapted, as a regular expression.
    """
    table = published.family(family)
    shapes = {name: shape for name, shape in published.modules(family).items() if re.fullmatch(only, name)}
    named = published.spelled(family, spelling.naming, shapes)
    parts = {t for name in named if (place := table.find(name)) is not None for t in place.targets}
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in named.items():
        full = spelling.named(name, table.component)
        tensors |= {f"{full}{spelling.down}": (RANK, columns), f"{full}{spelling.up}": (rows, RANK)}
        if spelling.alpha:
            tensors[f"{full}.alpha"] = ()
    path = folder / "adapter_model.safetensors" if spelling.folder else folder / "adapter.safetensors"
    if spelling.folder:
        leaves = sorted({name.rpartition(".")[2] for name in named})
        config: dict[str, object] = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": leaves}
        if spelling.folder == "class":
            config["auto_mapping"] = {
                "base_model_class": published.MODELS[family][0],
                "parent_library": "diffusers.models.transformers",
            }
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_without_values(path, tensors)
    return (folder if spelling.folder else path), {n: shapes[n] for n in parts if n in shapes}


def write_without_values(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of float32: scalars are 1, and the values of all other tensors are a hole."""
    header: dict[str, object] = {}
    ordered = sorted(tensors, key=lambda key: (bool(tensors[key]), key))
    end = 0
    for key in ordered:
        start, end = end, end + 4 * prod(tensors[key])
        header[key] = {"dtype": "F32", "shape": list(tensors[key]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(struct.pack("<f", 1) * sum(not shape for shape in tensors.values()))
        file.truncate(8 + len(text) + end)


def read_as(family: str, spelling: Spelling, folder: Path, base: str | None = None) -> bool:
    """Whether such a file is read with the family's meanings: every module of diffusers, of its shape, and no other."""
    path, modules = write(folder, family, spelling)
    adapter = loratools.load(path, base=base)
    component = published.family(family).component
    shapes = {name: update.shape for name, update in adapter.updates.items()}
    return shapes == {f"{component}.{name}": shape for name, shape in modules.items()}


def cell(family: str, spelling: Spelling, folder: Path) -> str:
    """What the table says of a spelling: whether it is read as it is, with the model named, or not."""
    if read_as(family, spelling, folder):
        return "yes"
    return "with `--base`" if read_as(family, spelling, folder, base=family) else "no"


def row(family: str, folder: Path) -> str:
    cells = []
    for number, spelling in enumerate(SPELLINGS):
        inner = folder / str(number)
        inner.mkdir()
        cells.append(cell(family, spelling, inner))
    return f"| `{family}` | {' | '.join(cells)} |"


def head() -> list[str]:
    titles = ["family", *(spelling.title for spelling in SPELLINGS)]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def table() -> str:
    rows = []
    for family in sorted(published.MODELS):
        with TemporaryDirectory() as folder:
            rows.append(row(family, Path(folder)))
    return "\n".join([*head(), *rows])


def documented() -> list[str]:
    """The lines of the table in the docs."""
    match = _TABLE.search(DOCS.read_text(encoding="utf-8"))
    assert match is not None
    return match[1].split("\n")


if __name__ == "__main__":
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(_TABLE.sub(lambda match: match[0].replace(match[1], table()), text), encoding="utf-8")
