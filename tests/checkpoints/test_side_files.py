import os
from pathlib import Path

import pytest

from loratools.checkpoints.common.side_files import sort_out, why_left_out
from loratools.skipped import Skipped

_ALONG = [
    "config.json", "generation_config.json", "configuration_deepseek.py", "modeling_deepseek.py",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model",
    "source.spm", "target.spm", "vocab.bpe", "qwen.tiktoken", "tekken.json", "bpe.codes", "chat_template.jinja",
    "chat_template.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE-MODEL", "NOTICE", "USE_POLICY.md", "normalizer.json",
    "params.json", "logo.png",
]  # fmt: skip
_COPY = "the same weights in another format"
_TRAINING = "a state or record of training"
_ADAPTER = "an adapter, not part of the base"
_LEFT = {
    "pytorch_model.bin": _COPY,
    "pytorch_model-00001-of-00002.bin": _COPY,
    "pytorch_model.bin.index.json": _COPY,
    "tf_model.h5": _COPY,
    "flax_model.msgpack": _COPY,
    "flax_model.msgpack.index.json": _COPY,
    "rust_model.ot": _COPY,
    "model-q4_k.gguf": _COPY,
    "model.onnx": _COPY,
    "model.onnx_data": _COPY,
    "openvino_model.xml": _COPY,
    "consolidated.safetensors": _COPY,
    "consolidated.00.pth": _COPY,
    "adapter_config.json": _ADAPTER,
    "adapter_model.safetensors": _ADAPTER,
    "adapter_model.bin": _ADAPTER,
    "optimizer.pt": _TRAINING,
    "scheduler.pt": _TRAINING,
    "rng_state_0.pth": _TRAINING,
    "training_args.bin": _TRAINING,
    "trainer_state.json": _TRAINING,
    "train_results.json": _TRAINING,
    "events.out.tfevents.1700000000.host.1.0": _TRAINING,
    "model-00001-of-00009.safetensors": "a shard that does not belong to this model",
    "model.fp16.safetensors": "another variant of the weights",
    "other.safetensors": "weights that are not part of this model",
    "other.safetensors.index.json": "an index of other weights",
    "weights.pkl": "a pickle",
    ".gitattributes": "hidden",
    ".DS_Store": "hidden",
    "archive.zip": "not known to belong to a model",
    "run.sh": "not known to belong to a model",
}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


@pytest.mark.parametrize("name", _ALONG)
def test_file_of_the_model_comes_along(name: str) -> None:
    assert why_left_out(name) is None


@pytest.mark.parametrize("name", _LEFT)
def test_file_that_is_no_part_of_the_model_is_left_out_with_the_reason(name: str) -> None:
    assert why_left_out(name) == _LEFT[name]


def test_everything_is_a_weight_or_comes_along_or_is_left_out(tmp_path: Path) -> None:
    folders = {
        ".git/config": ".git/", ".cache/huggingface/x.json": ".cache/", "original/consolidated.00.pth": "original/",
        "onnx/model.onnx": "onnx/", "openvino/openvino_model.bin": "openvino/", "checkpoint-500/config.json":
        "checkpoint-500/", "global_step500/x.pt": "global_step500/", "runs/Nov/events": "runs/",
        "__pycache__/x.pyc": "__pycache__/", "text_encoder/model.safetensors": "text_encoder/",
    }  # fmt: skip
    write(tmp_path, "model.safetensors", *_ALONG, *_LEFT, *folders, "figures/speed.png", "figures/raw/data.csv")

    along, left = sort_out(tmp_path, {"model.safetensors"})

    assert [side.name for side in along] == sorted([*_ALONG, "figures/speed.png"])
    assert all(side.path == tmp_path / side.name for side in along)
    assert [item.name for item in left] == sorted([*_LEFT, *folders.values(), "figures/raw/data.csv"])


def test_modules_of_sentence_transformers_come_along_with_their_weights(tmp_path: Path) -> None:
    write(
        tmp_path, "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "3_Dense/pytorch_model.bin",
    )  # fmt: skip
    (tmp_path / "4_Normalize").mkdir()

    along, left = sort_out(tmp_path, {"model.safetensors"})

    assert [side.name for side in along] == [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin",
        "modules.json",
    ]  # fmt: skip
    assert left == (Skipped("2_Dense/pytorch_model.bin", _COPY, "file"),)


def test_folder_with_weights_is_no_module_without_modules_json(tmp_path: Path) -> None:
    write(tmp_path, "2_Dense/model.safetensors", "2_Dense/config.json")

    assert sort_out(tmp_path, set()) == ((), (Skipped("2_Dense/", "a folder with weights of its own", "file"),))


def test_what_is_no_file_of_the_folder_is_left_out(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base, "config.json", "sub/x.json")
    write(tmp_path, "secret.json")
    (base / "out.json").symlink_to("../secret.json")
    (base / "tokens.json").symlink_to(tmp_path / "secret.json")
    (base / "nowhere.json").symlink_to("missing.json")
    (base / "loop.json").symlink_to("loop.json")
    (base / "same.json").symlink_to("config.json")
    (base / "folder").symlink_to("sub")
    (base / "up").symlink_to("..")
    os.mkfifo(base / "pipe.json")

    along, left = sort_out(base, set())

    assert [side.name for side in along] == ["config.json", "same.json", "sub/x.json"]
    assert {item.name: item.why for item in left} == {
        "folder": "a link to a folder",
        "loop.json": "a link that leads nowhere",
        "nowhere.json": "a link that leads nowhere",
        "out.json": "a link that leads out of the folder",
        "pipe.json": "no regular file",
        "tokens.json": "a link that leads out of the folder",
        "up": "a link that leads out of the folder",
    }


def test_code_that_comes_with_a_model_is_copied_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    along, _ = sort_out(tmp_path, set())

    assert [side.name for side in along] == ["modeling_x.py"]
    assert not (tmp_path / "ran").exists()
