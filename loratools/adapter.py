"""Adapter: the content of one adapter file or folder, in whatever format it is stored.

    updates        target -> update          `model.layers.0.self_attn.q_proj` -> LoRA(A, B, alpha)
    replacements   weight -> whole tensor    `classifier.weight` -> the trained head

A target is the adapter's own name for a module, without the prefix of its container. A replacement is named like the
weight that it replaces. `matching` finds out what they mean in a base.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from loratools import registry
from loratools.errors import (
    LoraToolsError,
    MismatchError,
    UndecidedError,
    UnknownModuleError,
    UnsupportedError,
    UsageError,
)
from loratools.notebook_html import notebook_html
from loratools.selection import select_names
from loratools.short_repr import clipped, counted, one_line
from loratools.storage.origins import shown
from loratools.tensors.lazy import LazyTensor
from loratools.updates.parts.protocol import Update

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapted_module import AdaptedModule, Array
    from loratools.algebra.rounding import Floats

# With more names than this, near names are only searched among those with the same last part.
_MANY = 2000


@dataclass(frozen=True)
class Replacement:
    """A tensor that replaces a weight of the base, or some of its rows.

    Attributes:
        tensor: The new values, unread.
        declared: How the adapter declares it: modules_to_save, bias, embedding, tokens, norm (LN tuning); or
            `unlisted`, if only the key shows it.
        rows: The indices of the replaced rows; None if the whole weight is replaced.
    """

    tensor: LazyTensor
    declared: str
    rows: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return one_line(self)


@dataclass(frozen=True)
class Adapter:
    """An adapter: updates and replaced weights by the name of the module or weight that they belong to.

    It is immutable, and its values are not read. It is a mapping of modules: `adapter[name]` is one module with its
    factors as arrays, `len(adapter)` is the number of modules, and iteration gives their names.

    Attributes:
        updates: The stored update of each module, sorted by the module's name.
        replacements: Tensors that replace weights, sorted by the weight's name.
        format: The format that it was read from; empty if it was made in memory.
        path: The path that it was read from; None if it was made in memory.
        base_model: The base model that the adapter names; None if it names none.
        fan_in_fan_out: How the base stores square weights according to the source: (in, out) if True, (out, in) if
            False. None if the source does not state it, or if it does not matter for its kind.
        layer_replication: Ranges [start, stop) of layers of the base which, in this order, are the layers of the
            trained model. Empty if the trained model has the layers of the base.
        invocation_tokens: The tokens after which the adapter acts (aLoRA); before them the model equals its base. Empty
            if the adapter acts on every token.
        base_class: The Python class of the trained model, with its module if known, such as
            `transformers.models.bert.modeling_bert.BertModel`.
        task_type: The task of the trained model as PEFT spells it, such as `SEQ_CLS`.
        notes: Metadata of the source that only `formats/` interprets, kept to be written back: one mapping per format.
        uncertainties: What is uncertain about the scale or the row order of the updates. While there are any, functions
            that need the values refuse the adapter.
        initialisation_changed_base: The initialisation that changed the base (PiSSA, OLoRA, ...), if the initial
            factors have to be subtracted; else None.
        warnings: Warnings that do not change how the source is read.
        stored_names: Whether modules are named exactly as in the file, and not as in diffusers or transformers.
        undecided: Why the names of the file could not be translated; None if they were, or if no translation is needed.
        aliases: Further names by which a module can be selected.
        unread_tensors: Keys of tensors in its files that a glob excluded before they were read.
        read_companions: Other files of the adapter that were read with it.
        unread_companions: Files beside it that hold tensors of unknown meaning. Merging is refused while there are any.
        remedy: How to resolve the uncertainties.

    Example:
        >>> import loratools
        >>> adapter = loratools.load("fixtures/llama-tiny-science")
        >>> module = adapter["model.layers.0.self_attn.q_proj"]
        >>> module.a.shape[0] == module.b.shape[1] == module.rank
        True
        >>> [name for name in adapter if name.endswith("layers.0.mlp.down_proj")]
        ['model.layers.0.mlp.down_proj']
    """

    updates: Mapping[str, Update]
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    format: str = ""
    path: Path | None = None
    base_model: str | None = None
    fan_in_fan_out: bool | None = None
    layer_replication: tuple[tuple[int, int], ...] = ()
    invocation_tokens: tuple[int, ...] = ()
    base_class: str | None = None
    task_type: str | None = None
    notes: Mapping[str, object] = field(default_factory=dict)
    uncertainties: tuple[str, ...] = ()
    initialisation_changed_base: str | None = None
    warnings: tuple[str, ...] = ()
    stored_names: bool = False
    undecided: LoraToolsError | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread_tensors: tuple[str, ...] = ()
    read_companions: tuple[str, ...] = ()
    unread_companions: tuple[str, ...] = ()
    remedy: str = "say which rank the scale is to be taken from: --rank-from tensors, or --rank-from config"

    def __post_init__(self) -> None:
        # By names only, which is fast if they are sorted already.
        updates, replacements = self.updates, self.replacements
        object.__setattr__(self, "updates", {name: updates[name] for name in sorted(updates)})
        object.__setattr__(self, "replacements", {name: replacements[name] for name in sorted(replacements)})

    def __repr__(self) -> str:
        ranks = sorted({u.rank for u in self.updates.values() if u.rank is not None})
        facts = [self.format] if self.format else []
        facts += [counted(len(self.updates), "module")]
        if self.updates:
            kinds = sorted({u.kind for u in self.updates.values()})
            facts.append(clipped(" + ".join(kinds)))
        if ranks:
            facts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}")
        if self.replacements:
            facts.append(counted(len(self.replacements), "replaced weight"))
        return f"<Adapter {clipped(self.name)!r}: {', '.join(facts)}>"

    _repr_html_ = notebook_html

    @property
    def name(self) -> str:
        """The path of the adapter, or `adapter` where it was made in memory."""
        return shown(self.path) if self.path is not None else "adapter"

    # As a mapping of modules.

    def __len__(self) -> int:
        return len(self.updates)

    def __bool__(self) -> bool:
        # An adapter that only replaces weights has no modules, and is still an adapter.
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __contains__(self, name: object) -> bool:
        return name in self.updates

    def __getitem__(self, name: str) -> AdaptedModule:
        """Return one module with its factors as arrays.

        Args:
            name: The module's name, as `loratools inspect --modules` prints it.

        Raises:
            UnknownModuleError: There is no such module. The error names the nearest ones.
        """
        from loratools.adapted_module import AdaptedModule

        if name not in self.updates:
            raise self._unknown(name)
        return AdaptedModule(name, self.updates[name])

    def _unknown(self, name: object) -> UnknownModuleError:
        if name in self.replacements:
            return UnknownModuleError(
                f"'{name}' is a replaced weight of '{self.name}', and not a module with an update",
                hint=f"adapter.replacements['{name}'].tensor.read() has its values",
            )
        text = clipped(str(name), 200)
        containing = [module for module in self.updates if text and text in module][:3]
        names = list(self.updates)
        if len(names) > _MANY:
            last = text.rpartition(".")[2]
            names = [module for module in names if module.rpartition(".")[2] == last][:_MANY]
        near = containing or difflib.get_close_matches(text, names, n=3, cutoff=0.5)
        return UnknownModuleError(
            f"'{self.name}' has no module '{text}'",
            details=near,
            hint=f"did you mean '{near[0]}'?" if near else f"it has {counted(len(self), 'module')}: list(adapter)",
        )

    @overload
    def delta(
        self,
        name: str,
        *,
        base: Array | LazyTensor | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        as_torch: Literal[False] = False,
    ) -> Floats: ...
    @overload
    def delta(
        self,
        name: str,
        *,
        base: Array | LazyTensor | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        as_torch: Literal[True],
    ) -> Tensor: ...
    def delta(
        self,
        name: str,
        *,
        base: Array | LazyTensor | None = None,
        dtype: Literal["float32", "float64"] = "float32",
        as_torch: bool = False,
    ) -> Floats | Tensor:
        """Return the dense change of one module's weight, scale included: `adapter[name].delta()`.

        Args:
            name: The module's name.
            base: The unmodified weight; needed for kinds whose change depends on it (DoRA, IA3, OFT, ...).
            dtype: float32 or float64. Computed in float64 and rounded once.
            as_torch: Return a torch tensor and not a numpy array.

        Returns:
            The delta in the shape of the weight: (out, in) of a linear layer.

        Raises:
            UnknownModuleError: There is no such module.
            UnsupportedError: The scale of the adapter is uncertain.
            UsageError: The change depends on the weight, and `base` is not given.
            MismatchError: The weight has another shape.
        """
        self.require_certain()
        module = self[name]
        if as_torch:
            return module.delta(base=base, dtype=dtype, as_torch=True)
        return module.delta(base=base, dtype=dtype)

    # To and from values in memory.

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, tuple[Array, Array] | tuple[Array, Array, float]],
        *,
        base_model: str | None = None,
    ) -> Adapter:
        """Return a LoRA adapter of the given factors, which `loratools.save` writes in any format.

        Args:
            factors: For each module, by its name, `(A, B)` or `(A, B, scale)`: numpy arrays or torch tensors, A: (rank,
                in) and B: (out, rank). The change of the weight is `scale * B @ A`. The scale is 1 if it is not given.
            base_model: The name of the base model, stored with the adapter.

        Returns:
            The adapter, with alpha = scale * rank. Its values are held in memory.

        Raises:
            MismatchError: Factors do not make a product. The error names all of them.
            UsageError: A value is neither a numpy array nor a torch tensor of floating-point numbers.

        Example:
            >>> import loratools, numpy
            >>> a, b = numpy.ones((2, 6), "float32"), numpy.ones((10, 2), "float32")
            >>> adapter = loratools.Adapter.from_factors({"model.layers.0.mlp.up_proj": (a, b, 0.5)})
            >>> adapter.delta("model.layers.0.mlp.up_proj")[0, 0].item()
            1.0
        """
        import math

        from loratools.tensors.dtypes import FLOAT_DTYPES
        from loratools.tensors.lazy import from_array
        from loratools.updates.lora import LoRA

        updates: dict[str, Update] = {}
        misfits: list[str] = []
        for name, parts in factors.items():
            if not isinstance(parts, (tuple, list)) or len(parts) not in (2, 3):
                raise UsageError(f"'{name}' is given as {clipped(repr(parts))}", hint="give (A, B) or (A, B, scale)")
            a, b = (from_array(values) for values in parts[:2])
            scale = float(parts[2]) if len(parts) == 3 else 1.0
            if not math.isfinite(scale):
                raise UsageError(f"the scale of '{name}' is {scale}, which is not finite")
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
                misfits.append(f"{name}   A {a.shape} and B {b.shape}")
            elif a.dtype not in FLOAT_DTYPES or b.dtype not in FLOAT_DTYPES:
                misfits.append(f"{name}   A of {a.dtype} and B of {b.dtype}, and floating-point numbers are needed")
            else:
                updates[name] = LoRA(a, b, alpha=scale * a.shape[0], alpha_source="config")
        if misfits:
            raise MismatchError(
                f"{len(misfits)} of {len(factors)} pairs of factors do not make a product B @ A",
                details=misfits,
                hint="A is (rank, in) and B is (out, rank)",
            )
        return cls(updates, base_model=base_model)

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Array], *, config: Mapping[str, object] | object | None = None
    ) -> Adapter:
        """Return the adapter with the state dict of a PEFT model, as `peft.get_peft_model_state_dict` returns it.

        Args:
            tensors: numpy arrays or torch tensors by PEFT's keys:
                `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, ...
            config: The `peft.PeftConfig`, or its fields as a dict. Without it, alpha is assumed to equal the rank, and
                `warnings` says so.

        Returns:
            The adapter. Its values are held in memory.

        Raises:
            UnsupportedError: Some fields or tensors are not supported. The error names all of them.
            FormatError: Factors do not make a product.
            UsageError: A value is neither a numpy array nor a torch tensor.

        Example:
            >>> import loratools
            >>> adapter = loratools.load("fixtures/llama-tiny-science")
            >>> again = loratools.Adapter.from_state_dict(adapter.to_state_dict(), config=adapter.peft_config())
            >>> list(again) == list(adapter)
            True
        """
        adapter: Adapter = registry.load("formats", "peft").from_state_dict(tensors, config)
        return adapter

    def to_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by PEFT's keys, as `peft.set_peft_model_state_dict` takes them.

        Returns:
            torch tensors in the stored dtype. They do not include scales: `peft_config` has ranks and alphas.

        Raises:
            UnsupportedError: PEFT's format cannot hold a module, or the scale of the adapter is uncertain.
        """
        self.require_certain()
        tensors: dict[str, Tensor] = registry.load("formats", "peft").to_state_dict(self)
        return tensors

    def peft_config(self) -> dict[str, Any]:
        """Return the fields of `adapter_config.json` that give PEFT the same ranks, scales and replaced modules.

        Raises:
            UnsupportedError: PEFT's format cannot hold a module, or the scale of the adapter is uncertain.
        """
        self.require_certain()
        fields: dict[str, Any] = registry.load("formats", "peft").config_of(self)
        return fields

    @property
    def layer_order(self) -> tuple[int, ...]:
        """For each layer of the trained model, the layer of the base that it copies; empty if no layer is
        replicated.
        """
        return tuple(i for start, stop in self.layer_replication for i in range(start, stop))

    def tensors(self) -> dict[str, LazyTensor]:
        """Return every tensor, unread, by module and part (`NAME.A`, `NAME.B`), or by the name of a replaced weight."""
        parts = {f"{target}.{part}": t for target, u in self.updates.items() for part, t in u.parts.items()}
        return parts | {name: r.tensor for name, r in self.replacements.items()}

    @property
    def undecided_experts(self) -> tuple[str, ...]:
        """Names of the fused experts whose columns of B may be in either of two orders."""
        experts_by_name = [(name, update.as_experts()) for name, update in self.updates.items()]
        return tuple(name for name, experts in experts_by_name if experts is not None and experts.packing is None)

    @property
    def without_alpha(self) -> tuple[str, ...]:
        """Names of modules whose files state an alpha of 0, although no adapter is trained with that."""
        return tuple(name for name, update in self.updates.items() if update.assumes_alpha and update.alpha == 0)

    @property
    def open_questions(self) -> tuple[str, ...]:
        """What is uncertain about the updates, each with its remedy. Functions that need the values refuse the adapter
        meanwhile.
        """
        questions = list(self.uncertainties)
        if names := self.without_alpha:
            questions.append(
                f"alpha is 0 in {counted(len(names), 'module')}, with which nothing changes; {self._alpha}"
            )
        if names := self.undecided_experts:
            from loratools.updates.lora_experts import WHICH_PACKING

            parameters = counted(len(names), "parameter")
            questions.append(f"the experts of {parameters} may share the columns of B in two ways; {WHICH_PACKING}")
        return tuple(questions)

    @property
    def _alpha(self) -> str:
        path = "ADAPTER" if self.path is None else shlex.quote(shown(self.path))
        return f"give the alpha that it was trained with: loratools convert {path} -o FOLDER --to peft --alpha ALPHA"

    def require_certain(self) -> None:
        """Check that the updates and their scales are certain.

        Raises:
            UnsupportedError: The scale is uncertain.
            UndecidedError: The columns of B of fused experts may be in either of two orders.
        """
        if self.uncertainties:
            raise UnsupportedError(
                f"the scale of '{self.name}' is uncertain",
                details=self.uncertainties,
                hint=self.remedy,
            )
        if names := self.without_alpha:
            raise UnsupportedError(
                f"the scale of '{self.name}' is uncertain: alpha is 0 in {counted(len(names), 'module')}, with which "
                "nothing changes",
                details=names,
                hint=self._alpha,
            )
        if names := self.undecided_experts:
            from loratools.updates.lora_experts import WHICH_PACKING

            raise UndecidedError(
                f"the experts of {counted(len(names), 'parameter')} of '{self.name}' may share the columns of B in two "
                "ways, and Unsloth, which trained it, has used both",
                details=names,
                hint=WHICH_PACKING,
            )

    def selected(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Adapter:
        """Return the part of the adapter whose names match a glob of `include` and none of `exclude`.

        Args:
            include: Globs over the names of modules and replaced weights; empty selects all.
            exclude: Globs of names to leave out.

        Returns:
            A new adapter with the selected modules and replaced weights.

        Raises:
            UsageError: A glob matches nothing, or nothing is selected.
        """
        if not include and not exclude:
            return self
        every = [*self.updates, *self.replacements]
        chosen = set(select_names(every, include, exclude, aliases=self.aliases, unread=self.unread_tensors))
        return replace(
            self,
            updates={n: u for n, u in self.updates.items() if n in chosen},
            replacements={n: r for n, r in self.replacements.items() if n in chosen},
        )
