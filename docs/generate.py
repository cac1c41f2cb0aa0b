"""Write the parts of README.md and docs/ that say what the code says: tables of the registries, and help texts.

    python docs/generate.py          rewrite them
    python docs/generate.py --check  end with 1 where one is out of date

A part stands between `<!-- name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratools import registry
from loratools.cli import verbs

ROOT = Path(__file__).parents[1]


def formats() -> str:
    rows = []
    for name in registry.names("formats"):
        entry = registry.load("formats", name)
        able = ["yes" if hasattr(entry, word) else "no" for word in ("read", "write")]
        rows.append(f"| `{name}` | {able[0]} | {able[1]} | {registry.summary('formats', name)} |")
    return "\n".join(["| format | read | write | what it is |", "|---|---|---|---|", *rows])


def _summaries(folder: str, word: str) -> str:
    rows = [f"| `{name}` | {registry.summary(folder, name)} |" for name in registry.names(folder)]
    return "\n".join([f"| {word} | what it is |", "|---|---|", *rows])


def layouts() -> str:
    return _summaries("checkpoints", "layout")


def methods() -> str:
    """Every method with what holds of it (`methods.Laws`) and what `--set` takes."""
    from loratools import methods as registered

    rows = []
    for name in registry.names("methods"):
        method = registry.load("methods", name)
        laws, advice = method.LAWS, method.ADVICE
        held = (laws.rotation_equivariant, laws.ignores_split, laws.order_free, laws.keeps_one)
        marks = " | ".join("yes" if law else "no" for law in held)
        options = "; ".join(f"`{o.name}={o.default}`: {o.about}" for o in registered.options_of(name)) or "–"
        summary = registry.summary("methods", name)
        rows.append(f"| `{name}` | {summary} | {advice.use} | {advice.avoid} | {marks} | {options} |")
    laws = "exact on cores | ignores the A, B split | order-free | one adapter unchanged"
    head = f"| method | what it is | when to use it | when not to | {laws} | `--set` |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *rows])


def kinds() -> str:
    return _summaries("updates", "kind")


def quantization() -> str:
    return _summaries("quantization", "scheme")


def rules() -> str:
    """Every rule of `check` with what it looks for, what it needs, and what to do."""
    from loratools.ops.check.rules import list_rules

    rows = [f"| `{r.id}` | {r.severity} | {r.summary} | {r.needs} | {r.fix} |" for r in list_rules()]
    return "\n".join(["| rule | severity | what it tells | needs | what to do |", "|---|---|---|---|---|", *rows])


def families() -> str:
    """Every family of image and video models: classes of diffusers, blocks and inputs of published models, words."""
    from loratools.naming.image.evidence import denoisers

    rows = []
    for family in sorted(denoisers(), key=lambda family: family.name):
        about = registry.summary("naming/image/families", family.name)
        classes = ", ".join(f"`{name}`" for name in family.classes) or "–"
        depths = "; ".join(f"{' or '.join(map(str, sorted(d)))} `{block}`" for block, d in family.depths.items())
        widths = ", ".join(map(str, sorted({size for sizes in family.widths.values() for size in sizes})))
        words = ", ".join(f"`{word}`" for word in family.words)
        rows.append(f"| `{family.name}` | {about} | {classes} | {depths or '–'} | {widths or '–'} | {words} |")
    head = "| family | what it is | class in diffusers | published blocks | published inputs | words in headers |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def recipe() -> str:
    """The fields of a recipe file, and those of each of its adapters."""
    from loratools.ops.combine import recipe as recipes

    parts = [_recipe_fields(recipes.Recipe, recipes.RECIPE_FIELDS), "For each adapter, where it is a mapping:"]
    return "\n\n".join([*parts, _recipe_fields(recipes.Ingredient, recipes.ADAPTER_FIELDS)])


def _recipe_fields(cls: type, kinds: Mapping[str, type | tuple[type, ...]]) -> str:
    from loratools.ops.combine.recipe import kind_name

    docs = inspect.getdoc(cls) or ""
    explained = dict(re.findall(r"^    (\w+): ((?:.*\n?)(?:^        .*\n?)*)", docs, re.M))
    rows = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if default is dataclasses.MISSING else _recipe_default(default)
        about = " ".join(explained[field.name].split()).replace("|", "\\|")
        rows.append(f"| `{field.name}` | {kind_name(kinds[field.name])} | {shown} | {about} |")
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


def recipe_schema() -> str:
    """The JSON schema of a recipe file, for editors."""
    from loratools.methods import options_of
    from loratools.ops.combine import recipe as recipes

    names = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}

    def fields_of(cls: type, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, dict[str, object]]:
        docs = inspect.getdoc(cls) or ""
        explained = dict(re.findall(r"^    (\w+): ((?:.*\n?)(?:^        .*\n?)*)", docs, re.M))
        fields: dict[str, dict[str, object]] = {}
        for name, kind in kinds.items():
            types = sorted({names[each] for each in (kind if isinstance(kind, tuple) else (kind,))} - {"integer"})
            types = types or ["integer"]
            fields[name] = {
                "type": types[0] if len(types) == 1 else types,
                "description": " ".join(explained[name].split()),
            }
        return fields

    numbers = {"type": "number"}
    adapter = fields_of(recipes.Ingredient, recipes.ADAPTER_FIELDS)
    adapter["modules"] |= {"additionalProperties": numbers}
    adapter["blocks"] |= {"items": numbers}
    recipe = fields_of(recipes.Recipe, recipes.RECIPE_FIELDS)
    recipe["method"] |= {"enum": list(registry.names("methods")), "default": "linear"}
    recipe["heads"] |= {"enum": list(recipes.HEADS), "default": "refuse"}
    recipe["calibrate"] |= {"enum": list(recipes.CALIBRATIONS)}
    recipe["rank"] |= {"minimum": 1}
    recipe["max_rank"] |= {"minimum": 1}
    recipe["energy"] |= {"exclusiveMinimum": 0, "maximum": 1}
    for globs in ("include", "exclude"):
        recipe[globs] |= {"items": {"type": "string"}}
    entry = {"type": "object", "properties": adapter, "required": ["adapter"], "additionalProperties": False}
    recipe["adapters"] |= {"items": {"anyOf": [{"type": "string"}, entry]}}
    by_method = []
    for method in registry.names("methods"):
        options = {
            option.name: {
                "description": option.about,
                "default": option.default,
                **({"enum": list(option.choices)} if option.choices else {}),
            }
            for option in options_of(method)
        }
        of_method: dict[str, object] = {"properties": {"method": {"const": method}}}
        if method != "linear":  # the method of a recipe that names none
            of_method["required"] = ["method"]
        of_set = {"properties": options, "additionalProperties": False}
        by_method.append({"if": of_method, "then": {"properties": {"set": of_set}}})
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of loratools combine",
        "type": "object",
        "properties": recipe,
        "additionalProperties": False,
        "allOf": by_method,
    }
    return json.dumps(schema, indent=2) + "\n"


def _recipe_default(value: object) -> str:
    if value is None or value in ((), {}):
        return "none"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def helps() -> str:
    import click

    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "terminal_width": 100}
    context = click.Context(verbs, info_name="loratools", **settings)
    parts = []
    for name in verbs.list_commands(context):
        command = verbs.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context, **settings)
        parts.append(f"## loratools {name}\n\n```text\n{command.get_help(inner)}\n```")
    return "\n\n".join(parts)


def api() -> str:
    """Every public name with its signature and its docstring: functions, the classes people use, reports, the rest."""
    import loratools

    values = {name: getattr(loratools, name) for name in loratools.__all__ if name != "__version__"}
    functions = [n for n, v in values.items() if inspect.isfunction(v)]
    classes = [n for n, v in values.items() if isinstance(v, type)]
    errors = [n for n in classes if issubclass(values[n], Exception)]
    main = [n for n in ("Adapter", "AdaptedModule", "Checkpoint", "LazyTensor", "Base", "LoRA") if n in classes]
    reports = [n for n in classes if n.endswith("Report")]
    fields = [n for n in classes if n not in (*errors, *main, *reports)]
    groups = {"Functions": functions, "Classes": main, "Reports": reports, "Parts of reports and classes": fields}
    parts = []
    for title, names in groups.items():
        parts.append(f"## {title}")
        parts += [_entry(name, values[name], 3) for name in names]
    parts.append("## Types of arguments")
    aliases = [n for n in values if n not in (*functions, *classes)]
    parts += [f"### {name}\n\n`{_type_text(values[name])}`" for name in aliases]
    parts.append("## Errors")
    for name in errors:
        about = _markdown(inspect.getdoc(values[name]) or "")
        parts.append(f"### {name}\n\n{about}\n\nExit code {values[name].exit_code}, code `{values[name].code}`.")
    return "\n\n".join(parts)


def _entry(name: str, value: Any, level: int) -> str:
    # The fields of a class are in its docstring; a signature of 16 defaults tells nobody anything.
    parts = [f"{'#' * level} {name}"]
    if inspect.isfunction(value):
        parts.append(f"```python\n{name}({_parameters(value)})\n```")
    parts.append(_markdown(inspect.getdoc(value) or ""))
    if isinstance(value, type):
        for inner, member in vars(value).items():
            function = getattr(member, "__func__", member)
            if inner.startswith("_"):
                continue
            if inspect.isfunction(function) and inspect.getdoc(function):
                parts.append(_entry(f"{name}.{inner}", function, level + 1))
            elif isinstance(member, property) and inspect.getdoc(member):
                parts.append(f"`{name}.{inner}`: {_one_paragraph(inspect.getdoc(member) or '')}")
    return "\n\n".join(part for part in parts if part)


def _parameters(function: Any) -> str:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    if not parameters:
        return ""
    texts, starred = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            texts.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        # Annotations are kept as texts, which are printed with quotation marks.
        texts.append(re.sub(r"^(\*?\w+): '(.*?)'(?= = |$)", r"\1: \2", str(p)))
    return "\n" + "".join(f"    {text},\n" for text in texts)


def _markdown(doc: str) -> str:
    """A docstring in Google's form: sections as bold words, entries as lists, the example as code."""
    lines: list[str] = []
    section = ""
    for line in doc.split("\n"):
        if match := re.fullmatch(r"(Args|Returns|Raises|Example|Attributes):", line):
            if section == "Example":
                lines.append("```")
            section = match[1]
            lines += [f"**{section}**", "", *(["```python"] if section == "Example" else [])]
        elif section == "Example" and line.startswith("    "):
            lines.append(line[4:])
        elif section in ("Args", "Raises", "Attributes") and (entry := re.fullmatch(r"    (\w+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section:
            lines.append(line.strip() if section == "Returns" else "  " + line.strip() if line.strip() else "")
        else:
            lines.append(line)
    if section == "Example":
        lines.append("```")
    return "\n".join(line.rstrip() for line in lines).strip()


def _one_paragraph(doc: str) -> str:
    return " ".join(doc.partition("\n\n")[0].split())


def _type_text(value: object) -> str:
    """The definition of an alias, as one would write it."""
    return re.sub(r"\b(?:typing|collections\.abc|pathlib(?:\._local)?|loratools(?:\.\w+)*)\.", "", str(value))


PARTS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "families": families,
    "layouts": layouts,
    "methods": methods,
    "kinds": kinds,
    "quantization": quantization,
    "rules": rules,
    "helps": helps,
    "recipe": recipe,
    "api": api,
}
SCHEMA = ROOT / "docs" / "recipe.schema.json"
FILES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("api.md", "cli.md", "recipes.md", "registries.md")))


def regenerated(text: str) -> str:
    """`text` with every part that it marks made anew."""

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{PARTS[match[1]]()}\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(PARTS)}) -->\n.*?<!-- end -->", fresh, text, flags=re.DOTALL)


def main() -> int:
    stale = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        if (new := regenerated(text)) != text:
            stale.append(file.name)
            if "--check" not in sys.argv:
                file.write_text(new, encoding="utf-8")
    schema = recipe_schema()
    if not SCHEMA.exists() or SCHEMA.read_text(encoding="utf-8") != schema:
        stale.append(SCHEMA.name)
        if "--check" not in sys.argv:
            SCHEMA.write_text(schema, encoding="utf-8")
    print("out of date: " + ", ".join(stale) if stale else "up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
