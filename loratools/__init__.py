"""loratools: inspect, merge, extract, combine and resize LoRA adapters, file to file, in the memory of one tensor.

Importing the package costs nothing: every public name is resolved on first use.
"""

from __future__ import annotations

# Read by type checkers as typing.TYPE_CHECKING; importing typing would be most of the cost of `import loratools`.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from loratools._version import __version__
    from loratools.adapted_module import AdaptedModule
    from loratools.adapter import Adapter, Replacement
    from loratools.arguments import Globs, Positive, Size
    from loratools.charts.values import BarGroup, Bars, Chart, HeatMap, Lines, Mark, Series
    from loratools.checkpoints import Checkpoint, Component, SideFile, WeightFile, open_checkpoint
    from loratools.checks import Needs, Severity
    from loratools.errors import (
        ChangedInputError,
        FormatError,
        InputError,
        LoraToolsError,
        MachineError,
        MismatchError,
        OutputExistsError,
        UndecidedError,
        UnknownModuleError,
        UnsupportedError,
        UsageError,
    )
    from loratools.formats import Base, RankFrom, load, save
    from loratools.formats.common.description import Description, TagCount
    from loratools.ops.check.report import CheckedSource, CheckFinding, CheckReport, NotChecked
    from loratools.ops.check.rules import RuleInfo, list_rules
    from loratools.ops.check.verb import check
    from loratools.ops.clean import CleanReport, RemovedRun, clean
    from loratools.ops.combine.recipe import Calibration, HeadsRule
    from loratools.ops.combine.report import CombineReport
    from loratools.ops.combine.shares import CombinedModule, ModuleShare, Share
    from loratools.ops.combine.side_by_side import MethodOutcome, MethodsReport, compare_methods
    from loratools.ops.combine.verb import combine
    from loratools.ops.common.arguments import AdapterArgument, AdapterSource
    from loratools.ops.compare.report import (
        ComparedAdapter,
        ComparedModule,
        ComparedPair,
        CompareReport,
        ComparisonMatrix,
    )
    from loratools.ops.compare.verb import compare
    from loratools.ops.convert.report import ConvertReport
    from loratools.ops.convert.verb import convert
    from loratools.ops.convert.verify import ConvertedModule
    from loratools.ops.extract.cost import Cost
    from loratools.ops.extract.report import ExtractedModule, ExtractReport, Replaced
    from loratools.ops.extract.settings import Embeddings
    from loratools.ops.extract.verb import extract
    from loratools.ops.inspect.entries import (
        AdapterEntry,
        CheckpointEntry,
        FailedEntry,
        InspectedModule,
        InspectReport,
        NotListed,
        QuantisedEntry,
        TensorEntry,
        Values,
    )
    from loratools.ops.inspect.training_run import TrainingRun
    from loratools.ops.inspect.verb import inspect
    from loratools.ops.listing.rows import Duplicates, ListedAdapter, ListReport, OtherSource
    from loratools.ops.listing.verb import list_adapters
    from loratools.ops.lowrank.reduce import ReducedModule
    from loratools.ops.merge.into_model import merge_into
    from loratools.ops.merge.options import GgmlType
    from loratools.ops.merge.plan import MergePlan
    from loratools.ops.merge.report import MergedTensor, MergeReport, RequantizedTensor
    from loratools.ops.merge.rounding import RoundingMode
    from loratools.ops.merge.verb import merge
    from loratools.ops.registries import (
        FormatInfo,
        LayoutInfo,
        MethodInfo,
        MethodOption,
        list_formats,
        list_layouts,
        list_methods,
    )
    from loratools.ops.resize.report import ResizeReport
    from loratools.ops.resize.verb import resize
    from loratools.ops.spectrum.report import ModuleSpectrum, RankRow, SpectrumReport
    from loratools.ops.spectrum.verb import spectrum
    from loratools.ops.verify.files import CheckedFile, FilesReport, verify_files
    from loratools.ops.verify.report import Finding, VerifiedTensor, VerifyReport
    from loratools.ops.verify.verb import verify
    from loratools.pages.parts.writing import write_page
    from loratools.quantization import Quantisation
    from loratools.skipped import Skipped
    from loratools.storage.gguf_reader import GgufHeader
    from loratools.tensors.files import ByteRange, FileId
    from loratools.tensors.lazy import LazyTensor, Source
    from loratools.updates.lora import LoRA
    from loratools.updates.lora_experts import Orientation, Packing
    from loratools.updates.parts.protocol import Delta, Update

# Public name -> the module that has it. No key may be the name of a submodule of loratools: importing the submodule
# would rebind the attribute to the module.
_HOMES = {
    "AdaptedModule": "adapted_module",
    "Adapter": "adapter",
    "AdapterArgument": "ops.common.arguments",
    "AdapterEntry": "ops.inspect.entries",
    "AdapterSource": "ops.common.arguments",
    "BarGroup": "charts.values",
    "Bars": "charts.values",
    "Base": "formats",
    "ByteRange": "tensors.files",
    "Calibration": "ops.combine.recipe",
    "ChangedInputError": "errors",
    "Chart": "charts.values",
    "CheckFinding": "ops.check.report",
    "CheckReport": "ops.check.report",
    "CheckedFile": "ops.verify.files",
    "CheckedSource": "ops.check.report",
    "Checkpoint": "checkpoints",
    "CheckpointEntry": "ops.inspect.entries",
    "CleanReport": "ops.clean",
    "CombineReport": "ops.combine.report",
    "CombinedModule": "ops.combine.shares",
    "CompareReport": "ops.compare.report",
    "ComparedAdapter": "ops.compare.report",
    "ComparedModule": "ops.compare.report",
    "ComparedPair": "ops.compare.report",
    "ComparisonMatrix": "ops.compare.report",
    "Component": "checkpoints",
    "ConvertReport": "ops.convert.report",
    "ConvertedModule": "ops.convert.verify",
    "Cost": "ops.extract.cost",
    "Delta": "updates.parts.protocol",
    "Description": "formats.common.description",
    "Duplicates": "ops.listing.rows",
    "Embeddings": "ops.extract.settings",
    "ExtractReport": "ops.extract.report",
    "ExtractedModule": "ops.extract.report",
    "FailedEntry": "ops.inspect.entries",
    "FileId": "tensors.files",
    "FilesReport": "ops.verify.files",
    "Finding": "ops.verify.report",
    "FormatError": "errors",
    "FormatInfo": "ops.registries",
    "GgmlType": "ops.merge.options",
    "GgufHeader": "storage.gguf_reader",
    "Globs": "arguments",
    "HeadsRule": "ops.combine.recipe",
    "HeatMap": "charts.values",
    "InputError": "errors",
    "InspectReport": "ops.inspect.entries",
    "InspectedModule": "ops.inspect.entries",
    "LayoutInfo": "ops.registries",
    "LazyTensor": "tensors.lazy",
    "Lines": "charts.values",
    "ListReport": "ops.listing.rows",
    "ListedAdapter": "ops.listing.rows",
    "LoRA": "updates.lora",
    "LoraToolsError": "errors",
    "MachineError": "errors",
    "Mark": "charts.values",
    "MergePlan": "ops.merge.plan",
    "MergeReport": "ops.merge.report",
    "MergedTensor": "ops.merge.report",
    "MethodInfo": "ops.registries",
    "MethodOption": "ops.registries",
    "MethodOutcome": "ops.combine.side_by_side",
    "MethodsReport": "ops.combine.side_by_side",
    "MismatchError": "errors",
    "ModuleShare": "ops.combine.shares",
    "ModuleSpectrum": "ops.spectrum.report",
    "Needs": "checks",
    "NotChecked": "ops.check.report",
    "NotListed": "ops.inspect.entries",
    "Orientation": "updates.lora_experts",
    "OtherSource": "ops.listing.rows",
    "OutputExistsError": "errors",
    "Packing": "updates.lora_experts",
    "Positive": "arguments",
    "Quantisation": "quantization",
    "QuantisedEntry": "ops.inspect.entries",
    "RankFrom": "formats",
    "RankRow": "ops.spectrum.report",
    "ReducedModule": "ops.lowrank.reduce",
    "RemovedRun": "ops.clean",
    "Replaced": "ops.extract.report",
    "Replacement": "adapter",
    "RequantizedTensor": "ops.merge.report",
    "ResizeReport": "ops.resize.report",
    "RoundingMode": "ops.merge.rounding",
    "RuleInfo": "ops.check.rules",
    "Series": "charts.values",
    "Severity": "checks",
    "Share": "ops.combine.shares",
    "SideFile": "checkpoints",
    "Size": "arguments",
    "Skipped": "skipped",
    "Source": "tensors.lazy",
    "SpectrumReport": "ops.spectrum.report",
    "TagCount": "formats.common.description",
    "TensorEntry": "ops.inspect.entries",
    "TrainingRun": "ops.inspect.training_run",
    "UndecidedError": "errors",
    "UnknownModuleError": "errors",
    "UnsupportedError": "errors",
    "Update": "updates.parts.protocol",
    "UsageError": "errors",
    "Values": "ops.inspect.entries",
    "VerifiedTensor": "ops.verify.report",
    "VerifyReport": "ops.verify.report",
    "WeightFile": "checkpoints",
    "__version__": "_version",
    "check": "ops.check.verb",
    "clean": "ops.clean",
    "combine": "ops.combine.verb",
    "compare": "ops.compare.verb",
    "compare_methods": "ops.combine.side_by_side",
    "convert": "ops.convert.verb",
    "extract": "ops.extract.verb",
    "inspect": "ops.inspect.verb",
    "list_adapters": "ops.listing.verb",
    "list_formats": "ops.registries",
    "list_layouts": "ops.registries",
    "list_methods": "ops.registries",
    "list_rules": "ops.check.rules",
    "load": "formats",
    "merge": "ops.merge.verb",
    "merge_into": "ops.merge.into_model",
    "open_checkpoint": "checkpoints",
    "resize": "ops.resize.verb",
    "save": "formats",
    "spectrum": "ops.spectrum.verb",
    "verify": "ops.verify.verb",
    "verify_files": "ops.verify.files",
    "write_page": "pages.parts.writing",
}

__all__ = [
    "AdaptedModule",
    "Adapter",
    "AdapterArgument",
    "AdapterEntry",
    "AdapterSource",
    "BarGroup",
    "Bars",
    "Base",
    "ByteRange",
    "Calibration",
    "ChangedInputError",
    "Chart",
    "CheckFinding",
    "CheckReport",
    "CheckedFile",
    "CheckedSource",
    "Checkpoint",
    "CheckpointEntry",
    "CleanReport",
    "CombineReport",
    "CombinedModule",
    "CompareReport",
    "ComparedAdapter",
    "ComparedModule",
    "ComparedPair",
    "ComparisonMatrix",
    "Component",
    "ConvertReport",
    "ConvertedModule",
    "Cost",
    "Delta",
    "Description",
    "Duplicates",
    "Embeddings",
    "ExtractReport",
    "ExtractedModule",
    "FailedEntry",
    "FileId",
    "FilesReport",
    "Finding",
    "FormatError",
    "FormatInfo",
    "GgmlType",
    "GgufHeader",
    "Globs",
    "HeadsRule",
    "HeatMap",
    "InputError",
    "InspectReport",
    "InspectedModule",
    "LayoutInfo",
    "LazyTensor",
    "Lines",
    "ListReport",
    "ListedAdapter",
    "LoRA",
    "LoraToolsError",
    "MachineError",
    "Mark",
    "MergePlan",
    "MergeReport",
    "MergedTensor",
    "MethodInfo",
    "MethodOption",
    "MethodOutcome",
    "MethodsReport",
    "MismatchError",
    "ModuleShare",
    "ModuleSpectrum",
    "Needs",
    "NotChecked",
    "NotListed",
    "Orientation",
    "OtherSource",
    "OutputExistsError",
    "Packing",
    "Positive",
    "Quantisation",
    "QuantisedEntry",
    "RankFrom",
    "RankRow",
    "ReducedModule",
    "RemovedRun",
    "Replaced",
    "Replacement",
    "RequantizedTensor",
    "ResizeReport",
    "RoundingMode",
    "RuleInfo",
    "Series",
    "Severity",
    "Share",
    "SideFile",
    "Size",
    "Skipped",
    "Source",
    "SpectrumReport",
    "TagCount",
    "TensorEntry",
    "TrainingRun",
    "UndecidedError",
    "UnknownModuleError",
    "UnsupportedError",
    "Update",
    "UsageError",
    "Values",
    "VerifiedTensor",
    "VerifyReport",
    "WeightFile",
    "__version__",
    "check",
    "clean",
    "combine",
    "compare",
    "compare_methods",
    "convert",
    "extract",
    "inspect",
    "list_adapters",
    "list_formats",
    "list_layouts",
    "list_methods",
    "list_rules",
    "load",
    "merge",
    "merge_into",
    "open_checkpoint",
    "resize",
    "save",
    "spectrum",
    "verify",
    "verify_files",
    "write_page",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'loratools' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f"loratools.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
