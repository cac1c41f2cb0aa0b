import json

import pytest

from loratools.ops.merge.index_text import index_text


@pytest.mark.parametrize("metadata", [{}, {"total_size": 12, "note": {"é": ["字"]}}])
@pytest.mark.parametrize("weight_map", [{}, {"a": "1.safetensors", 'quo"te': "é.safetensors", "字": "1.safetensors"}])
def test_index_is_what_json_writes_with_an_indent_of_two(
    metadata: dict[str, object], weight_map: dict[str, str]
) -> None:
    document = {"metadata": metadata, "weight_map": weight_map}

    assert index_text(metadata, weight_map) == json.dumps(document, indent=2) + "\n"
