"""Modules of lycoris-lora x layers x options: the merged weight equals the one that the module computes with.

That weight is read off the module's own forward pass on inputs that pick one weight each, since its `get_diff_weight`
scales twice and its `tools/merge.py` goes through that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import peers
import pytest
import torch
from torch import Tensor, nn

from loratools import registry
from loratools.errors import UnsupportedError
from loratools.formats.image_parts.kinds import Scale
from loratools.formats.image_parts.kinds import updates_of as formats_updates_of
from loratools.formats.image_parts.spellings import grouped
from loratools.tensors.lazy import LazyTensor, from_torch
from loratools.updates.parts.protocol import Update

pytestmark = peers.needs("lycoris")
ButterflyOFTModule = peers.load("lycoris.modules.boft").ButterflyOFTModule
DiagOFTModule = peers.load("lycoris.modules.diag_oft").DiagOFTModule
FullModule = peers.load("lycoris.modules.full").FullModule
GLoRAModule = peers.load("lycoris.modules.glora").GLoRAModule
IA3Module = peers.load("lycoris.modules.ia3").IA3Module
LoConModule = peers.load("lycoris.modules.locon").LoConModule
LohaModule = peers.load("lycoris.modules.loha").LohaModule
LokrModule = peers.load("lycoris.modules.lokr").LokrModule
NormModule = peers.load("lycoris.modules.norms").NormModule

# No two sizes are equal, but where a square is wanted.
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 18),
    "square": lambda: nn.Linear(8, 8),
    "conv1": lambda: nn.Conv1d(4, 6, 3),
    "conv2": lambda: nn.Conv2d(4, 6, (3, 2)),
    "conv2_1x1": lambda: nn.Conv2d(6, 10, 1),
    "conv3": lambda: nn.Conv3d(4, 6, (2, 1, 3)),
}
DORA = {"weight_decompose": True}
DORA_IN = {"weight_decompose": True, "wd_on_out": False}
LOW = {"plain": {}, "rs": {"rs_lora": True}, "tucker": {"use_tucker": True}, "dora": DORA, "dora in": DORA_IN}
# kind -> the module, its options by name, and what it does not support.
MODULES: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "lora": (LoConModule, LOW),
    "loha": (LohaModule, LOW | {"dora tucker": {"use_tucker": True} | DORA}),
    "lokr": (
        LokrModule,
        LOW
        | {
            "both": {"decompose_both": True, "factor": 4, "lora_dim": 1},
            "tucker both": {"decompose_both": True, "use_tucker": True, "factor": 3, "lora_dim": 1},
            "whole": {"full_matrix": True, "alpha": 1e5},
            "large": {"lora_dim": 64},
            "factor": {"factor": 2, "lora_dim": 1},
            "rs": {"rs_lora": True, "lora_dim": 2, "factor": 2},
            "unbalanced": {"unbalanced_factorization": True, "lora_dim": 1},
            "dora low": {"lora_dim": 1} | DORA,
            "dora in low": {"lora_dim": 1} | DORA_IN,
        },
    ),
    "lycoris-glora": (GLoRAModule, {"plain": {}}),
    "lycoris-oft": (
        DiagOFTModule,
        {
            "plain": {"lora_dim": 4},
            "tight": {"constraint": 0.02},
            "loose": {"constraint": 9.0},
            "rescaled": {"rescaled": True},
            "both": {"rescaled": True, "constraint": 0.02},
        },
    ),
    "ia3": (IA3Module, {"outputs": {}, "inputs": {"train_on_input": True}}),
    "full": (FullModule, {"plain": {}}),
}
CASES = [(kind, option, layer) for kind, (_, options) in MODULES.items() for option in options for layer in LAYERS]
# Of outputs that are twice a number times a power of two.
BUTTERFLIES = [
    (option, layer, outputs)
    for option in ("plain", "tight", "rescaled")
    for layer in ("linear", "conv1", "conv2")
    for outputs in (8, 24)
]


def layer_of(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = LAYERS[name]()
    return made


def weight_of(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").detach().clone().double()


def module_of(cls: Any, layer: nn.Module, options: dict[str, Any], seed: int = 1) -> nn.Module:
    """A module of random values on top of a layer, in float64; those of rotations only compute in float32."""
    settings = {"lora_dim": 3, "alpha": 5.0, **options}
    dtype = torch.float32 if cls in (DiagOFTModule, ButterflyOFTModule) else torch.float64
    module: nn.Module = cls("name", layer.to(dtype), **settings).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "org_module" not in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.4
            parameter.data = noise + (parameter.data if name in ("dora_scale", "rescale") else 0)
    if cls is FullModule:
        # Only then does it store what it adds.
        module.apply_to()
    return module.eval()


def parts_of(module: nn.Module) -> tuple[dict[str, Any], float | None]:
    """What the module stores, as it names it below its own name, and alpha."""
    stored = {key: value.detach().clone().contiguous() for key, value in module.state_dict().items()}
    own = {key: value for key, value in stored.items() if "org_module" not in key}
    alpha = own.pop("alpha", None)
    return {key: from_torch(value) for key, value in own.items()}, None if alpha is None else float(alpha)


def rebuilt(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight that the module's forward pass computes with: answers to one input for each column of the weight."""
    columns = math.prod(weight.shape[1:])
    dtype = next(module.parameters()).dtype
    shape = (columns, *weight.shape[1:]) if weight.dim() > 2 else (columns, columns)
    inputs, zero = torch.eye(columns, dtype=dtype), torch.zeros(1, *shape[1:], dtype=dtype)
    # A convolution of an input as large as its kernel has one place to be.
    answers = module(inputs.reshape(shape)) - module(zero)
    return answers.reshape(columns, -1).T.reshape(weight.shape).detach().double()


def updates_of(module: nn.Module) -> dict[str, Update]:
    return read_as_a_file(*parts_of(module))


def read_as_a_file(parts: Mapping[str, LazyTensor], alpha: float | None) -> dict[str, Update]:
    """What a file with these parts of one module is read as; all of them are used."""
    modules, rest, twice = grouped({f"name.{part}": tensor for part, tensor in parts.items()})
    assert (list(modules), rest, twice) == (["name"], [], [])
    return formats_updates_of(modules["name"], Scale(alpha, "tensor"))


def merged(update: Update, weight: Tensor) -> Tensor:
    base = from_torch(weight.detach())
    assert update.fits(tuple(weight.shape))
    delta = update.prepare(base, weight=1.0, dtype="F64")
    whole = weight.detach().reshape(weight.shape[0], -1).numpy()
    assert delta.shape == whole.shape
    rows = delta.rows(0, len(whole), whole)
    return torch.from_numpy(whole + rows).reshape(weight.shape)


def within(kind: str, option: str) -> float:
    """Norms of DoRA, and maps and bounds of rotations, are taken in float32 there."""
    return 2e-5 if "oft" in kind else 1e-6 if "dora" in option else 1e-7


@pytest.mark.parametrize(("kind", "option", "layer"), CASES)
def test_a_merged_weight_is_the_modules_own(kind: str, option: str, layer: str) -> None:
    cls, options = MODULES[kind]
    base = layer_of(layer)
    weight = weight_of(base)
    module = module_of(cls, base, options[option])
    if kind == "lokr" and option == "rs" and module.use_w2:
        pytest.skip("LyCORIS itself forgets the scale of such a module when it loads it: see the test below")
    expected = rebuilt(module, weight)
    assert not torch.allclose(expected, weight, atol=1e-3)

    found = merged(updates_of(module)[""], weight)

    torch.testing.assert_close(found, expected, rtol=within(kind, option), atol=within(kind, option))


@pytest.mark.parametrize(("option", "layer", "outputs"), BUTTERFLIES)
def test_a_product_of_butterflies_is_the_modules_own(option: str, layer: str, outputs: int) -> None:
    torch.manual_seed(0)
    base = {"linear": nn.Linear(6, outputs), "conv1": nn.Conv1d(4, outputs, 3), "conv2": nn.Conv2d(3, outputs, 2)}[
        layer
    ]
    weight = weight_of(base)
    settings = {"plain": {}, "tight": {"constraint": 0.02}, "rescaled": {"rescaled": True}}[option]
    module = module_of(ButterflyOFTModule, base, {"lora_dim": 7, **settings})

    found = merged(updates_of(module)[""], weight)

    torch.testing.assert_close(found, rebuilt(module, weight), rtol=2e-5, atol=2e-5)


def test_two_whole_matrices_of_lokr_have_no_scale_whatever_alpha_says() -> None:
    """Trained with rs_lora, LyCORIS scales them by sqrt(rank), and by 1 once it has loaded its own file."""
    base = layer_of("linear")
    weight = weight_of(base)
    trained = module_of(LokrModule, base, {"full_matrix": True, "rs_lora": True, "lora_dim": 9})
    w1, w2 = trained.lokr_w1, trained.lokr_w2
    with torch.no_grad():
        loaded = LokrModule.make_module_from_state_dict(
            "name", layer_of("linear").double(), w1, None, None, w2, None, None, None, None, trained.alpha, None
        )

    found = merged(updates_of(trained)[""], weight)

    torch.testing.assert_close(found, weight + torch.kron(w1, w2).detach(), rtol=1e-12, atol=1e-12)
    assert (trained.scale, loaded.scale) == (3.0, 1.0)


@pytest.mark.parametrize("layer", ["linear", "conv2"])
def test_the_bias_of_a_whole_difference_is_added(layer: str) -> None:
    base = layer_of(layer).double()
    bias = base.get_parameter("bias").detach().clone()
    module = module_of(FullModule, base, {})

    found = updates_of(module)[".bias"].prepare(from_torch(bias), weight=1.0, dtype="F64").rows(0, len(bias))

    torch.testing.assert_close(bias + torch.from_numpy(found[:, 0]), module.make_weight()[1].detach())


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(3, 9)], ids=["layer", "group"])
def test_the_weight_and_bias_of_a_norm_are_added(norm: nn.Module) -> None:
    module = module_of(NormModule, norm, {})
    expected = module.make_weight()

    updates = updates_of(module)

    for suffix, own, wanted in zip(("", ".bias"), norm.parameters(), expected, strict=True):
        delta = updates[suffix].prepare(from_torch(own.detach()), weight=1.0, dtype="F64").rows(0, own.numel())
        torch.testing.assert_close(own.detach() + torch.from_numpy(delta[:, 0]), wanted.detach())


def test_the_first_layout_of_glora_is_told_by_its_shapes() -> None:
    """`W @ A2 @ A1 + B2 @ B1`, in float64, of layers that are wider, narrower and square."""
    generator = torch.Generator().manual_seed(3)
    for outputs, inputs, rank in ((9, 7, 3), (5, 8, 2), (6, 6, 4)):
        sizes = {"a1": (rank, inputs), "a2": (inputs, rank), "b1": (rank, inputs), "b2": (outputs, rank)}
        stored = {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in sizes.items()}
        weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)

        update = read_as_a_file({f"{n}.weight": from_torch(t) for n, t in stored.items()}, 5.0)[""]

        dense = weight @ stored["a2"] @ stored["a1"] + stored["b2"] @ stored["b1"]
        torch.testing.assert_close(merged(update, weight), weight + 5 / rank * dense)


def test_glora_of_square_factors_is_refused_since_its_layout_cannot_be_told() -> None:
    entry = registry.load("updates", "lycoris-glora")
    parts = {f"{name}.weight": from_torch(torch.ones(4, 4)) for name in ("a1", "a2", "b1", "b2")}

    with pytest.raises(UnsupportedError, match="'layer' has factors that are all 4 x 4"):
        entry.from_lycoris(parts, None, name="layer")


MUTATIONS = {
    "lora-magnitude": ("lora", "dora", "dora_scale", lambda t: None),
    "lora-axis": ("lora", "dora", "dora_scale", lambda t: t.reshape(1, -1)),
    "loha-magnitude": ("loha", "dora", "dora_scale", lambda t: None),
    "loha-axis": ("loha", "dora in", "dora_scale", lambda t: t.reshape(-1, 1)),
    "loha-transposed": ("loha", "plain", "hada_w1_a", lambda t: t.flip(0)),
    "lokr-magnitude": ("lokr", "dora low", "dora_scale", lambda t: None),
    "lokr-transposed": ("lokr", "whole", "lokr_w1", lambda t: t.T.contiguous()),
    "oft-inverse": ("lycoris-oft", "plain", "oft_blocks", lambda t: t.mT.contiguous()),
    "oft-rescale": ("lycoris-oft", "rescaled", "rescale", lambda t: None),
    "ia3-axis": ("ia3", "outputs", "on_input", lambda t: 1 - t),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_part_lost_or_transposed_would_be_seen(mutation: str) -> None:
    """The comparison above can fail: of a square layer, where no shape gives a mistake away."""
    kind, option, part, change = MUTATIONS[mutation]
    cls, options = MODULES[kind]
    base = layer_of("square")
    weight = weight_of(base)
    module = module_of(cls, base, options[option])
    expected = rebuilt(module, weight)
    parts, alpha = parts_of(module)
    changed = change(parts.pop(part).read())
    parts |= {part: from_torch(changed)} if changed is not None else {}

    update = read_as_a_file(parts, alpha)[""]

    assert (merged(update, weight) - expected).abs().max() > 1e-2
