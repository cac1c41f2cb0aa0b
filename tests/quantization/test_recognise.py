import itertools
import math

import pytest
import torch

from loratools import registry
from loratools.quantization import UNKNOWN, Quantisation, recognise
from loratools.tensors.dtypes import torch_dtype
from loratools.tensors.lazy import LazyTensor

Entries = dict[str, tuple[str, tuple[int, ...]]]


class _Zeros:
    """A source of zeros: recognition is by headers, and by the few small tensors that are settings."""

    location = None

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        assert math.prod(self.shape) < 100, "no values of weights are read"
        return torch.zeros((stop - start, *self.shape[1:]), dtype=torch_dtype(self.dtype))


def lazy(entries: Entries) -> dict[str, LazyTensor]:
    return {name: LazyTensor(shape, dtype, _Zeros(shape, dtype)) for name, (dtype, shape) in entries.items()}  # type: ignore[arg-type]


def packed_tensors(found: Quantisation) -> set[str]:
    """The stored tensors that hold packed numbers, of weights that are read and of those that are not."""
    readable = {weight.stored_names[0] for weight in found.weights.values()}
    return readable | {weight.stored[0] for weight in found.unreadable.values()}


def module(prefix: str, entries: Entries) -> Entries:
    return {f"{prefix}.{name}": entry for name, entry in entries.items()}


# A layer of (out 256, in 128), with the shapes that each scheme gives it on disk.
_CASES: dict[str, tuple[str, str, Entries]] = {
    "fp8 blocks": ("fp8", "weight", {"weight": ("F8_E4M3", (256, 128)), "weight_scale_inv": ("F32", (2, 1))}),
    "fp8 blocks, e8m0": ("fp8", "weight", {"weight": ("F8_E4M3", (256, 128)), "scale": ("F8_E8M0", (2, 1))}),
    "fp8 tensor": (
        "fp8", "weight",
        {"weight": ("F8_E4M3", (256, 128)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())},
    ),
    "fp8 channel": ("fp8", "weight", {"weight": ("F8_E5M2", (256, 128)), "weight_scale": ("BF16", (256, 1))}),
    "fp8 fnuz": ("fp8", "weight", {"weight": ("F8_E4M3FNUZ", (256, 128)), "weight_scale": ("F32", (1,))}),
    "fp8 comfy": (
        "fp8", "weight",
        {"weight": ("F8_E4M3", (256, 128)), "scale_weight": ("F32", ()), "scaled_fp8": ("F8_E4M3", (2,))},
    ),
    "fp8 comfy, new": (
        "fp8", "weight",
        {"weight": ("F8_E4M3", (256, 128)), "weight_scale": ("F32", ()), "comfy_quant": ("U8", (27,))},
    ),
    "mxfp8": ("fp8", "weight", {"weight": ("F8_E4M3", (256, 128)), "weight_scale": ("U8", (256, 4))}),
    "fp8 without scale": ("fp8", "weight", {"weight": ("F8_E4M3", (256, 128))}),
    "nf4": (
        "bitsandbytes", "weight",
        {
            "weight": ("U8", (16384, 1)), "weight.absmax": ("U8", (512,)), "weight.quant_map": ("F32", (16,)),
            "weight.nested_absmax": ("F32", (2,)), "weight.nested_quant_map": ("F32", (256,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (95,)),
        },
    ),
    "fp4": (
        "bitsandbytes", "weight",
        {
            "weight": ("U8", (16384, 1)), "weight.absmax": ("F32", (512,)), "weight.quant_map": ("F32", (16,)),
            "weight.quant_state.bitsandbytes__fp4": ("U8", (80,)),
        },
    ),
    "nf4 in bfloat16 storage": (
        "bitsandbytes", "weight",
        {"weight": ("BF16", (8192, 1)), "weight.absmax": ("U8", (512,)),
         "weight.quant_state.bitsandbytes__nf4": ("U8", (95,))},
    ),
    "int8": (
        "bitsandbytes", "weight",
        {"weight": ("I8", (256, 128)), "SCB": ("F32", (256,)), "weight_format": ("U8", ())},
    ),
    "gptq": (
        "gptq", "qweight",
        {
            "qweight": ("I32", (16, 256)), "qzeros": ("I32", (1, 32)), "scales": ("F16", (1, 256)),
            "g_idx": ("I32", (128,)),
        },
    ),
    "gptq without g_idx": (
        "gptq", "qweight", {"qweight": ("I32", (16, 256)), "qzeros": ("I32", (1, 32)), "scales": ("F16", (1, 256))},
    ),
    "gptq of 8 bits": (
        "gptq", "qweight",
        {
            "qweight": ("I32", (32, 256)), "qzeros": ("I32", (1, 64)), "scales": ("F16", (1, 256)),
            "g_idx": ("I32", (128,)),
        },
    ),
    "awq": (
        "awq", "qweight", {"qweight": ("I32", (128, 32)), "qzeros": ("I32", (1, 32)), "scales": ("F16", (1, 256))},
    ),
    "awq of a square layer": (
        "awq", "qweight", {"qweight": ("I32", (256, 32)), "qzeros": ("I32", (2, 32)), "scales": ("F16", (2, 256))},
    ),
    "awq gemv": (
        "awq", "qweight", {"qweight": ("I32", (256, 16)), "qzeros": ("I32", (256, 1)), "scales": ("F16", (256, 8))},
    ),
    "mxfp4": (
        "mxfp4", "gate_up_proj_blocks",
        {
            "gate_up_proj_blocks": ("U8", (2, 256, 4, 16)), "gate_up_proj_scales": ("U8", (2, 256, 4)),
            "gate_up_proj_bias": ("BF16", (2, 256)),
        },
    ),
    "compressed-tensors int4": (
        "compressed-tensors", "weight_packed",
        {"weight_packed": ("I32", (256, 16)), "weight_scale": ("BF16", (256, 1)), "weight_shape": ("I64", (2,))},
    ),
    "compressed-tensors int4, asymmetric": (
        "compressed-tensors", "weight_packed",
        {
            "weight_packed": ("I32", (256, 16)), "weight_scale": ("BF16", (256, 1)), "weight_shape": ("I64", (2,)),
            "weight_zero_point": ("I32", (32, 1)), "weight_g_idx": ("I32", (128,)),
        },
    ),
    "compressed-tensors int8": (
        "compressed-tensors", "weight", {"weight": ("I8", (256, 128)), "weight_scale": ("BF16", (256, 1))},
    ),
    "compressed-tensors mxfp4": (
        "compressed-tensors", "weight_packed", {"weight_packed": ("U8", (256, 64)), "weight_scale": ("U8", (256, 4))},
    ),
    "compressed-tensors sparse": (
        "compressed-tensors", "compressed",
        {
            "compressed": ("BF16", (16384,)), "bitmask": ("U8", (256, 16)), "shape": ("I64", (2,)),
            "row_offsets": ("I64", (256,)),
        },
    ),
    "nvfp4 of compressed-tensors": (
        "nvfp4", "weight_packed",
        {
            "weight_packed": ("U8", (256, 64)), "weight_scale": ("F8_E4M3", (256, 8)),
            "weight_global_scale": ("F32", (1,)), "input_global_scale": ("F32", (1,)),
        },
    ),
    "nvfp4 of ModelOpt": (
        "nvfp4", "weight",
        {
            "weight": ("U8", (256, 64)), "weight_scale": ("F8_E4M3", (256, 8)), "weight_scale_2": ("F32", ()),
            "input_scale": ("F32", ()),
        },
    ),
    "nvfp4 of fused experts": (
        "nvfp4", "gate_up_proj",
        {
            "gate_up_proj": ("U8", (2, 64, 256)), "gate_up_proj_weight_scale": ("F8_E4M3", (2, 8, 256)),
            "gate_up_proj_weight_scale_2": ("F32", ()),
        },
    ),
    "torchao int8": (
        "torchao", "_weight_qdata", {"_weight_qdata": ("I8", (256, 128)), "_weight_scale": ("BF16", (256, 1))},
    ),
    "torchao fp8": (
        "torchao", "_weight_qdata", {"_weight_qdata": ("F8_E4M3", (256, 128)), "_weight_scale": ("F32", (256, 1))},
    ),
    "torchao int4": (
        "torchao", "_weight_qdata",
        {"_weight_qdata": ("I32", (32, 1, 32, 4)), "_weight_scale_and_zero": ("BF16", (1, 256, 2))},
    ),
    "mlx affine": (
        "mlx", "weight",
        {"weight": ("U32", (256, 16)), "scales": ("BF16", (256, 2)), "biases": ("BF16", (256, 2))},
    ),
    "mlx mxfp4": ("mlx", "weight", {"weight": ("U32", (256, 16)), "scales": ("U8", (256, 4))}),
    "mlx experts": (
        "mlx", "weight",
        {"weight": ("U32", (4, 256, 16)), "scales": ("F16", (4, 256, 2)), "biases": ("F16", (4, 256, 2))},
    ),
    "hqq": (
        "hqq", "W_q",
        {"W_q": ("U8", (32, 512)), "scale": ("F16", (1, 512)), "zero": ("F16", (1, 512)), "nbits": ("I32", (1,))},
    ),
    "hqq seen as float": (
        "hqq", "W_q",
        {"W_q": ("F16", (16, 512)), "scale": ("F16", (1, 512)), "zero": ("F16", (1, 512)), "nbits": ("F32", (1,))},
    ),
    "quanto int8": (
        "quanto", "weight._data", {"weight._data": ("I8", (256, 128)), "weight._scale": ("BF16", (256, 1))},
    ),
    "quanto fp8": (
        "quanto", "weight._data", {"weight._data": ("F8_E4M3", (256, 128)), "weight._scale": ("BF16", (256, 1))},
    ),
    "quanto int4": (
        "quanto", "weight._data._data",
        {
            "weight._data._data": ("U8", (64, 256)), "weight._scale": ("BF16", (256, 1)),
            "weight._shift": ("BF16", (256, 1)),
        },
    ),
    "aqlm": (
        "aqlm", "codes",
        {"codes": ("I16", (256, 16, 1)), "codebooks": ("F16", (1, 65536, 1, 8)), "scales": ("F16", (256, 1, 1, 1))},
    ),
    "eetq": ("eetq", "weight", {"weight": ("I8", (128, 256)), "weight_scales": ("F16", (256,))}),
    "bitnet": ("bitnet", "weight", {"weight": ("U8", (64, 128)), "weight_scale": ("BF16", (1,))}),
}  # fmt: skip

_CONFIGS: dict[str, dict[str, object]] = {
    "without config": {},
    "with a config that agrees": {"quantization_config": {"quant_method": "the scheme's own"}},
    "with a config that contradicts": {"quantization_config": {"quant_method": "fbgemm_fp8"}},
}
_PLAIN: Entries = {
    "model.embed_tokens.weight": ("BF16", (40, 128)),
    "model.norm.weight": ("BF16", (128,)),
}


@pytest.mark.parametrize("config", _CONFIGS)
@pytest.mark.parametrize("case", _CASES)
def test_scheme_is_told_by_tensors_whatever_the_config_says(case: str, config: str) -> None:
    name, part, entries = _CASES[case]
    layers = {**module("layers.0.q_proj", entries), **module("layers.1.q_proj", entries)}

    found = recognise(lazy({**_PLAIN, **layers}), _CONFIGS[config])

    assert found is not None
    assert found.name == name
    assert packed_tensors(found) == {f"layers.0.q_proj.{part}", f"layers.1.q_proj.{part}"}
    assert found.logical(lazy(_PLAIN)).keys() == _PLAIN.keys()


def test_every_scheme_has_a_case_and_a_summary() -> None:
    # The block types of GGUF are told by the file's header, and have tests of their own.
    assert {name for name, _, _ in _CASES.values()} == set(registry.names("quantization")) - {"gguf"}
    assert all(registry.summary("quantization", name).endswith(".") for name in registry.names("quantization"))


@pytest.mark.parametrize("case", _CASES)
def test_only_one_scheme_claims_a_file(case: str) -> None:
    name, _, entries = _CASES[case]
    tensors = lazy(module("q_proj", entries))

    claims = [n for n in registry.names("quantization") if registry.load("quantization", n).recognise(tensors, {})]
    assert claims == [name]


_BUFFERS: Entries = {
    "embeddings.position_ids": ("I64", (1, 512)),
    "embeddings.token_type_ids": ("I64", (1, 512)),
    "rotary_emb.inv_freq": ("F32", (32,)),
    "bn.num_batches_tracked": ("I64", ()),
    "bn.running_mean": ("F32", (8,)),
    "attn.bias": ("BOOL", (1, 1, 16, 16)),
    "attn.masked_bias": ("F32", ()),
    "attn.bias_u8": ("U8", (1, 1, 16, 16)),
    "relative_position_index": ("I64", (49, 49)),
    "router.tid2eid": ("I64", (100, 6)),
    "attn.scale": ("F32", (1,)),
    "attn.logit_scale": ("F32", (4, 1, 1)),
    "norm.scales": ("F32", (8,)),
    "quantizer.codebooks": ("F32", (4, 16, 1, 8)),
    "mask.weight": ("BOOL", (8, 8)),
    "class.weight": ("I64", (8,)),
}


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_plain_checkpoint_is_never_taken_for_quantised(dtype: str) -> None:
    layers: Entries = {
        "q_proj.weight": (dtype, (256, 128)),
        "q_proj.bias": (dtype, (256,)),
        "conv.weight": (dtype, (8, 4, 3, 3)),
    }

    assert recognise(lazy(layers), {}) is None
    assert recognise(lazy({**layers, **_BUFFERS}), {"torch_dtype": "bfloat16", "quantization_config": None}) is None


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"quant_method": "vptq"}}, "vptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}, "mlx"),
        ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"quantization_config": {"strange": 1}}, "unknown"),
    ],
)
def test_config_that_no_tensor_bears_out_gives_its_name_without_weights(config: dict[str, object], name: str) -> None:
    found = recognise(lazy(_PLAIN), config)

    assert found == Quantisation(declared=name)
    assert found.name == name
    assert len(found.refused) == 1


@pytest.mark.parametrize("said", [None, {}, [], "gptq", 4, False])
def test_config_that_says_nothing_of_quantisation_is_none(said: object) -> None:
    assert recognise(lazy(_PLAIN), {"quantization_config": said}) is None


@pytest.mark.parametrize(
    "entries",
    [
        {"q_proj.weight": ("U8", (256, 64))},
        {"q_proj.weight": ("I8", (256, 128))},
        {"q_proj.weight": ("I32", (16, 256))},
        {"q_proj.qweight": ("I32", (16, 256)), "q_proj.lut": ("F16", (256, 16))},
        {"experts.weight": ("U8", (4, 256, 64))},
        {"q_proj.anything": ("F4", (256, 128))},
        {"q_proj.weight": ("F6_E2M3", (256, 128))},
        {"q_proj.weight": ("I8", (256, 128)), "q_proj.weight_scale": ("F32", ()), "q_proj.comfy_quant": ("U8", (9,))},
    ],
)
def test_packed_weight_that_nobody_recognises_is_unknown(entries: Entries) -> None:
    found = recognise(lazy({**_PLAIN, **entries}), {})

    assert found is not None
    assert found.name == UNKNOWN == "unknown packed"
    assert packed_tensors(found) == {next(iter(entries))}
    assert len(found.refused) == 1


def test_unknown_weight_beside_known_ones_is_named_too() -> None:
    entries: Entries = {**module("a", _CASES["gptq"][2]), "b.weight": ("U8", (8, 8))}

    found = recognise(lazy(entries), {})

    assert found is not None
    assert found.name == "gptq + unknown packed"
    assert packed_tensors(found) == {"a.qweight", "b.weight"}
    assert found.weights.keys() == {"a.weight"}
    assert found.unreadable.keys() == {"b.weight"}


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(["fp8 blocks", "nf4", "gptq", "awq", "mxfp4"], 2)))
def test_two_schemes_in_one_file_are_both_named(one: str, two: str) -> None:
    names = [_CASES[one][0], _CASES[two][0]]

    found = recognise(lazy({**module("a", _CASES[one][2]), **module("b", _CASES[two][2])}), {})

    assert found is not None
    assert found.name == " + ".join(sorted(names))
    assert len(packed_tensors(found)) == 2


def test_recognition_of_90_thousand_tensors_takes_no_time_to_speak_of() -> None:
    import time

    entries: Entries = {}
    for i in range(45_000):
        entries |= module(f"layers.{i}", _CASES["fp8 blocks"][2])
    tensors = lazy(entries)

    start = time.process_time()
    found = recognise(tensors, {})

    assert found is not None
    assert len(found.weights) == 45_000
    assert time.process_time() - start < 5
