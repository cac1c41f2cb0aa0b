"""What this installation supports: formats of adapters, layouts of checkpoints, and methods of combining."""

from __future__ import annotations

from dataclasses import dataclass

from loratools import methods, registry
from loratools.arguments import checked


@dataclass(frozen=True)
class FormatInfo:
    """A format that adapters are stored in.

    Attributes:
        name: The name, as arguments like `from_format` and `format` take it.
        read: Whether loratools reads it.
        write: Whether loratools writes it.
        summary: What it is, in one line.
    """

    name: str
    read: bool
    write: bool
    summary: str

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `formats` in the document of `loratools formats --json`."""
        return dict(vars(self))


@dataclass(frozen=True)
class LayoutInfo:
    """A layout that whole models are stored in.

    Attributes:
        name: The name, as `Checkpoint.layout` has it.
        summary: What it is, in one line.
    """

    name: str
    summary: str

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `layouts` in the document of `loratools formats --json`."""
        return dict(vars(self))


@dataclass(frozen=True)
class MethodOption:
    """An option of a method of combining.

    Attributes:
        name: The name, as a key of `options` in `combine` and as `--set` takes it.
        default: The value if none is given.
        range: The allowed values, in words.
        about: What it does, in one line.
    """

    name: str
    default: object
    range: str
    about: str


@dataclass(frozen=True)
class MethodInfo:
    """A method of combining several adapters.

    Attributes:
        name: The name, as the argument `method` of `combine` takes it.
        summary: What it is, in one line.
        description: How it works, with its formula and its paper.
        use: When to use it, in one or two sentences.
        avoid: When not to use it, and what to use instead.
        options: The options of the method.
        laws: Properties of the method by name, as docs/registries.md explains them.
    """

    name: str
    summary: str
    description: str
    use: str
    avoid: str
    options: tuple[MethodOption, ...]
    laws: dict[str, bool]

    def to_dict(self) -> dict[str, object]:
        """Return the entry of `methods` in the document of `loratools methods --json`."""
        return {
            "name": self.name,
            "summary": self.summary,
            "description": self.description,
            "use": self.use,
            "avoid": self.avoid,
            "options": [dict(vars(option)) for option in self.options],
            "laws": dict(self.laws),
        }


@checked
def list_formats() -> tuple[FormatInfo, ...]:
    """Return the formats of adapters, sorted by name.

    Returns:
        One entry per format: its name, whether loratools reads and writes it, and a summary.

    Example:
        >>> import loratools
        >>> [f.name for f in loratools.list_formats() if f.name in ("peft", "mlx") and f.write]
        ['mlx', 'peft']
    """
    entries = ((name, registry.load("formats", name)) for name in registry.names("formats"))
    return tuple(
        FormatInfo(name, hasattr(entry, "read"), hasattr(entry, "write"), registry.summary("formats", name))
        for name, entry in entries
    )


@checked
def list_layouts() -> tuple[LayoutInfo, ...]:
    """Return the layouts of whole models, sorted by name.

    Returns:
        One entry per layout: its name and a summary.

    Example:
        >>> import loratools
        >>> "huggingface" in [layout.name for layout in loratools.list_layouts()]
        True
    """
    return tuple(LayoutInfo(name, registry.summary("checkpoints", name)) for name in registry.names("checkpoints"))


@checked
def list_methods() -> tuple[MethodInfo, ...]:
    """Return the methods with which `combine` can join adapters, sorted by name.

    Returns:
        One entry per method: its name, a summary, its options with their defaults, and its properties.

    Example:
        >>> import loratools
        >>> ties = next(m for m in loratools.list_methods() if m.name == "ties")
        >>> "density" in [option.name for option in ties.options]
        True
    """
    return tuple(method_named(name) for name in registry.names("methods"))


def method_named(name: str) -> MethodInfo:
    """The method with this name.

    Raises:
        UsageError: There is no such method. The message lists the existing ones.
    """
    method = registry.load("methods", name)
    options = tuple(MethodOption(o.name, o.default, o.range, o.about) for o in methods.options_of(name))
    summary, description = registry.summary("methods", name), registry.description("methods", name)
    return MethodInfo(
        name, summary, description, method.ADVICE.use, method.ADVICE.avoid, options, method.LAWS._asdict()
    )
