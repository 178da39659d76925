"""Every mistake in a config file is one message that names the key, the rule and the value."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.config import Config, load_config
from stages.errors import UserError
from stages.method_config import BUILT_IN, PesoConfig

BASE = 'name = "shop"\nworkspace = "w"\n[log]\nkind = "sequences"\nsequences = "log.txt"\n'


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("[evaluation]\nbeem = 3\n", "unknown key 'evaluation.beem'; did you mean 'beam'?"),
        ("[evaluation]\nbeam = 5\n", "evaluation.beam (5) is below evaluation.k (20)"),
        ("[adapter]\nrank = 0\n", "adapter.rank: Input should be greater than or equal to 1 (got 0)"),
        ('[methods.m]\nmethod = "peso"\nstrength = -1.0\n', "strength: Input should be greater than or equal to 0"),
        ('[methods.m]\nmethod = "peso"\nstrength = nan\n', "strength"),
        ('[methods.m]\nmethod = "peso"\nscale = "sise"\n', "scale: Input should be 'none' or 'size' (got 'sise')"),
        ('[methods.m]\nmethod = "cumulative_sum"\ninherit = true\n', "would count the last adapter twice"),
        ("[stages]\nfractions = [0.5, 0.6]\n", "stages.fractions must sum to 1, got 1.1"),
        ('[stages]\nperiod = "1w"\nfractions = [1.0]\n', "stages has fractions and period; keep one boundary rule"),
        ('[stages]\ninstants = ["2011-02-01", "2011-01-01"]\n', "stages.instants must rise strictly"),
        ('[items]\nindex = "shipped"\n', 'items.index = "shipped" needs log.index'),
        ("[training]\nepochs = 2\nepoch = 3\n", "unknown key 'training.epoch'; did you mean 'epochs'?"),
        ("[training]\nlearning_rate = -1e-3\n", "training.learning_rate: Input should be greater than 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(tmp_path: Path, tail: str, said: str) -> None:
    assert said in refused(tmp_path, BASE + tail)


def test_broken_toml_and_a_missing_file_are_said_plainly(tmp_path: Path) -> None:
    assert "not a readable TOML file" in refused(tmp_path, "name = = 3")
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "nowhere.toml")


def test_source_paths_start_at_the_config_file_and_variables_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    assert load_config(path).log.sequences == str(tmp_path / "log.txt")
    monkeypatch.setenv("DRIFTREC_DATA", "/somewhere")
    path.write_text(BASE.replace("log.txt", "$DRIFTREC_DATA/x/log.txt"))
    assert load_config(path).log.sequences == "/somewhere/x/log.txt"
    path.write_text(BASE.replace("log.txt", "$NOT_SET_ANYWHERE/log.txt"))
    with pytest.raises(UserError, match="is not set"):
        load_config(path)


def test_methods_are_chosen_by_their_whole_name_and_may_be_redefined(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(BASE + '[methods.mine]\nmethod = "peso"\nstrength = 7.0\n[methods.peso]\nmethod = "peso"\n')
    config = load_config(path)
    assert config.method("mine") == PesoConfig(strength=7.0)
    assert config.method("single") == BUILT_IN["single"]
    with pytest.raises(UserError, match="unknown method 'peso_papr'; did you mean 'peso_paper'"):
        config.method("peso_papr")


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    config = Config.model_validate({"name": "a", "workspace": "w", "log": {"kind": "sequences", "sequences": "x"}})
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"  # pyright: ignore[reportAttributeAccessIssue]
