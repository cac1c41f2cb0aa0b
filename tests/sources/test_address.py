"""What is an address on the hub, and what is a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import UsageError
from loratools.sources.address import HubAddress, bare_repository, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://acme/lora", HubAddress("acme/lora")),
        ("hf://acme/lora/", HubAddress("acme/lora")),
        ("hf://acme/lora@v1.0", HubAddress("acme/lora", "v1.0")),
        ("hf://acme/lora@refs%2Fpr%2F3", HubAddress("acme/lora", "refs/pr/3")),
        ("hf://acme/lora/checkpoint-20", HubAddress("acme/lora", "main", "checkpoint-20")),
        ("hf://acme/lora@v1/a/b.safetensors", HubAddress("acme/lora", "v1", "a/b.safetensors")),
    ],
)
def test_address_has_a_repository_a_revision_and_a_place_inside(text: str, address: HubAddress) -> None:
    assert parse_address(text) == address
    # As a path it has one slash less.
    assert parse_address(Path(text).as_posix()) == address


@pytest.mark.parametrize("text", ["hf://acme", "hf://acme/lora/../x", "hf://acme/lora//x", "hf://-x/y", "hf://a b/c"])
def test_what_no_repository_can_be_called_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no repository of the hub") as raised:
        parse_address(text)

    assert raised.value.hint is not None


@pytest.mark.parametrize("text", ["adapter", "./a/b", "C:/models/x", "a:b", "file://x/y", "/hf/x"])
def test_a_path_is_no_address(text: str) -> None:
    assert parse_address(text) is None


@pytest.mark.parametrize("text", ["s3://bucket/x", "gs://bucket/x", "az://box/x", "https://host/x", "HTTP://host/x"])
def test_addresses_of_other_places_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="which is not read") as raised:
        parse_address(text)

    assert raised.value.exit_code == 2


def test_a_refused_address_is_shown_without_password_and_signature() -> None:
    with pytest.raises(UsageError) as raised:
        parse_address("https://someone:secret@host/x?signature=abcdef")

    assert "'https://host/x'" in raised.value.message
    assert "secret" not in str(raised.value)
    assert "abcdef" not in str(raised.value)


@pytest.mark.parametrize("text", ["acme/lora", "acme/Lora-3.2_x"])
def test_owner_and_name_may_be_a_repository(text: str) -> None:
    assert bare_repository(text) == HubAddress(text)


@pytest.mark.parametrize("text", ["acme", "./acme/lora", "../acme/lora", "a/b/c", "acme/x.safetensors", "acme/x.GGUF"])
def test_what_has_another_form_is_no_bare_repository(text: str) -> None:
    assert bare_repository(text) is None
