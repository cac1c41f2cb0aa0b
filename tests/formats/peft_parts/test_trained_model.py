"""What PEFT's config says of the model that was trained: typed fields of the adapter, written back from these."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import factories
import pytest

from loratools import formats
from loratools.errors import FormatError

PACKAGE = Path(__file__).parents[3] / "loratools"
CONFIG: dict[str, object] = {
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2], [1, 3]],
    "task_type": "SEQ_CLS",
    "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers.models.bert", "mark": 1},
}


def written(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_fields_of_the_config_are_typed_fields_of_the_adapter(tmp_path: Path) -> None:
    adapter = formats.load(factories.adapter_folder(tmp_path / "a", config=CONFIG))

    assert adapter.fan_in_fan_out is True
    assert adapter.layer_replication == ((0, 2), (1, 3))
    assert adapter.task_type == "SEQ_CLS"
    assert adapter.base_class == "transformers.models.bert.BertModel"


def test_what_was_read_is_written_back_and_what_was_changed_is_written_changed(tmp_path: Path) -> None:
    adapter = formats.load(factories.adapter_folder(tmp_path / "a", config=CONFIG))

    formats.save(adapter, tmp_path / "same")
    config = written(tmp_path / "same")
    assert {name: config[name] for name in CONFIG} == CONFIG

    other = replace(adapter, fan_in_fan_out=False, layer_replication=(), task_type=None, base_class="mine.Gemma")
    formats.save(other, tmp_path / "other")
    config = written(tmp_path / "other")
    assert config["fan_in_fan_out"] is False
    assert not config["layer_replication"]
    assert config["task_type"] is None
    assert config["auto_mapping"] == {"base_model_class": "Gemma", "parent_library": "mine", "mark": 1}


@pytest.mark.parametrize(
    "field",
    [
        {"fan_in_fan_out": None},
        {"fan_in_fan_out": "yes"},
        {"task_type": 3},
        {"auto_mapping": ["BertModel"]},
        {"auto_mapping": {"base_model_class": 1}},
        {"layer_replication": None},
        {"layer_replication": []},
    ],
    ids=str,
)
def test_a_field_that_says_nothing_is_none(tmp_path: Path, field: dict[str, object]) -> None:
    adapter = formats.load(factories.adapter_folder(tmp_path / "a", config={"task_type": None} | field))

    assert (adapter.fan_in_fan_out or None, adapter.task_type, adapter.base_class) == (None, None, None)
    assert adapter.layer_replication == ()


@pytest.mark.parametrize(
    "ranges", [[[2, 2]], [[0]], [0, 2], "0-2", [[0, True]], [[-1, 2]], [[0.0, 2.0]], {"0": 2}], ids=str
)
def test_ranges_of_layers_that_name_none_are_refused(tmp_path: Path, ranges: object) -> None:
    with pytest.raises(FormatError, match="which names no layers") as raised:
        formats.load(factories.adapter_folder(tmp_path / "a", config={"layer_replication": ranges}))

    assert raised.value.hint is not None


def looks_into_notes(tree: ast.AST) -> list[str]:
    """Every place that takes something out of the notes of an adapter: an entry, or its items."""
    reads = []
    for node in ast.walk(tree):
        inside = node.value if isinstance(node, ast.Subscript | ast.Attribute) else None
        if isinstance(inside, ast.Attribute) and inside.attr == "notes":
            reads.append(ast.unparse(node))
    return reads


def test_the_search_for_readers_of_notes_notices_each_spelling() -> None:
    calls = 'adapter.notes["peft"]; a.notes.get("peft"); source.notes.items(); replace(a, notes={}); f(a.notes)'
    assert looks_into_notes(ast.parse(calls)) == ["adapter.notes['peft']", "a.notes.get", "source.notes.items"]


def test_notes_are_interpreted_in_formats_only() -> None:
    # The size of a file counts the length of what was said, and not what it says.
    counting = {"ops/resize/budget.py": ["adapter.notes.values"]}
    found = {
        path.relative_to(PACKAGE).as_posix(): reads
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "formats"
        and (reads := looks_into_notes(ast.parse(path.read_text("utf-8"))))
    }
    assert found == counting
