"""Model cards of outputs: what the hub reads in them, equal bytes, nothing of this machine, and whose card stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import yaml
from cli_runner import CliRunner

import loratools
from loratools.cli import verbs
from loratools.ops.card.inputs import card_input, common_licence, without_folders
from loratools.ops.card.model_card import ModelCard

FIXTURES = Path(__file__).parents[3] / "fixtures"
BASE = FIXTURES / "llama-tiny"
SCIENCE = FIXTURES / "llama-tiny-science"
DIALOGUE = FIXTURES / "llama-tiny-dialogue"
VERBS: dict[str, Callable[[Path], object]] = {
    "merge": lambda out: loratools.merge(BASE, [(SCIENCE, 0.5)], out),
    "combine": lambda out: loratools.combine([(SCIENCE, 0.7), DIALOGUE], out, rank=8, dtype="bfloat16"),
    "resize": lambda out: loratools.resize(SCIENCE, out, rule=("sv_fro", 0.9)),
    "convert": lambda out: loratools.convert(SCIENCE, out, format="mlx"),
    "extract": lambda out: loratools.extract(FIXTURES / "bert-tiny", FIXTURES / "bert-tiny-tuned", out, rank=4),
}
COMMANDS = {
    "merge": "loratools merge llama-tiny llama-tiny-science=0.5 -o OUTPUT",
    "combine": "loratools combine llama-tiny-science=0.7 llama-tiny-dialogue -o OUTPUT --rank 8 --dtype bfloat16",
    "resize": "loratools resize llama-tiny-science -o OUTPUT --rule sv_fro=0.9",
    "convert": "loratools convert llama-tiny-science -o OUTPUT --to mlx",
    "extract": "loratools extract bert-tiny bert-tiny-tuned -o OUTPUT --rank 4",
}
LIBRARIES = {"merge": "transformers", "combine": "peft", "resize": "peft", "convert": "mlx", "extract": "peft"}


def head_of(text: str) -> dict[str, object]:
    _, head, _ = text.split("---\n", 2)
    loaded: dict[str, object] = yaml.safe_load(head)
    return loaded


@pytest.fixture(scope="module", params=VERBS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param) / "out"
    VERBS[request.param](out)
    return request.param, out


def test_card_has_what_the_hub_reads_and_the_command(written: tuple[str, Path]) -> None:
    verb, out = written

    text = (out / "README.md").read_text(encoding="utf-8")

    base = "bert-tiny" if verb == "extract" else "llama-tiny"
    relation = "merge" if verb == "merge" else "adapter"
    tags = ["lora", "loratools", "merge"] if verb == "merge" else ["adapter", "lora", "loratools"]
    assert head_of(text) == {
        "base_model": base,
        "base_model_relation": relation,
        "library_name": LIBRARIES[verb],
        "tags": tags,
    }
    assert f"```sh\n{COMMANDS[verb]}\n```" in text
    assert f"\nloratools {loratools.__version__}" in text
    assert str(FIXTURES) not in text
    assert str(out.parent) not in text


def test_hub_reads_the_head_of_the_card(written: tuple[str, Path]) -> None:
    # Of transformers, which the tests need.
    from huggingface_hub import ModelCard as HubCard

    _, out = written

    data = HubCard.load(out / "README.md").data

    assert data.base_model in ("llama-tiny", "bert-tiny")
    assert data.tags is not None
    assert "loratools" in data.tags


def test_equal_inputs_give_an_equal_card_under_another_name(written: tuple[str, Path], tmp_path: Path) -> None:
    verb, out = written

    VERBS[verb](tmp_path / "another name")

    assert (tmp_path / "another name" / "README.md").read_bytes() == (out / "README.md").read_bytes()


def test_card_is_in_the_record_of_the_output(written: tuple[str, Path]) -> None:
    _, out = written

    report = loratools.verify_files(out)

    assert ("README.md", "same") in {(file.name, file.state) for file in report.files}


def test_date_is_that_of_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "951782400")  # 29 February 2000, midnight UTC

    loratools.resize(SCIENCE, tmp_path / "out", rank=4)

    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8").endswith(", 2000-02-29\n")


def test_command_line_and_call_give_equal_cards(tmp_path: Path) -> None:
    loratools.resize(SCIENCE, tmp_path / "call", energy=0.5, dtype="float16", exclude=["*v_proj"])
    command = ["resize", str(SCIENCE), "-o", str(tmp_path / "cli"), "--energy", "0.5", "--dtype", "float16"]

    done = CliRunner().invoke(verbs, [*command, "--exclude", "*v_proj"])

    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "cli" / "README.md").read_bytes() == (tmp_path / "call" / "README.md").read_bytes()
    assert "--energy 0.5 --dtype float16 --exclude '*v_proj'" in (tmp_path / "cli" / "README.md").read_text()


def test_no_card_writes_none_and_the_bases_own_comes_along(tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    (base / "README.md").write_text("# The base", encoding="utf-8")
    adapter = factories.adapter_folder(tmp_path / "style")

    loratools.merge(base, [adapter], tmp_path / "with")
    done = CliRunner().invoke(verbs, ["merge", str(base), str(adapter), "-o", str(tmp_path / "without"), "--no-card"])

    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "without" / "README.md").read_text() == "# The base"
    assert "# base with style" in (tmp_path / "with" / "README.md").read_text()
    loratools.resize(adapter, tmp_path / "resized", rank=2, card=False)
    assert not (tmp_path / "resized" / "README.md").exists()


@pytest.mark.parametrize("verb", ["merge", "resize"])
def test_card_of_a_person_stays_when_the_output_is_replaced(verb: str, tmp_path: Path) -> None:
    base = factories.checkpoint_folder(tmp_path / "base")
    adapter, out = factories.adapter_folder(tmp_path / "style"), tmp_path / "out"

    def write(*, overwrite: bool) -> object:
        if verb == "merge":
            return loratools.merge(base, [adapter], out, overwrite=overwrite)
        return loratools.resize(adapter, out, rank=2, overwrite=overwrite)

    write(overwrite=False)
    write(overwrite=True)
    assert "Made with loratools" in (out / "README.md").read_text()
    (out / "README.md").write_text("# Mine", encoding="utf-8")

    write(overwrite=True)

    assert (out / "README.md").read_text() == "# Mine"


def card(folder: Path, head: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{head}\n---\n# A model\n", encoding="utf-8")
    return folder


def test_licence_of_all_inputs_is_that_of_the_output(tmp_path: Path) -> None:
    head = "license: other\nlicense_name: llama3\nlicense_link: LICENSE"
    inputs = [card_input(card(tmp_path / name, head)) for name in ("a", "b")]

    assert common_licence(inputs).fields == {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}


def test_licences_that_contradict_give_none_and_a_sentence(tmp_path: Path) -> None:
    inputs = [card_input(card(tmp_path / "a", "license: mit")), card_input(card(tmp_path / "b", "license: apache-2.0"))]

    licence = common_licence(inputs)

    assert licence.fields == {}
    assert licence.sentence == "The inputs have different licences (a: mit, b: apache-2.0), so none is stated here."


@pytest.mark.parametrize("head", ["", "license:", "license: [mit]", "a: &a [*a]", "{", "- x", "license: !!python/x y"])
def test_silent_or_broken_card_gives_no_licence(head: str, tmp_path: Path) -> None:
    inputs = [card_input(card(tmp_path / "a", "license: mit")), card_input(card(tmp_path / "b", head))]

    licence = common_licence(inputs)

    assert licence.fields == {}
    assert licence.sentence == "Not all inputs state a licence (silent: b), so none is stated here."


def test_input_of_the_hubs_cache_has_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--meta-llama--Llama-3-8B" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)

    assert card_input(snapshot).name == "meta-llama/Llama-3-8B"
    assert card_input(snapshot / "model.safetensors").name == "meta-llama/Llama-3-8B"
    assert card_input(tmp_path / "mine").name == "mine"


def test_warning_has_no_folder_of_this_machine(tmp_path: Path) -> None:
    # In two pieces, as no file here names such a folder.
    elsewhere = "/home" + "/me/models/llama"
    text = f"'{tmp_path}/a b/style': trained on '{elsewhere}', see https://host/x/y and a/b"

    assert without_folders(text, [tmp_path / "a b/style"]) == (
        "'style': trained on 'llama', see https://host/x/y and a/b"
    )


def test_names_cannot_break_out_of_the_card() -> None:
    name = "a`b\n---\n# <script>|x|"

    text = ModelCard(
        title=name,
        base_models=(name, name),
        relation="merge",
        library=None,
        tags=(),
        inputs=(card_input(None, name),),
        command=f"loratools merge {name}",
        facts=((name, name),),
        warnings=(name, "```"),
    ).text()

    escaped = "a`b\\n---\\n# <script>|x|"
    assert head_of(text) == {"base_model": escaped, "base_model_relation": "merge", "tags": ["loratools"]}
    body = text.split("---\n", 2)[2]
    assert body.count("\n# ") == 1
    assert "<script>" not in body.replace("`a'b\\n---\\n# <script>|x|`", "")
    assert body.count("```") == 2
