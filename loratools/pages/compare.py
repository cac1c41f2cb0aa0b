"""How alike adapters are: two of them module by module, or every pair of several."""

from __future__ import annotations

from loratools.ops.compare.report import CompareReport, ComparisonMatrix
from loratools.pages.parts.contents import Contents, table, tables, warnings
from loratools.report.comparison import MODULE_FIELDS, PAIR_FIELDS, comparison_facts
from loratools.report.fields import Field, integer, text_field
from loratools.report.text import plural

_ONLY = (text_field("name", "module"), text_field("adapter"))
_PAIRS = (text_field("first"), text_field("second"), *PAIR_FIELDS)
_ADAPTERS = (
    text_field("path", "adapter"),
    Field("step", "step", integer),
    Field("cluster", "group", integer),
    Field("modules", "modules", integer),
    Field("norm", "norm"),
)


def contents(report: CompareReport | ComparisonMatrix) -> Contents:
    """Return what the page of a comparison shows."""
    return _of_several(report) if isinstance(report, ComparisonMatrix) else _of_two(report)


def _of_two(report: CompareReport) -> Contents:
    first, second = report.paths
    only = [{"name": name, "adapter": first} for name in report.only_in_first]
    only += [{"name": name, "adapter": second} for name in report.only_in_second]
    return Contents(
        title=f"Comparison of {first} and {second}",
        facts=tuple(comparison_facts(report)),
        remarks=warnings(report.warnings),
        tables=tables(
            table("Modules of both", MODULE_FIELDS, report.rows()),
            table("Modules of one alone", _ONLY, only),
        ),
    )


def _of_several(report: ComparisonMatrix) -> Contents:
    cluster_of = {position: i + 1 for i, cluster in enumerate(report.clusters) for position in cluster}
    adapters = [{**vars(report.adapters[i]), "cluster": cluster_of.get(i)} for i in report.order]
    alike = [cluster for cluster in report.clusters if len(cluster) > 1]
    return Contents(
        title=f"Comparison of {plural(len(report.adapters), 'adapter')}",
        facts=(("alike", f"{plural(len(alike), 'group')} with a mean cosine of at least 0.5"),),
        remarks=warnings(report.warnings),
        tables=tables(
            table("Adapters", _ADAPTERS, adapters),
            table("Pairs", _PAIRS, report.rows()),
        ),
    )
