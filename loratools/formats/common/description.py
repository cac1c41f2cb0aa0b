"""What trainers of image models write about an adapter into the header of its file, as common fields.

Keys are those of sd-scripts and compatible trainers (`ss_...`), of the Stability AI Model Metadata Standard 1.0.1
(`modelspec....`), and of ai-toolkit (`training_info`). Invalid values are ignored: headers are untrusted text, and
reading the tensors needs none of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import NamedTuple

from loratools.errors import FormatError

# The oldest and the newest training time that are plausible.
_EARLIEST, _LATEST = 1.5e9, 4.1e9
# Names of folders with pictures: the number of repeats, and the concept.
_REPEATED_FOLDER = re.compile(r"\d+_(.+)", re.DOTALL)
_RESOLUTION = re.compile(r"[(\[]?\s*(\d{2,5})\s*[,xX×]\s*(\d{2,5})\s*[)\]]?")
_HASH = re.compile(r"(?:0x)?([0-9a-fA-F]{12})[0-9a-fA-F]*")


class TagCount(NamedTuple):
    """A tag of the training pictures, with its count.

    Attributes:
        tag: The tag.
        pictures: How many pictures have it.
    """

    tag: str
    pictures: int


class Description(NamedTuple):
    """Facts about an image adapter from the header of its file.

    Attributes:
        title: Its title.
        trigger_words: Its trigger words: those in the header, otherwise the names of the folders with pictures, from
            which trainers take them.
        tags: Tags of the training pictures with their counts, the commonest first.
        resolution: Width and height of the training pictures, such as 1024x1024.
        epochs: How many epochs the training took.
        steps: How many steps the training took.
        date: The creation date, such as 2024-07-31.
        author: The author.
        license: The licence.
        notes: The author's description.
        hashes: The hashes in the header, by name; `autov3` covers the tensors only.
    """

    title: str | None = None
    trigger_words: tuple[str, ...] = ()
    tags: tuple[TagCount, ...] = ()
    resolution: str | None = None
    epochs: int | None = None
    steps: int | None = None
    date: str | None = None
    author: str | None = None
    license: str | None = None
    notes: str | None = None
    hashes: Mapping[str, str] = {}

    def to_dict(self) -> dict[str, object]:
        """Return the fields of an entry of `loratools inspect --json`, without those that are unknown."""
        fields: dict[str, object] = {**self._asdict(), "trigger_words": list(self.trigger_words)}
        fields["tags"] = [{"tag": tag, "count": pictures} for tag, pictures in self.tags]
        fields["hashes"] = dict(self.hashes)
        return {name: value for name, value in fields.items() if value not in (None, [], {})}


def describe(metadata: Mapping[str, str]) -> Description | None:
    """Return what the metadata of a file says about its adapter; None if it says nothing.

    Example:
        >>> describe({"modelspec.title": "Ink", "ss_steps": "1800", "ss_resolution": "(768, 1024)"}).resolution
        '768x1024'
    """
    description = Description(
        title=_text(metadata, "modelspec.title", "ss_output_name", "name"),
        trigger_words=_trigger_words(metadata),
        tags=_tags(metadata),
        resolution=_resolution(metadata),
        epochs=_number(metadata, "ss_epoch", "ss_num_epochs") or _of_training_info(metadata, "epoch"),
        steps=_number(metadata, "ss_steps", "ss_max_train_steps") or _of_training_info(metadata, "step"),
        date=_date(metadata),
        author=_text(metadata, "modelspec.author"),
        license=_text(metadata, "modelspec.license"),
        notes=_text(metadata, "modelspec.description", "ss_training_comment", "modelspec.usage_hint"),
        hashes=_hashes(metadata),
    )
    return description if description.to_dict() else None


def _text(metadata: Mapping[str, str], *keys: str) -> str | None:
    """The first nonempty text; sd-scripts writes `None` for a missing value."""
    texts = (metadata.get(key, "").strip() for key in keys)
    return next((text for text in texts if text and text != "None"), None)


def _number(metadata: Mapping[str, str], *keys: str) -> int | None:
    texts = (metadata.get(key, "") for key in keys)
    return next((int(text) for text in texts if text.isascii() and text.isdigit() and len(text) < 12), None)


def _json(metadata: Mapping[str, str], key: str) -> Mapping[str, object]:
    """The object that a JSON text encodes; empty if it encodes something else."""
    from loratools.storage.json_file import parse_json

    try:
        value = parse_json(metadata.get(key, "{}").encode(), key, infinities=True)
    except (FormatError, UnicodeEncodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _of_training_info(metadata: Mapping[str, str], key: str) -> int | None:
    value = _json(metadata, "training_info").get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    phrase = _text(metadata, "modelspec.trigger_phrase")
    if phrase is not None:
        words = [word.strip() for word in phrase.split(",")]
    else:
        folders = [*_json(metadata, "ss_dataset_dirs"), *_json(metadata, "ss_tag_frequency")]
        words = [m.group(1).strip() for folder in folders if (m := _REPEATED_FOLDER.fullmatch(folder))]
    return tuple(dict.fromkeys(word for word in words if word))


def _tags(metadata: Mapping[str, str]) -> tuple[TagCount, ...]:
    counts: Counter[str] = Counter()
    for of_folder in _json(metadata, "ss_tag_frequency").values():
        if isinstance(of_folder, dict):
            for tag, count in of_folder.items():
                if isinstance(count, int) and tag.strip():
                    counts[tag.strip()] += count
    return tuple(TagCount(tag, count) for tag, count in counts.most_common())


def _resolution(metadata: Mapping[str, str]) -> str | None:
    text = _text(metadata, "ss_resolution", "modelspec.resolution")
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) < 6:
        return f"{text}x{text}"
    match = _RESOLUTION.fullmatch(text)
    return f"{match.group(1)}x{match.group(2)}" if match else None


def _date(metadata: Mapping[str, str]) -> str | None:
    for key in ("ss_training_finished_at", "ss_training_started_at"):
        try:
            seconds = float(metadata.get(key, ""))
        except ValueError:
            continue
        if _EARLIEST < seconds < _LATEST:
            return datetime.fromtimestamp(seconds, timezone.utc).date().isoformat()
    text = _text(metadata, "modelspec.date")
    return text[:10] if text is not None and re.fullmatch(r"\d{4}-\d\d-\d\d", text[:10]) else None


def _hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Both trainers and the standard store the SHA-256 of everything after the header; AutoV3 is its beginning."""
    for key in ("sshs_model_hash", "modelspec.hash_sha256"):
        if match := _HASH.fullmatch(metadata.get(key, "").strip()):
            return {"autov3": match.group(1).lower()}
    return {}
