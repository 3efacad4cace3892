"""How often a training is to be saved: read, refused, and when it is due."""

import pytest

from swlora.config import RunSpec, dump_yaml, load_spec
from swlora.config.save_every import SaveEvery, parse_save_every
from swlora.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500steps", SaveEvery(steps=500)),
        ("1 step", SaveEvery(steps=1)),
        ("30s", SaveEvery(seconds=30)),
        ("0.5min", SaveEvery(seconds=30)),
        (" 2h ", SaveEvery(seconds=7200)),
    ],
)
def test_it_is_read(text, expected):
    assert parse_save_every(text) == expected
    assert load_spec(None, {"train.save_every": text}).train.saving == expected


@pytest.mark.parametrize(
    "text", ["", "5", "min", "0s", "0steps", "-1s", "1.5steps", "5 minutes", "1e9s", "9" * 5000]
)
def test_what_is_no_such_text_is_one_line(text):
    with pytest.raises(
        UserError, match=r"--save-every.*(how often to save|no whole number)"
    ) as refused:
        load_spec(None, {"train.save_every": text})
    assert len(str(refused.value).splitlines()) == 1


def test_it_is_due_by_the_number_of_the_step_or_by_the_clock():
    by_step, by_clock = SaveEvery(steps=3), SaveEvery(seconds=10.0)
    assert [step for step in range(1, 10) if by_step.is_due(step, 1e9)] == [3, 6, 9]
    assert [by_clock.is_due(3, since_s) for since_s in (0.0, 10.0, 10.1)] == [False, False, True]


def test_the_flag_in_seconds_says_the_same_and_not_beside_it(tmp_path):
    assert RunSpec().train.saving == SaveEvery(seconds=300)
    seconds = load_spec(None, {"train.checkpoint_every_s": 7.5})
    assert seconds.train.saving == SaveEvery(seconds=7.5)
    (tmp_path / "c.yaml").write_text(dump_yaml(seconds))
    assert load_spec(tmp_path / "c.yaml", {}) == seconds
    replaced = load_spec(tmp_path / "c.yaml", {"train.save_every": "5min"})
    assert replaced.train.saving == SaveEvery(seconds=300), "a flag replaces what the file says"
    both = {"train.save_every": "5min", "train.checkpoint_every_s": 7.5}
    with pytest.raises(UserError, match="say the same; leave one of them out"):
        load_spec(None, both)
