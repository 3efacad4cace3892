"""Specifications: YAML there and back, flags win, and every mistake named in one line."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swlora.config import DataSpec, RunSpec, dump_yaml, load_spec
from swlora.config.fields import join_list, split_list
from swlora.errors import UserError


def refusal(tmp_path: Path, text: str | bytes = "", **overrides: object) -> str:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    with pytest.raises(UserError) as refused:
        load_spec(path, dotted)
    assert refused.value.exit_code == 2
    assert len(str(refused.value).splitlines()) == 1
    assert str(path) in str(refused.value) or overrides
    return str(refused.value)


def test_nothing_given_is_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_spec(None, {}) == load_spec(tmp_path / "empty.yaml", {}) == RunSpec()
    assert load_spec(None, {"adapter.rank": None, "seed": None}) == RunSpec()
    spec = RunSpec()
    assert (spec.model.name, spec.data.name) == ("openai-community/gpt2", "tuetschek/e2e_nlg")
    assert (spec.adapter.rank, spec.adapter.alpha) == (4, 32)
    assert spec.adapter.targets == ["all-linear"]


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("adapter: {rank: 8, layers: 'last:2'}\nseed: 3\n")
    spec = load_spec(tmp_path / "c.yaml", {"adapter.rank": 16, "train.epochs": 2, "seed": None})
    assert (spec.adapter.rank, str(spec.adapter.layers), spec.train.epochs, spec.seed) == (
        16,
        "last:2",
        2,
        3,
    )


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, k_proj", ["q_proj", "k_proj"]),
        (["q_proj,k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]),
        (["q_proj", "", ","], ["q_proj"]),
    ],
)
def test_names_by_comma_and_by_repetition(given_, expected):
    assert split_list(given_) == expected
    assert load_spec(None, {"adapter.targets": given_}).adapter.targets == expected


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("2,11", "2,11"),
        (["2", "11"], "2,11"),
        (["2,11", "5"], "2,11,5"),
        (2, "2"),
        ([2, 11], "2,11"),
        (["last:3"], "last:3"),
    ],
)
def test_layers_by_comma_and_by_repetition(given_, expected):
    assert join_list(given_) == expected
    assert str(load_spec(None, {"adapter.layers": given_}).adapter.layers) == expected


def test_layers_in_yaml_need_no_quotes(tmp_path):
    for text, expected in (("2", "2"), ("[2, 11]", "2,11"), ("last:2", "last:2"), ("all", "all")):
        (tmp_path / "c.yaml").write_text(f"adapter: {{layers: {text}}}\n")
        assert str(load_spec(tmp_path / "c.yaml", {}).adapter.layers) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("'One, two.'", ["One, two."]), ("[One, 'two, three']", ["One", "two, three"]), ("[]", [])],
)
def test_prompts_are_one_or_many_and_may_hold_commas(text, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(f"identify: {{prompt: {text}}}\n")
    spec = load_spec(tmp_path / "c.yaml", {})
    assert spec.identify.prompt == expected
    (tmp_path / "again.yaml").write_text(dump_yaml(spec))
    assert load_spec(tmp_path / "again.yaml", {}) == spec
    assert "identify.prompt.1: " in refusal(tmp_path, "identify: {prompt: [a, '']}")


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {learning_rate: 2e-4}\n")  # YAML 1.1 wants 2.0e-4
    assert load_spec(tmp_path / "c.yaml", {}).train.learning_rate == 2e-4


# There and back

names = st.text(min_size=1, max_size=9).filter(lambda text: text.isprintable())
specs = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"name": names, "tokenizer": st.none() | names}),
        "data": st.fixed_dictionaries(
            {"eval_file": st.none() | st.just("a b/é.jsonl"), "truncate": st.booleans()}
        ),
        "adapter": st.fixed_dictionaries(
            {
                "rank": st.integers(1, 4096),
                "alpha": st.floats(1e-9, 1e9),
                "targets": st.lists(
                    st.sampled_from(["yes", "null", "1e3", "a: b", "é"]), min_size=1
                ),
                "layers": st.sampled_from(["0", "2,11", "last:3", "random:2:1", "every:2", "0,1"]),
            }
        ),
        "train": st.fixed_dictionaries({"learning_rate": st.floats(1e-12, 1)}),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=specs)
def test_what_is_written_is_read_back_equal(tree, tmp_path):
    spec = RunSpec.model_validate(tree)
    (tmp_path / "config.yaml").write_text(dump_yaml(spec), encoding="utf-8")
    assert load_spec(tmp_path / "config.yaml", {}) == spec


def test_the_written_file_names_every_setting():
    tree = yaml.safe_load(dump_yaml(RunSpec()))
    assert set(tree) == set(RunSpec.model_fields) - {"serve"}  # which is no part of a run
    for name, section in tree.items():
        if isinstance(section, dict):
            assert set(section) == set(getattr(RunSpec(), name).__class__.model_fields)


# Mistakes


@pytest.mark.parametrize(
    "text",
    [
        "adapter: {rank: 4",
        "a: b: c",
        "\tx: 1",
        "x: @y",
        "x: !!python/object:os.system {}",
        b"\xff\xfe\x00",
        b"x: \x00",
    ],
)
def test_text_that_is_no_yaml(text, tmp_path):
    assert "is not valid YAML" in refusal(tmp_path, text)


def test_the_place_where_yaml_ends_is_named(tmp_path):
    said = "c.yaml, line 2, column 8 is not valid YAML: mapping values are not allowed here"
    assert refusal(tmp_path, "seed: 1\na: b: c").endswith(said.replace("column 8", "column 5"))


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words", "3"])
def test_yaml_that_is_no_mapping(text, tmp_path):
    assert "must hold a mapping" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "adapter: {rnak: 4}",
            ["adapter.rnak: there is no such setting (do you mean adapter.rank?)"],
        ),
        ("adaptor: {rank: 4}", ["adaptor: there is no such setting (do you mean adapter?)"]),
        ("adapter: 4", ["adapter: must be a mapping of settings, not 4"]),
        ("adapter: {rank: 0, alpha: -1}", ["adapter.rank: ", "adapter.alpha: "]),
        ("adapter: {rank: four}", ["adapter.rank: must be a valid integer, not 'four'"]),
        ("adapter: {rank: 1.5}", ["adapter.rank: must be a valid integer, not 1.5"]),
        ("adapter: {dropout: 1}", ["adapter.dropout: "]),
        ("adapter: {targets: []}", ["adapter.targets: "]),
        ("adapter: {layers: ''}", ["adapter.layers: '' is not understood; use all, "]),
        ("adapter: {layers: {a: 1}}", ["adapter.layers: "]),
        ("adapter: {method: magic}", ["adapter.method: ", "'lora+'", "'supertuning'"]),
        ("adapter: {lora_plus_ratio: 8}", ["--method lora has no --lora-plus-ratio; leave"]),
        ("adapter: {method: lora+, lora_plus_ratio: 0.5}", ["adapter.lora_plus_ratio: "]),
        (
            "adapter: {method: full, rank: 8, alpha: 1}",
            ["--method full has no --alpha, no --rank; "],
        ),
        ("adapter: {method: full, dropout: 0.1}", ["--method full has no --dropout; "]),
        ("adapter: {method: supertuning, rank: 8}", ["--method supertuning has no --rank; "]),
        ("adapter: {method: supertuning, sparsity: 1}", ["adapter.sparsity: "]),
        ("adapter: {method: pissa, sparsity: 0.5}", ["--method pissa has no --sparsity; "]),
        (
            "train: {eval_rows: 8, eval_every_steps: 0}",
            ["--eval-rows needs held-out losses; --eval-every-steps 0 measures none"],
        ),
        (
            "train: {early_stopping: 2, eval_every_steps: 0}",
            ["--early-stopping needs held-out losses"],
        ),
        ("train: {eval_every_steps: -1}", ["train.eval_every_steps: "]),
        ("train: {learning_rate: .nan}", ["train.learning_rate: "]),
        ("train: {learning_rate: .inf}", ["train.learning_rate: "]),
        ("train: {epochs: 0, batch_size: 0}", ["train.epochs: ", "train.batch_size: "]),
        ("train: {schedule: step}", ["train.schedule: ", "'linear', 'cosine' or 'constant'"]),
        ("model: {name: ''}", ["model.name: "]),
        ("model: {tokenizer: ''}", ["model.tokenizer: "]),
        (
            "model: {device: gpu}",
            ["model.device: must be auto, cpu, cuda or cuda:N, not 'gpu'"],
        ),
        ("model: {device: mps}", ["model.device: Apple's GPU has no float64"]),
        ("model: {dtype: float16}", ["model.dtype: ", "'auto', 'float32' or 'bfloat16'"]),
        ("data: {eval_split: train}", ["data.eval_split: "]),
        ("decode: {num_beams: 4, temperature: 1}", ["--num-beams above 1 needs --temperature 0"]),
        (
            "decode: {length_penalty: 0.9}",
            ["--length-penalty ranks beams: it needs --num-beams above 1"],
        ),
        ("seed: -1", ["seed: "]),
        ("seed: 4294967296", ["seed: "]),
        ("1: 2", ["1: "]),
    ],
)
def test_impossible_settings(text, said, tmp_path):
    message = refusal(tmp_path, text)
    assert message.startswith(f"in {tmp_path / 'c.yaml'}: ")
    assert all(part in message for part in said)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora+", "lora_plus_ratio": 8, "rank": 2},
        {"method": "supertuning", "sparsity": 0.5},
        {"method": "full", "layers": "last:2", "targets": ["down_proj"]},
        {"method": "adalora", "rank": 8, "alpha": 16, "dropout": 0.1},
        {"method": "rslora", "rank": 64},
    ],
)
def test_settings_that_belong_to_the_method(adapter, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"adapter": adapter}))
    spec = load_spec(tmp_path / "c.yaml", {})
    assert spec.adapter.model_dump(include=set(adapter)) == adapter
    (tmp_path / "again.yaml").write_text(dump_yaml(spec))
    assert load_spec(tmp_path / "again.yaml", {}) == spec


def test_all_problems_of_file_and_flags_come_at_once(tmp_path):
    message = refusal(tmp_path, "foo: 1\nadapter: {alpha: 0}\n", adapter__rank=0)
    assert message == (
        "--rank: must be greater than or equal to 1, not 0; "
        f"in {tmp_path / 'c.yaml'}: adapter.alpha: must be greater than 0, not 0; "
        "foo: there is no such setting"
    )
    with pytest.raises(UserError, match=r"^--rank: must be greater than or equal to 1, not 0$"):
        load_spec(None, {"adapter.rank": 0})


@pytest.mark.parametrize(
    ("path", "flag"),
    [
        ("model.name", "--model"),
        ("data.name", "--dataset"),
        ("data.eval_split", "--split"),
        ("decode.batch_size", "--eval-batch-size"),
        ("train.learning_rate", "--learning-rate"),
        ("seed", "--seed"),
    ],
)
def test_a_flag_is_called_by_its_name(path, flag):
    with pytest.raises(UserError, match=f"^{flag}: "):
        load_spec(None, {path: {}})


def test_an_entry_of_a_list_is_called_by_its_flag():
    with pytest.raises(UserError, match=r"^--prompt: must have at least 1 character, not ''$"):
        load_spec(None, {"identify.prompt": ["One", ""]})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("rank: 4", "adapter.rank"),
        ("train: {learning-rate: 1}", "train.learning_rate"),
        ("train: {lr_schedule: cosine}", "train.schedule"),
        ("adapter: {epochs: 3}", "train.epochs"),
        ("data: {split: dev}", "data.eval_split"),
        ("dataset: rows.csv", "data.name"),
        ("train: {evalfile: x}", "data.eval_file"),
        ("batch_size: 4", "train.batch_size or decode.batch_size"),
    ],
)
def test_the_nearest_setting_is_named_with_its_place(text, meant, tmp_path):
    assert refusal(tmp_path, text).endswith(f"there is no such setting (do you mean {meant}?)")


def test_a_secret_is_not_shown(tmp_path):
    message = refusal(tmp_path, "serve: {api_key: 31415926}")
    assert message.endswith("serve.api_key: must be a valid string, not what was given")


def test_a_setting_that_is_like_no_other_gets_no_guess(tmp_path):
    assert refusal(tmp_path, "zzz: 1").endswith("zzz: there is no such setting")


def test_a_flag_for_a_section_that_is_no_mapping(tmp_path):
    assert "'adapter' must be a mapping" in refusal(tmp_path, "adapter: 4", adapter__rank=2)


def test_a_section_whose_settings_are_all_commented_out(tmp_path):
    (tmp_path / "c.yaml").write_text("adapter:\n#  rank: 8\ntrain:\n")
    assert load_spec(tmp_path / "c.yaml", {}) == RunSpec()
    assert load_spec(tmp_path / "c.yaml", {"adapter.rank": 2}).adapter.rank == 2


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot read the configuration"):
            load_spec(path, {})


def test_specs_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().seed = 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"columns": ["prompt=a", "prompt=b"]}, "the field 'prompt' is named twice"),
        ({"columns": ["prompt=a", "completion=a"]}, "the column 'a' is named twice"),
        (
            {"columns": ["prompt=a"], "prompt_column": "b"},
            "prompt=a and --prompt-column b disagree",
        ),
    ],
)
def test_a_column_is_named_once(settings, said):
    with pytest.raises(ValueError, match=said):
        DataSpec(**settings)


SHARED = "\n".join(
    [f"a0: &a0 [{', '.join('0' * 10)}]"]
    + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 6)]
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: " + "[" * 80 + "]" * 80, "deeper than 64 levels"),
        (f"seed: {'9' * 5000}", "is not valid YAML: Exceeds the limit"),
        (SHARED, "more than 100,000 values"),
        ("# " + "x" * (4 << 20), "longer than 4,194,304 bytes"),
        (b"\xff\xfe\x00", "is not valid YAML"),
    ],
    ids=["deep", "digits", "aliases", "long", "no text"],
)
def test_a_configuration_out_of_all_proportion_is_one_line(text, reason, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=reason) as refused:
        load_spec(path, {})
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 400


def test_merge_keys_are_refused_before_they_are_copied(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {rank: 2}\nadapter: {<<: *a}\n")
    with pytest.raises(UserError, match=r"c\.yaml, line 2.*merge keys \(<<\) are not read"):
        load_spec(tmp_path / "c.yaml", {})


def test_a_configuration_may_come_through_a_pipe():
    readable, writable = os.pipe()
    os.write(writable, b"seed: 5")
    os.close(writable)
    assert load_spec(Path(f"/dev/fd/{readable}"), {}).seed == 5
    os.close(readable)
