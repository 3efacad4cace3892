"""The report: the answer comes first, nothing that repeats it is missing, any text is only text."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swlora.config import IdentifySpec
from swlora.models.anatomy import Anatomy
from swlora.models.load import LoadedModel
from swlora.result_json import as_json
from swlora.superweights.effects import Generation
from swlora.superweights.findings import Identified, JudgedCandidate, KnownAgreement
from swlora.superweights.identify import identify
from swlora.superweights.known import Agreement
from swlora.superweights.report import COLUMNS, agreement, answer, number, publish, rows

NASTY = "a | b <script>x</script> `c` *d* [e](f)\n# g \\"


@pytest.fixture(scope="module")
def found(make_model, tiny_tokenizer) -> Identified:
    """The result of a tiny model with a massive activation and no super weight."""
    model = make_model("gpt2")
    Anatomy(model).projection(0, "mlp.c_proj").weight[5, 17] = 300.0
    loaded = LoadedModel(
        model, tiny_tokenizer, "some/model", "abc123", "some/model from the Hub", (257,)
    )
    spec = IdentifySpec(
        prompt=[NASTY, "two"], max_candidates=2, controls=3, windows=2, window_tokens=33
    )
    return identify(loaded, spec, seed=7)


@pytest.fixture
def proved(found) -> Identified:
    """The same, had the proof said so."""
    first, second = found.candidates
    shown = {"verdict": "super", "ratio": 2.5e7, "largest_control": 1.04, "interval": (2e7, 3.14e8)}
    candidates = (judged(first, **shown), second)
    return replace(found, candidates=candidates, layers=[0], removal_layers=[2])


def judged(candidate: JudgedCandidate, **changes: Any) -> JudgedCandidate:
    return replace(candidate, proof=replace(candidate.proof, **changes))


def report(result: Identified, folder: Path, figure: str = "superweights.png") -> str:
    published = publish(result, folder / "run", folder / figure)
    assert published.report == folder / "run" / "superweights.md"
    return (folder / "run" / "superweights.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Return every table as rows of cells, as a reader of Markdown splits them."""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    return [
        [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.split("\n")
            if line
        ]
        for block in blocks
    ]


def test_no_super_weight_is_the_first_thing_said(found, tmp_path):
    text = report(found, tmp_path)
    title, _, first, *_ = text.splitlines()
    assert title == "# Super weights of some/model from the Hub"
    assert first == (
        "- no super weight: setting any one candidate to zero barely matters in this model"
    )
    assert "all 2 candidates zeroed together: ratio " in text


@pytest.mark.parametrize("factor", [5.0, 4.75])
def test_a_ratio_that_controls_come_near_is_no_super_weight(found, factor):
    """What the candidate does is more than the control does, by less than the factor."""
    first, second = found.candidates
    first = judged(first, ratio=8.0, largest_control=1.57)  # 2.08 and 0.45 nats
    thresholds = replace(found.setup.thresholds, control_factor=factor)
    setup = replace(found.setup, thresholds=thresholds)
    said = answer(replace(found, candidates=(first, second), setup=setup))[0]
    assert said == (
        "no super weight: what the candidates do, in nats a token, is not more than "
        f"{factor:g} times what random weights of like size do"
    )


def test_super_weights_are_the_first_thing_said(proved, tmp_path):
    lines = report(proved, tmp_path).splitlines()
    assert lines[2] == "- layers with a verified super weight: 0"
    assert lines[3] == "- layers that take the super activation away again: 2"


def test_several_verified_ones_are_also_judged_together(proved):
    both = tuple(judged(c, verdict="strong") for c in proved.candidates)
    joint = replace(proved.joint, ratio=88.0, interval=(80.0, 90.0), verdict="super")
    said = answer(replace(proved, candidates=both, joint_proven=joint))
    assert "the 2 verified ones zeroed together: ratio 88.00 (80.00 to 90.00), super" in said
    assert not any("verified ones" in line for line in answer(proved))


def test_the_table_of_candidates(proved, tmp_path):
    text = report(proved, tmp_path)
    head, _, first, second = tables(text)[0]
    assert tuple(head) == COLUMNS
    assert "`control` the ratio of the one that matters most of 3 random weights of the" in text
    assert first[:5] == ["0", "mlp.c_proj", "17", "5", "300.000"]
    assert first[5:] == ["2.5e+07", "2.0e+07 to 3.1e+08", "1.04", "4/4", "super"]
    assert (second[7], second[9]) == ("-", "none")
    assert [tuple(first), tuple(second)] == rows(proved)


def test_all_that_repeats_it_is_there(found, tmp_path):
    text = report(found, tmp_path)
    facts = dict(tables(text)[-1])
    assert facts["model"] == "some/model from the Hub, revision abc123"
    assert facts["arithmetic"] == "float32 on cpu"
    said = "2 windows of 33 tokens, without BOS, as the tokenizer has it; sha256 of "
    assert said in facts["text"]
    with_bos = replace(found, setup=replace(found.setup, windows_begin_with_bos=True))
    with_bos = dict(tables(report(with_bos, tmp_path))[-1])
    assert said.replace("without", "each beginning with") in with_bos["text"]
    assert re.search(r"sha256 of the token ids [0-9a-f]{64}$", facts["text"])
    assert facts["seed"] == "7"
    assert facts["controls"] == "3 a candidate"
    assert facts["thresholds"] == "super 10, strong 1.5, control_factor 5, massive_ratio 30"
    for package in ("swlora", "torch", "transformers"):
        assert f"{package} {found.setup.packages[package]}" in facts["packages"]
    settings = next(table for table in tables(text) if table[0][:2] == ["prompt", "BOS"])
    assert [row[1] for row in settings[2:]] == ["no", "yes"] * 2


def test_text_of_models_and_users_is_text(found, tmp_path):
    """Nothing of it is read as a cell, a line, a link or HTML."""
    texts = (Generation(NASTY, before="\nx\r\n\x0b| \x00-\u2028|", after="   "),)
    written = replace(found, generations=replace(found.generations, texts=texts))
    text = report(written, tmp_path)
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}
    assert "<script>" not in text
    cells = next(table for table in tables(text) if table[0][1] == "as it is")[2]
    assert cells[0] == (r"a \| b &lt;script&gt;x&lt;/script&gt; \`c\` \*d\* \[e\](f)<br># g \\")
    assert cells[1:] == ["x<br><br>\\| \ufffd-<br>\\|", "(nothing)"]


def test_texts_that_are_missing_are_explained(found, tmp_path):
    without = replace(found, generations=replace(found.generations, texts=()))
    assert "no prompt leaves room" in report(without, tmp_path)


def test_figures_are_linked_from_where_the_report_lies(found, tmp_path):
    text = report(found, tmp_path, "else where/scan.svg")
    links = re.findall(r"^!\[[^\]]+\]\(<(.*)>\)$", text, flags=re.MULTILINE)
    assert links == [*("../else where/scan.svg", "superweights-path.svg", "superweights-dose.svg")]
    assert all((tmp_path / "run" / link).is_file() for link in links)


def test_the_result_with_its_paths_is_strict_json(found, tmp_path):
    whole = as_json(publish(found, tmp_path, tmp_path / "a.png"))
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert whole["figure"] == str(tmp_path / "a.png")
    assert {**whole, **as_json(found)} == whole
    assert set(whole) - set(as_json(found)) == {"figure", "figures", "report"}


NOTHING = Agreement([], [], [], [], [])


def test_what_was_published_is_said(found):
    assert answer(replace(found, known=KnownAgreement(NOTHING, "it agrees")))[-1] == "it agrees"


def test_agreement_over_prompts(found):
    """The planted weight is massive in all four settings, at one channel."""
    said = "massive activation in 4 of 4 settings (2 prompts, with and without BOS), at channel 17"
    first, second, *others = found.search.settings
    assert agreement([first, second, *others]) == said
    first = replace(first, is_massive=False)
    second = replace(second, activation=replace(second.activation, channel=3))
    assert agreement([first, second, *others]).endswith("at channel 3, channel 17")
    assert agreement([first]) == "no massive activation in 1 prompt"


@pytest.mark.parametrize(
    ("ratio", "shown"), [(1.0, "1.00"), (0.996, "1.00"), (99999.0, "99999.00"), (1e5, "1.0e+05")]
)
def test_ratios_are_short(ratio, shown):
    assert number(ratio) == shown
