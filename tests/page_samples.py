"""Reports of every kind, and names that a page must only show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loratools
from loratools.ops.listing.rows import ListedAdapter, ListReport

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE = FIXTURES / "llama-tiny"
SCIENCE = FIXTURES / "llama-tiny-science"
DIALOGUE = FIXTURES / "llama-tiny-dialogue"
SHAKESPEARE = FIXTURES / "llama-tiny-shakespeare"

# What runs in a browser that takes it for HTML, what closes tags and attributes, and what turns the text around.
HOSTILE = (
    "<img src=x onerror=\"document.title='ran'\">",
    "\"><script>document.title='ran'</script>",
    "'onmouseover='document.title=1",
    "</td></tr></table></main><h1>gone</h1>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "\u202egpj.exe\u202c",
    "שלום/نموذج",
    "null\x00byte\x1b[31m",
    "&lt;b&gt; &amp; http://192.0.2.1/pixel.png",
)


def hostile_list(rows: int = 0) -> ListReport:
    """A list of adapters with hostile names, titles and errors, and so many others; sizes are all different."""
    hostile = [
        ListedAdapter(
            path=f"folder/{name}", title=name, trigger_words=(name, name), rank=2 + i, bytes=1000 * (i + 1), error=name
        )
        for i, name in enumerate(HOSTILE)
    ]
    others = [ListedAdapter(path=f"folder/adapter-{i}", rank=i % 128 + 1, bytes=7 * i + 3) for i in range(rows)]
    return ListReport(adapters=(*hostile, *others))


def merged(folder: Path) -> Path:
    loratools.merge(BASE, [SCIENCE], folder / "merged")
    return folder / "merged"


def computed(report: Callable[[Path], object]) -> Callable[[Path], object]:
    """The report of a verb that computes with torch; where there is none, the test that wants it is skipped."""

    def made_with_torch(folder: Path) -> object:
        import torch  # noqa: F401

        return report(folder)

    return made_with_torch


REPORTS: dict[str, Callable[[Path], object]] = {
    "InspectReport": computed(lambda _: loratools.inspect(SCIENCE, BASE, values=True)),
    "AdapterEntry": lambda _: loratools.inspect(SCIENCE).sources[0],
    "CheckpointEntry": lambda _: loratools.inspect(BASE).sources[0],
    "Adapter": lambda _: loratools.load(SCIENCE),
    "ListReport": lambda _: loratools.list_adapters(FIXTURES / "llama-tiny-science", cache=False),
    "SpectrumReport": computed(lambda _: loratools.spectrum(SCIENCE)),
    "CompareReport": computed(lambda _: loratools.compare(SCIENCE, DIALOGUE)),
    "ComparisonMatrix": computed(lambda _: loratools.compare(SCIENCE, DIALOGUE, SHAKESPEARE)),
    "CombineReport": computed(lambda _: loratools.combine([SCIENCE, DIALOGUE], plan=True)),
    "MethodsReport": computed(lambda _: loratools.compare_methods([SCIENCE, DIALOGUE], ["linear", "dare"])),
    "ResizeReport": computed(lambda folder: loratools.resize(SCIENCE, folder / "resized", rank=4)),
    "ConvertReport": computed(lambda folder: loratools.convert(SCIENCE, folder / "converted", format="mlx")),
    "ExtractReport": computed(
        lambda folder: loratools.extract(
            FIXTURES / "bert-tiny", FIXTURES / "bert-tiny-tuned", folder / "extracted", rank=4
        )
    ),
    "MergeReport": lambda folder: loratools.merge(BASE, [SCIENCE], folder / "merged"),
    "MergePlan": lambda folder: loratools.merge(BASE, [SCIENCE], folder / "out", plan=True).plan,
    "VerifyReport": lambda folder: loratools.verify(merged(folder), BASE, [SCIENCE]),
    "FilesReport": lambda folder: loratools.verify_files(merged(folder)),
    "CheckReport": computed(lambda _: loratools.check(FIXTURES / "bert-tiny-sentiment")),
}
