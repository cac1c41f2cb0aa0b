"""check: folders are searched to the bottom, findings can be chosen and known ones left out, and broken is no error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import click.testing
import factories
import pytest
import torch
from check_samples import HOME, SAMPLES, edited, sound, with_tensors
from safetensors.torch import save_file

import loratools
from loratools.cli import verbs
from loratools.errors import UsageError

FIXTURES = Path(__file__).parents[3] / "fixtures"


def ids(report: loratools.CheckReport) -> list[str]:
    return [finding.id for finding in report.findings]


def run(*args: str | Path) -> click.testing.Result:
    return click.testing.CliRunner().invoke(verbs, ["check", *map(str, args)])


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder with a sound adapter, one with a warning, a broken file and a model, in folders of their own."""
    sound(tmp_path / "library" / "good")
    edited(sound(tmp_path / "library" / "deep" / "er", seed=1), base_model_name_or_path=f"{HOME}/llama")
    (tmp_path / "library" / "broken.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    factories.checkpoint_folder(tmp_path / "library" / "model")
    return tmp_path / "library"


def test_folder_is_searched_to_the_bottom(library: Path) -> None:
    report = loratools.check(library)

    found = {
        Path(source.path).relative_to(library).as_posix(): [f.id for f in source.findings] for source in report.sources
    }
    assert found == {
        "broken.safetensors": ["container-type"],
        "deep/er/adapter": ["paths-base"],
        "good/adapter": [],
        "model": [],
    }


def test_broken_file_is_a_finding_and_a_missing_one_is_wrong_usage(library: Path) -> None:
    assert run(library / "broken.safetensors").exit_code == 1

    missing = run(library / "nothing")
    assert missing.exit_code == 2
    assert "does not exist" in missing.stderr


def test_processes_and_threads_find_the_same(library: Path) -> None:
    assert loratools.check(library, execution="forked", threads=2) == loratools.check(library, threads=1)


def test_notes_do_not_count(tmp_path: Path) -> None:
    note = SAMPLES["config-alpha-assumed"](tmp_path / "note").sources[0]
    warning = SAMPLES["paths-base"](tmp_path / "warning").sources[0]

    assert run(note).exit_code == 0
    assert "note[config-alpha-assumed]" in run(note).stdout
    assert run(warning).exit_code == 1


def test_rules_are_chosen_by_id_and_by_family(tmp_path: Path) -> None:
    folder = edited(sound(tmp_path), base_model_name_or_path=f"{HOME}/llama", lora_alpha=4096)

    assert ids(loratools.check(folder)) == ["paths-base", "config-scale"]
    assert ids(loratools.check(folder, select=["config"])) == ["config-scale"]
    assert ids(loratools.check(folder, select=["config", "paths-base"], ignore=["config-scale"])) == ["paths-base"]
    assert run(folder, "--ignore", "paths,config-scale").exit_code == 0


def test_unknown_rule_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no rule named 'container-trunkated'") as caught:
        loratools.check(FIXTURES / "llama-tiny-science", select=["container-trunkated"])

    assert caught.value.details[0] == "container-truncated"


def test_without_values_a_value_that_is_not_finite_is_not_seen(tmp_path: Path) -> None:
    folder = SAMPLES["numerics-non-finite"](tmp_path).sources[0]

    assert ids(loratools.check(folder, values=False)) == []
    assert run(folder, "--no-values").exit_code == 0


def test_values_of_a_model_are_read_too(tmp_path: Path) -> None:
    weights = factories.base_weights()
    weights["model.norm.weight"][2] = torch.inf
    folder = factories.checkpoint_folder(tmp_path / "model", weights=weights)

    (finding,) = loratools.check(folder).findings

    assert (finding.id, finding.evidence) == ("numerics-non-finite", ("model.norm.weight: 1",))


def test_findings_in_the_baseline_are_left_out_wherever_the_folder_lies(library: Path, tmp_path: Path) -> None:
    written = run(library, "--write-baseline", library / "known.json")
    library.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"

    known = run(moved, "--baseline", moved / "known.json")
    edited(moved / "good" / "adapter", lora_alpha=4096)
    new = loratools.check(moved, baseline=moved / "known.json")

    assert written.exit_code == 1
    assert (known.exit_code, known.stdout) == (0, "")
    assert "2 in the baseline" in known.stderr
    assert ids(new) == ["config-scale"]


@pytest.mark.parametrize("text", ["[]", '{"findings": [{"id": 3}]}', "no JSON"])
def test_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "known.json").write_text(text, encoding="utf-8")

    assert run(sound(tmp_path), "--baseline", tmp_path / "known.json").exit_code == 4


def test_baseline_replaces_a_baseline_and_no_other_file(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    before = (folder / "adapter_model.safetensors").read_bytes()

    refused = run(folder, "--write-baseline", folder / "adapter_model.safetensors")
    first = run(folder, "--write-baseline", tmp_path / "known.json")
    again = run(folder, "--write-baseline", tmp_path / "known.json")

    assert (refused.exit_code, first.exit_code, again.exit_code) == (2, 0, 0)
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_json_document_has_the_fields_of_the_contract(library: Path) -> None:
    done = run(library, "--json")

    document = json.loads(done.stdout)
    assert done.exit_code == 1
    assert run(library, "--format", "json").stdout == done.stdout
    assert [set(source) for source in document["sources"]] == [{"path", "findings", "baselined", "not_checked"}] * 4
    (finding,) = document["sources"][0]["findings"]
    assert set(finding) == {"id", "severity", "message", "evidence", "fix"}


def test_json_and_another_format_exclude_each_other(library: Path) -> None:
    assert run(library, "--json", "--format", "junit").exit_code == 2


def test_sarif_has_what_its_schema_requires(library: Path) -> None:
    document = json.loads(run(library, "--format", "sarif").stdout)

    # Required by the schema of SARIF 2.1.0: version and runs; tool.driver.name; of a rule its id, of a result a message
    # with a text. Level and ruleIndex have to be of the values and in the range that it names.
    assert document["version"] == "2.1.0"
    assert set(document) == {"$schema", "version", "runs"}
    (entry,) = document["runs"]
    driver = entry["tool"]["driver"]
    rules = driver["rules"]
    assert driver["name"] == "loratools"
    assert [rule["id"] for rule in rules] == [rule.id for rule in loratools.list_rules()]
    assert {rule["defaultConfiguration"]["level"] for rule in rules} <= {"none", "note", "warning", "error"}
    assert all(rule[part]["text"] for rule in rules for part in ("shortDescription", "fullDescription", "help"))
    assert {result["ruleId"] for result in entry["results"]} == {"container-type", "paths-base"}
    for result in entry["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert uri.startswith("file:///")
        assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
    assert entry["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")


# Of the objects of SARIF 2.1.0 that are written here: the properties that the specification requires, and those others
# that are used. Its schema allows no further ones.
SARIF_OBJECTS: dict[str, tuple[set[str], set[str]]] = {
    "log": ({"version", "runs"}, {"$schema"}),
    "run": ({"tool"}, {"invocations", "results", "columnKind"}),
    "invocation": ({"executionSuccessful"}, {"exitCode", "toolExecutionNotifications"}),
    "notification": ({"message"}, {"associatedRule", "level", "locations"}),
    "reportingDescriptor": (
        {"id"}, {"shortDescription", "fullDescription", "help", "defaultConfiguration", "properties"},
    ),
    "result": ({"message"}, {"ruleId", "ruleIndex", "level", "locations", "partialFingerprints"}),
}  # fmt: skip


def ensure_sarif(kind: str, entry: dict[str, object]) -> None:
    required, others = SARIF_OBJECTS[kind]
    assert required <= set(entry) <= required | others, kind


def test_sarif_has_no_properties_but_those_of_the_specification(library: Path) -> None:
    document = json.loads(run(library, "--format", "sarif").stdout)

    ensure_sarif("log", document)
    (entry,) = document["runs"]
    ensure_sarif("run", entry)
    for rule in entry["tool"]["driver"]["rules"]:
        ensure_sarif("reportingDescriptor", rule)
    for result in entry["results"]:
        ensure_sarif("result", result)


def test_sarif_says_what_could_not_be_looked_at_as_notifications_of_the_run(tmp_path: Path) -> None:
    regex = sound(tmp_path / "regex", config={"target_modules": ".*self_attn.(q|v)_proj"})

    done = run(regex, sound(tmp_path / "list", seed=4), "--format", "sarif")

    (entry,) = json.loads(done.stdout)["runs"]
    (invocation,) = entry["invocations"]
    ensure_sarif("invocation", invocation)
    notifications = invocation["toolExecutionNotifications"]
    why = "target_modules is a text that PEFT expands, and no list of names"
    assert (done.exit_code, invocation["exitCode"], invocation["executionSuccessful"]) == (0, 0, True)
    assert [each["associatedRule"]["id"] for each in notifications] == ["config-targets", "config-targets-unused"]
    for each in notifications:
        ensure_sarif("notification", each)
        rule = each["associatedRule"]
        assert entry["tool"]["driver"]["rules"][rule["index"]]["id"] == rule["id"]
        assert each["level"] == "note"
        assert each["message"]["text"] == f"not checked: {why}"
        assert each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == regex.as_uri()


def test_sarif_of_findings_has_their_exit_code(library: Path) -> None:
    done = run(library, "--format", "sarif")

    (invocation,) = json.loads(done.stdout)["runs"][0]["invocations"]
    assert (done.exit_code, invocation["exitCode"], invocation["executionSuccessful"]) == (1, 1, True)


def test_junit_has_a_skipped_test_for_what_could_not_be_looked_at(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(10)}
    modules = {"model.layers.0.self_attn.q_proj": (10, 6)}
    folder = sound(tmp_path, modules=modules, extra=extra, config={"use_dora": True, "target_modules": ["q_proj"]})

    root = ElementTree.fromstring(run(folder, "--format", "junit", "--select", "numerics-outlier").stdout)

    (suite,) = root
    assert (root.get("tests"), suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "2", "0", "1")
    no_findings, skipped = suite
    assert (no_findings.get("name"), skipped.get("name")) == ("no findings", "numerics-outlier")
    (reason,) = skipped
    assert reason.tag == "skipped"
    assert reason.get("message") == "not checked: their updates are not known as products of two factors"
    assert reason.text == "model.layers.0.self_attn.q_proj"


def test_junit_has_a_failed_test_for_each_finding_that_counts(library: Path, tmp_path: Path) -> None:
    note = edited(sound(tmp_path / "note", seed=2), lora_alpha=None)

    root = ElementTree.fromstring(run(library, note, "--format", "junit").stdout)

    failed = [(case.get("name"), case.find("failure")) for case in root.iter("testcase")]
    assert root.tag == "testsuites"
    assert [(name, failure.get("type")) for name, failure in failed if failure is not None] == [
        ("container-type", "error"),
        ("paths-base", "warning"),
    ]
    assert (root.get("tests"), root.get("failures")) == ("5", "2")
    assert [suite.get("tests") for suite in root] == ["1"] * 5


def test_names_from_files_are_escaped_in_every_format(tmp_path: Path) -> None:
    folder = sound(tmp_path, prefix="base_model.model.\x1b[31m")

    with_tensors(folder, lambda tensors: dict(list(tensors.items())[1:]))

    text, junit, sarif = (run(folder, "--format", how).stdout for how in ("text", "junit", "sarif"))

    assert "keys-half-pair" in text
    assert "\x1b" not in text + junit + sarif
    ElementTree.fromstring(junit)
    json.loads(sarif)


def test_without_values_neither_torch_nor_numpy_is_imported() -> None:
    code = (
        "import sys; from loratools.cli import verbs\n"
        "try:\n    verbs.main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    args = ["check", str(FIXTURES / "llama-tiny-science"), "--no-values"]

    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.strip() == "set()"


def test_fingerprints_do_not_take_unlike_adapters_for_the_same(tmp_path: Path) -> None:
    first, second = sound(tmp_path / "first"), sound(tmp_path / "second", seed=5)

    assert loratools.check(first, second).findings == ()


def test_program_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program named 'vlm'; there are: comfyui, diffusers"):
        loratools.check(sound(tmp_path), program="vlm")


@pytest.mark.parametrize("server", ["vllm", "sglang", "tgi", "lorax", "tensorrt-llm"])
def test_what_convert_writes_for_a_server_has_no_findings_for_it(tmp_path: Path, server: str) -> None:
    ranks = {"model.layers.0.self_attn.q_proj": 2}
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    uneven = sound(tmp_path, ranks=ranks, config=patterns)
    loratools.convert(uneven, tmp_path / "served", format="peft", serve=server)

    before = loratools.check(uneven, program=server, select=["server"])
    after = loratools.check(tmp_path / "served", program=server, select=["server"])

    # TensorRT-LLM divides by each module's rank, so that only the pattern of alpha is lost there.
    assert ids(before) == ["server-scale"]
    assert after.findings == ()


def test_image_file_of_kohya_has_no_findings_for_comfyui(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(3, 768, generator=generator),
        f"{name}.lora_up.weight": torch.randn(640, 3, generator=generator),
        f"{name}.alpha": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "ink.safetensors")

    assert loratools.check(tmp_path / "ink.safetensors", program="comfyui").findings == ()
