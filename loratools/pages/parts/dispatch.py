"""Which file of the registry shows which report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratools import registry
from loratools.adapter import Adapter
from loratools.charts import charts_of
from loratools.errors import UsageError
from loratools.ops.inspect.entries import AdapterEntry, InspectReport
from loratools.pages.parts.contents import Contents

# By the name of the class, so that no report's module is imported for the sake of another.
PAGES: Mapping[str, str] = {
    "AdapterEntry": "inspect",
    "CheckReport": "check",
    "CheckpointEntry": "inspect",
    "CombineReport": "combine",
    "CompareReport": "compare",
    "ComparisonMatrix": "compare",
    "ConvertReport": "convert",
    "ExtractReport": "extract",
    "FailedEntry": "inspect",
    "FilesReport": "verify",
    "InspectReport": "inspect",
    "ListReport": "list",
    "MergePlan": "merge",
    "MergeReport": "merge",
    "MethodsReport": "methods",
    "ResizeReport": "resize",
    "SpectrumReport": "spectrum",
    "VerifyReport": "verify",
}


def contents_of(report: object) -> Contents:
    """Return what the page of a report, or of an adapter, shows.

    Raises:
        UsageError: It is no report.
    """
    if isinstance(report, Adapter):
        from loratools.ops.inspect.verb import inspect

        return contents_of(inspect(report))
    if isinstance(report, AdapterEntry):
        return contents_of(InspectReport((report,)))
    name = PAGES.get(type(report).__name__)
    if name is None:
        raise UsageError(
            f"a {type(report).__name__} has no page", hint="give a report, as inspect, merge and other verbs return it"
        )
    shown: Contents = registry.load("pages", name).contents(report)
    return replace(shown, charts=charts_of(report))
