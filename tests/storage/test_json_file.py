"""Strict JSON: what two parsers could read in two ways is refused, and the file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.errors import FormatError, UsageError
from loratools.storage.json_file import read_json, write_json


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "a list; an object is needed"),
        (b'"x"', "a text; an object is needed"),
        (b"{", "not JSON"),
        (b'{"r": 8, "r": 16}', "the key 'r' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        (b'{"a":1,"a" :2}', "the key 'a' twice"),
        (b'{"a":5,"a":{"b":1}}', "the key 'a' twice"),
        (b'{"a":{"b":1},"a":5}', "the key 'a' twice"),
        (b'{"ab":1,"a\\u0062":2}', "the key 'ab' twice"),
        # A text that holds a quote before a colon, and a key whose colon stands apart: one too many, one too few.
        (b'{"t":"\\":","a" :1,"a":2}', "the key 'a' twice"),
        (b'{"t":"\\":","a"\t:1,"b":[{"c":1,"c":2}]}', "the key 'c' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"\xff\xfe{\0}\0", "not UTF-8 at byte 0"),
        (b'{"a": "\xe9"}', "not UTF-8"),
    ],
)
def test_bad_json_is_refused_by_name(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(data)

    with pytest.raises(FormatError) as caught:
        read_json(tmp_path / "adapter_config.json")
    assert f"'{tmp_path / 'adapter_config.json'}'" in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize(
    "text", ['{"t":"\\":","a":1}', '{"a" :1,"b":[{"c"\n:1},{"c":{}}]}', '{"a":"b\\":\\":","c":[[],[{"d":-0}]]}', "{}"]
)
def test_keys_are_counted_whatever_texts_and_white_space_hold(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")

    assert read_json(tmp_path / "a.json") == json.loads(text)


def test_sound_json_reads_as_python_reads_it(tmp_path: Path) -> None:
    text = '{"r": 8, "alpha": 16.5, "big": 12345678901234567890, "none": null, "list": [1, {"ä": true}], "e": -1e-3}'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    (tmp_path / "bom.json").write_text(text, encoding="utf-8-sig")

    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "bom.json") == json.loads(text)


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte: reading it would not end

    with pytest.raises(FormatError, match="at most 1,000,000"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UsageError):
        read_json(tmp_path / "missing.json")


def test_written_json_is_this_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("a longer text than the one that replaces it, by far")

    write_json(tmp_path / "a.json", {"b": 1, "a": ["ü", None]})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "b": 1,\n  "a": [\n    "\\u00fc",\n    null\n  ]\n}\n'
    write_json(tmp_path / "a.json", {"b": 1, "a": 2}, sort=True)
    assert list(read_json(tmp_path / "a.json")) == ["a", "b"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"a": float("nan")})
    assert not (tmp_path / "b.json").exists()
