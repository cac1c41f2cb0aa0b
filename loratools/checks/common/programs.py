"""Programs that load adapters, and which formats each of them reads."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.checks.common.servers import SERVERS
from loratools.errors import UsageError

# Formats of files for image models: names that programs for them look up, in one spelling or another.
_IMAGE = frozenset({"bare", "bfl", "comfy", "diffusers", "kohya", "lycoris", "onetrainer", "peft", "xlabs"})


@dataclass(frozen=True)
class Program:
    """A program that loads adapters.

    Attributes:
        reads: The formats that it loads.
        format: The format to convert to for it.
        convert: The options of `loratools convert` that write it.
    """

    reads: frozenset[str]
    format: str
    convert: str


PROGRAMS: dict[str, Program] = {
    **{name: Program(frozenset({"peft"}), "peft", f"--to peft --serve {name}") for name in SERVERS},
    "comfyui": Program(_IMAGE, "comfy", "--to comfy"),
    "diffusers": Program(_IMAGE, "diffusers", "--to diffusers"),
    "llama.cpp": Program(frozenset({"gguf"}), "gguf", "--to gguf --base BASE"),
    "mlx": Program(frozenset({"mlx"}), "mlx", "--to mlx"),
    "peft": Program(frozenset({"peft"}), "peft", "--to peft"),
}


def program(name: str) -> Program:
    """The program of this name.

    Raises:
        UsageError: There is none.
    """
    if name not in PROGRAMS:
        raise UsageError(f"no program named '{name}'; there are: {', '.join(sorted(PROGRAMS))}")
    return PROGRAMS[name]
