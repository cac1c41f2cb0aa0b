"""Sources on the hub, by a stand-in that huggingface_hub itself talks to: results, requests, refusals, failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import factories
import pytest
import stand_in_hub
import torch
from cli_runner import CliRunner
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from stand_in_hub import StandInHub

import loratools
from loratools.cli import verbs
from loratools.errors import LoraToolsError, MachineError, UsageError
from loratools.sources import listener
from loratools.storage.origins import origin_of

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, ADAPTER = FIXTURES / "llama-tiny", FIXTURES / "llama-tiny-science"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A stand-in with a base and an adapter, an empty cache, and an empty working folder."""
    with stand_in_hub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        running.publish("acme/base", BASE)
        running.publish("acme/science", ADAPTER)
        yield running


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in the files of a result, but for its record and card, which name the inputs."""
    names = ("loratools.json", "README.md")
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in names)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def tensors_of(folder: str) -> dict[str, list[object]]:
    """The tensors of an adapter by name, as numbers."""
    return {name: values.tolist() for name, values in load_file(Path(folder) / "adapter_model.safetensors").items()}


def modules_of(source: str | Path, *, values: bool = False) -> list[dict[str, object]]:
    """What `inspect` tells of each module, without where it is from."""
    rows = loratools.inspect(source, values=values).rows()
    return [{name: value for name, value in row.items() if name != "path"} for row in rows]


def cached(repository: str, tmp_path: Path) -> set[str]:
    """The names of the files of a repository in the hub's cache."""
    folder = tmp_path / "cache" / f"models--{repository.replace('/', '--')}" / "snapshots"
    return {p.relative_to(folder).as_posix().partition("/")[2] for p in folder.rglob("*") if p.is_file()}


def test_merge_from_the_hub_gives_the_bytes_of_a_merge_of_folders(hub: StandInHub, tmp_path: Path) -> None:
    loratools.merge("acme/base", [("acme/science", 0.5)], "from-hub")
    loratools.merge(BASE, [(ADAPTER, 0.5)], "from-folders")

    assert files_of(Path("from-hub")) == files_of(Path("from-folders"))
    assert cached("acme/science", tmp_path) == {"adapter_config.json", "adapter_model.safetensors"}


def test_every_kind_of_address_means_the_same_adapter(hub: StandInHub, tmp_path: Path) -> None:
    commit = next(iter(hub.repositories["acme/science"]))
    expected = modules_of(ADAPTER, values=True)

    for source in ("acme/science", "hf://acme/science", f"hf://acme/science@{commit}", Path("hf://acme/science")):
        assert modules_of(source, values=True) == expected
    cache = tmp_path / "cache" / "models--acme--science"
    for source in (cache, cache / "snapshots" / commit):
        assert modules_of(source) == modules_of(ADAPTER)


def test_verbs_that_make_adapters_give_the_bytes_of_folders(hub: StandInHub) -> None:
    loratools.combine(["acme/science", ("acme/science", 0.25)], "combined", method="linear")
    loratools.combine([ADAPTER, (ADAPTER, 0.25)], "combined-here", method="linear")
    loratools.resize("hf://acme/science", "resized", rank=3)
    loratools.resize(ADAPTER, "resized-here", rank=3)
    loratools.convert("acme/science", "converted", format="mlx")
    loratools.convert(ADAPTER, "converted-here", format="mlx")

    for name in ("resized", "converted"):
        assert files_of(Path(name)) == files_of(Path(f"{name}-here"))
    # Its header has the recipe, which names the adapters.
    assert tensors_of("combined") == tensors_of("combined-here")


def test_verify_takes_addresses(hub: StandInHub) -> None:
    loratools.merge(BASE, ADAPTER, "merged")

    assert loratools.verify("merged", "acme/base", ["acme/science"]).verdict == "same"


def test_a_recipe_may_name_a_repository(hub: StandInHub) -> None:
    Path("recipes").mkdir()
    Path("recipes/recipe.yaml").write_text(
        "adapters:\n  - hf://acme/science\n  - adapter: acme/science\n    weight: 0.5\n"
    )

    loratools.combine(recipe="recipes/recipe.yaml", out="by-recipe")
    loratools.combine([ADAPTER, (ADAPTER, 0.5)], "here")

    assert tensors_of("by-recipe") == tensors_of("here")


@pytest.mark.parametrize("verb", ["inspect", "list", "check", "merge"])
def test_verbs_of_headers_download_nothing(hub: StandInHub, tmp_path: Path, verb: str) -> None:
    match verb:
        case "inspect":
            loratools.inspect("acme/science", "acme/base")
        case "list":
            listed = loratools.list_adapters("hf://acme/science")
            assert [row.path.partition("@")[0] for row in listed.adapters] == ["hf://acme/science"]
        case "check":
            loratools.check("acme/science", "acme/base", values=False)
        case "merge":
            loratools.merge("acme/base", "acme/science", "out", plan=True)

    assert not (tmp_path / "cache").exists()
    assert all(request.range for request in hub.asked("/resolve/"))


def test_inspect_of_448_tensors_is_three_requests(hub: StandInHub, tmp_path: Path) -> None:
    # 32 layers of 7 modules, as all linear layers of a Llama: the names of a real adapter, and small values.
    shapes = {f"self_attn.{name}_proj": (10, 6) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (12, 6) for name in ("gate", "up", "down")}
    big = factories.adapter_folder(tmp_path / "big", modules=factories.layered(32, shapes), rank=4)
    hub.publish("acme/big", big)

    report = loratools.inspect("acme/big")

    # The redirect of a large file to where it is stored is the second half of one request.
    asked = [request for request in hub.requests if not request.path.startswith("/stored/")]
    assert 2 * len(report.sources[0].modules) == 448
    assert len(asked) <= 3
    assert hub.sent < 200_000


def test_inspect_of_163_shards_asks_for_each_header_once(hub: StandInHub, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {}
    for i in range(163):
        shard = f"model-{i + 1:05d}-of-00163.safetensors"
        save_file({f"model.layers.{i}.mlp.up_proj.weight": torch.full((400, 300), float(i))}, folder / shard)
        weight_map[f"model.layers.{i}.mlp.up_proj.weight"] = shard
    index = {"metadata": {"total_size": 163 * 400 * 300 * 4}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    hub.publish("acme/sharded", folder)

    report = loratools.inspect("acme/sharded")

    shards = [request.path for request in hub.asked("/resolve/") if "-of-00163" in request.path]
    assert report.sources[0].parameters == 163 * 400 * 300
    assert len(shards) == len(set(shards)) == 163
    assert hub.sent < 163 * 100_000 + 100_000


def test_one_checkpoint_of_ten_costs_its_own_bytes(hub: StandInHub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(10, 101, 10):
        shutil.copytree(ADAPTER, run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}" / "optimizer.pt").write_bytes(bytes(500_000))
    hub.publish("acme/run", run)

    loratools.resize("hf://acme/run/checkpoint-30", "small", rank=2)

    assert cached("acme/run", tmp_path) == {
        "checkpoint-30/adapter_config.json",
        "checkpoint-30/adapter_model.safetensors",
    }


def test_weights_beside_those_that_are_read_are_not_downloaded(hub: StandInHub, tmp_path: Path) -> None:
    both = shutil.copytree(BASE, tmp_path / "both")
    (both / "pytorch_model.bin").write_bytes(bytes(200_000))
    (both / "onnx").mkdir()
    (both / "onnx" / "model.onnx").write_bytes(bytes(200_000))
    hub.publish("acme/both", both)

    loratools.merge("acme/both", "acme/science", "merged")

    assert not {"pytorch_model.bin", "onnx/model.onnx"} & cached("acme/both", tmp_path)


def test_revision_is_pinned_by_the_first_request(hub: StandInHub, tmp_path: Path) -> None:
    first = next(iter(hub.repositories["acme/science"]))
    before = loratools.load("acme/science")
    hub.publish("acme/science", factories.adapter_folder(tmp_path / "moved"))

    after = loratools.load("acme/science")

    assert before.path == after.path
    assert origin_of(after.path).commit == first  # type: ignore[union-attr, arg-type]
    assert loratools.inspect("hf://acme/science").sources[0].to_dict()["revision"] == first


def test_commits_are_recorded_in_the_record_and_on_the_card(hub: StandInHub) -> None:
    loratools.merge("acme/base", "acme/science", "merged")

    base, adapter = (next(iter(hub.repositories[name])) for name in ("acme/base", "acme/science"))
    record, card = json.loads(Path("merged/loratools.json").read_text()), Path("merged/README.md").read_text()
    assert record["base"]["path"] == f"hf://acme/base@{base}"
    assert record["adapters"][0]["path"] == f"hf://acme/science@{adapter}"
    assert f"`acme/base` at commit `{base}` and `acme/science` at commit `{adapter}`" in card
    assert "base_model:\n- acme/base\n- acme/science\n" in card


def test_extract_names_the_repository_as_its_base(hub: StandInHub) -> None:
    hub.publish("acme/bert", FIXTURES / "bert-tiny")

    loratools.extract("acme/bert", FIXTURES / "bert-tiny-tuned", "extracted", rank=4)

    config = json.loads(Path("extracted/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/bert"


@pytest.mark.parametrize(
    ("source", "error", "words", "hint"),
    [
        ("hf://acme/none", UsageError, "there is no repository 'acme/none' on the hub", "hf auth login"),
        (
            "acme/none",
            UsageError,
            "there is no file or folder 'acme/none'; as a repository of the hub",
            "hf auth login",
        ),
        ("hf://acme/science@v9", UsageError, "has no revision 'v9'", "tree/main"),
        ("hf://acme/science/step-5", UsageError, "there is no 'step-5'", "adapter_config.json"),
        ("hf://acme/closed", MachineError, "access to 'hf://acme/closed' must be granted", "hf auth login"),
    ],
)
def test_what_the_hub_refuses_has_its_reason_and_the_next_command(
    hub: StandInHub, source: str, error: type[LoraToolsError], words: str, hint: str
) -> None:
    hub.publish("acme/closed", ADAPTER)
    hub.gated.add("acme/closed")

    with pytest.raises(LoraToolsError) as raised:
        loratools.load(source)

    assert type(raised.value) is error
    assert words in raised.value.message
    assert hint in (raised.value.hint or "")


def test_too_many_requests_are_repeated_and_then_told(hub: StandInHub) -> None:
    hub.failures += [429, 503, 429]
    assert len(loratools.load("acme/science")) == 21

    hub.failures += [429] * 20
    with pytest.raises(MachineError, match="too many requests"):
        loratools.load("acme/base")


def test_cut_connections_are_asked_again(hub: StandInHub) -> None:
    hub.cuts = 2
    loratools.merge("acme/base", "acme/science", "merged", plan=True)
    hub.cuts = 1
    loratools.merge("acme/base", "acme/science", "merged")

    loratools.merge(BASE, ADAPTER, "here")
    assert files_of(Path("merged")) == files_of(Path("here"))


def test_a_hub_without_ranges_is_read_all_the_same(hub: StandInHub) -> None:
    hub.ignores_ranges = True

    assert modules_of("acme/science") == modules_of(ADAPTER)


def test_without_a_network_the_cache_is_used_and_that_is_said(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loratools.resize("acme/science", "first", rank=2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    done = CliRunner().invoke(verbs, ["resize", "acme/science", "-o", "second", "--rank", "2"])

    commit = next(iter(hub.repositories["acme/science"]))
    assert done.exit_code == 0
    assert f"hf://acme/science is commit {commit}, as it is in the hub's cache, because" in done.stderr
    assert files_of(Path("first")) == files_of(Path("second"))
    with pytest.raises(MachineError, match="could not be reached"):
        loratools.load("hf://acme/base")


def test_offline_asks_nothing(hub: StandInHub) -> None:
    loratools.resize("acme/science", "first", rank=2)
    asked = len(hub.requests)

    done = CliRunner().invoke(verbs, ["resize", "acme/science", "-o", "second", "--rank", "2", "--offline"])
    missing = CliRunner().invoke(verbs, ["inspect", "hf://acme/base", "--offline"])
    bare = CliRunner().invoke(verbs, ["inspect", "acme/base", "--offline"])

    assert done.exit_code == 0
    assert files_of(Path("first")) == files_of(Path("second"))
    assert (missing.exit_code, bare.exit_code) == (5, 2)
    assert "'hf://acme/base' is not in the hub's cache" in missing.stderr
    assert "hint: with a network: hf download acme/base" in missing.stderr
    assert len(hub.requests) == asked


def test_token_is_sent_and_never_printed(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    hub.publish("acme/closed", ADAPTER)
    hub.gated.add("acme/closed")

    done = CliRunner().invoke(verbs, ["inspect", "acme/closed", "--debug"])

    assert hub.requests[0].token == "Bearer hf_secretsecretsecret"
    assert done.exit_code == 5
    assert "secretsecret" not in done.output + done.stderr


def test_a_hostile_list_of_files_is_refused(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a\\..\\b").write_bytes(b"x")
    hub.publish("acme/odd", tmp_path / "odd")

    with pytest.raises(LoraToolsError, match="cannot be understood"):
        loratools.load("acme/odd")


def test_a_listener_is_told_of_revisions_and_downloads(hub: StandInHub) -> None:
    from contextlib import contextmanager

    pinned, downloads = [], {}

    class Noting:
        def pinned(self, address: str, commit: str, note: str | None) -> None:
            pinned.append((address, commit, note))

        @contextmanager
        def downloading(self, name: str, nbytes: int):  # type: ignore[no-untyped-def]
            steps: list[int] = []
            yield steps.append
            downloads[name.rpartition("/")[2]] = (nbytes, sum(steps))

    token = listener.listener.set(Noting())
    try:
        loratools.resize("acme/science", "small", rank=2)
    finally:
        listener.listener.reset(token)

    size = (ADAPTER / "adapter_model.safetensors").stat().st_size
    assert pinned == [("hf://acme/science", next(iter(hub.repositories["acme/science"])), None)]
    assert downloads["adapter_model.safetensors"] == (size, size)


def test_command_line_in_processes_gives_the_same_bytes_and_exit_codes(hub: StandInHub, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loratools", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    merged = run("merge", "hf://acme/base", "hf://acme/science=0.5", "-o", "merged", "--json")
    absent = run("inspect", "acme/none", "--json")
    loratools.merge(BASE, [(ADAPTER, 0.5)], "here")

    commit = next(iter(hub.repositories["acme/science"]))
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["adapters"] == [{"path": f"hf://acme/science@{commit}", "weight": 0.5}]
    assert f"hf://acme/science is commit {commit}\n" in merged.stderr
    assert files_of(Path("merged")) == files_of(Path("here"))
    assert absent.returncode == 2
    assert json.loads(absent.stdout)["error"]["code"] == "usage"
