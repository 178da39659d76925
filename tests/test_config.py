"""Every mistake in a config file is one message that names the key, the rule and the value."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from stages.commit import FIRST
from stages.config import RESERVED, Config, load_config
from stages.errors import UserError
from stages.jobs import BASELINES
from stages.method_config import BUILT_IN, GemsConfig, PesoConfig
from stages.retrain_config import CloseConfig, RetrainConfig
from stages.sampled import LAST_CATEGORY

EVENTS = 'name = "shop"\nworkspace = "w"\n[[log.sources]]\npath = "log.csv"\n'
BASE = 'name = "shop"\nworkspace = "w"\n[log]\nkind = "sequences"\nsequences = "log.txt"\n'
GEMS = '[methods.m]\nmethod = "gems"\n'


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
        ('[stages]\ninstants = ["2011-02-01T00:00", "2011-02-01T01:00+03:00"]\n', "stages.instants must rise strictly"),
        ('[stages]\nperiod = "1w"\n', 'log.kind = "sequences" brings its own stages, but [stages] has period; remove'),
        ('[backbone]\nvocabulary = "full"\n', 'backbone.vocabulary = "full" needs a pretrained backbone; set'),
        ("[evaluation]\nprotocols = []\n", "evaluation.protocols must be distinct and at least one, got []"),
        ('[evaluation]\nprotocols = ["same_stage", "same_stage"]\n', "evaluation.protocols must be distinct"),
        (GEMS + 'k_rule = "fixed"\n', 'methods.m.gems: k_value = 0.95, but k_rule = "fixed" takes a whole number of'),
        (GEMS + 'k_rule = "fixed"\nk_value = 2.5\n', "k_value = 2.5, but"),
        (GEMS + "k_value = 1.5\n", 'k_value = 1.5, but k_rule = "energy" takes a share above 0 and below 1;'),
        (GEMS + 'k_rule = "relative"\nk_value = 2\n', 'k_value = 2, but k_rule = "relative" takes a share'),
        ('[methods.m]\nmethod = "lora_moe"\ntargets = []\n', "targets: name at least one kind of linear map, such as"),
        ("[adapter]\ntargets = []\n", "adapter.targets: name at least one kind of linear map, such as"),
        ('[methods."../up"]\nmethod = "peso"\n', "'../up' cannot name a method"),
        ('[methods.first]\nmethod = "peso"\n', "'first' is taken by driftrec itself"),
        ('[methods.item_graph]\nmethod = "peso"\n', "'item_graph' is taken by driftrec itself"),
        (
            '[training]\ntoken_rows = "freeze"\n[methods.m]\nmethod = "peso"\nanchor = "adapter+tokens"\n',
            'methods.m.anchor = "adapter+tokens" anchors rows that training.token_rows = "freeze" never moves',
        ),
        ('[methods.scale]\nmethod = "peso"\nstrenght = 1.0\n', "strenght'; did you mean 'strength'?"),
        ('[items]\nindex = "shipped"\n', 'items.index = "shipped" needs log.index'),
        ("[training]\nepochs = 2\nepoch = 3\n", "unknown key 'training.epoch'; did you mean 'epochs'?"),
        ("[retrain]\nfuture_hours = 1e300\n", "retrain.future_hours: Input should be less than or equal to 1000000"),
        ("[retrain]\nrefused_share = 1.5\n", "retrain.refused_share: Input should be less than or equal to 1"),
        ("[retrain.gate]\nlatency_ms = -1\n", "retrain.gate.latency_ms: Input should be greater than 0"),
        ("[retrain.gate]\nlatency_ms = true\n", "retrain.gate.latency_ms: give milliseconds, or false"),
        (
            "[retrain]\nusers = 29\n",
            "retrain.users (29) is below retrain.gate.users (30), so that no challenger could ever pass",
        ),
        ("[retrain]\nusers = 5\n[retrain.gate]\nusers = 6\n", "retrain.users (5) is below retrain.gate.users (6)"),
        ('[retrain]\nclose = { period = "1x" }\n', "retrain.close.period = '1x' is no period such as 1d, 1w, 1mo"),
        ('[retrain]\nclose = { period = "0d" }\n', "retrain.close.period = '0d' does not move forward"),
        ('[retrain]\nclose = { period = "99999999999999999999d" }\n', "is no period such as 1d, 1w, 1mo"),
        ("[training]\nlearning_rate = -1e-3\n", "training.learning_rate: Input should be greater than 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(tmp_path: Path, tail: str, said: str) -> None:
    assert said in refused(tmp_path, BASE + tail)


@pytest.mark.parametrize(
    "settings",
    [
        {"k_rule": "fixed", "k_value": 3},
        {"k_rule": "absolute", "k_value": 7.5},
        {"k_rule": "fixed", "null_space": "off"},  # nothing is protected, whatever the rule
    ],
)
def test_a_rule_s_own_numbers_are_taken(settings: dict[str, Any]) -> None:
    assert GemsConfig(**settings).k_rule == settings["k_rule"]


@pytest.mark.parametrize(("written", "bound"), [("false", None), ("0", None), ("0.5", 0.5)])
def test_the_gate_s_bound_on_latency_can_be_left_out_in_toml(tmp_path: Path, written: str, bound: float | None) -> None:
    path = tmp_path / "c.toml"
    path.write_text(BASE + f"[retrain.gate]\nlatency_ms = {written}\n")
    assert load_config(path).retrain.gate.latency_ms == bound


def test_as_many_sampled_users_as_the_gate_asks_for_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(BASE + '[retrain]\nusers = 30\nclose = { period = "2w" }\n')
    assert load_config(path).retrain.close.period == "2w"
    assert RetrainConfig().close == CloseConfig(period="1w")


def test_the_longest_allowed_future_is_a_time_that_can_be_computed() -> None:
    field = RetrainConfig.model_fields["future_hours"]
    longest = next(rule.le for rule in field.metadata if hasattr(rule, "le"))
    assert datetime.now(UTC) + timedelta(hours=longest) < datetime.max.replace(tzinfo=UTC)


def test_unknown_keys_in_lists_of_tables_are_met_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert "'log.sources.0.colums'; did you mean 'columns'?" in refused(tmp_path, EVENTS + "colums = {}\n")
    join = '[[log.sources.join]]\npath = "tags.csv"\non = "tag"\nformt = "csv"\n'
    assert "'log.sources.0.join.0.formt'; did you mean 'format'?" in refused(tmp_path, EVENTS + join)


def test_instants_of_several_offsets_are_put_in_order_by_time_not_by_spelling(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(EVENTS + '[stages]\ninstants = ["2011-02-01T01:00+03:00", "2011-02-01T00:00"]\n')
    assert load_config(path).stages.instants == ["2011-02-01T01:00+03:00", "2011-02-01T00:00"]


def test_no_method_is_called_like_a_baseline_or_the_shared_first_stage() -> None:
    assert set(RESERVED) == {FIRST, *BASELINES, LAST_CATEGORY}
    assert not BUILT_IN.keys() & set(RESERVED)


def test_a_models_folder_beside_the_config_is_found_and_a_hub_id_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODELS_HERE", str(tmp_path / "models"))
    path = tmp_path / "configs" / "c.toml"
    folder = str(tmp_path / "models" / "small")
    for written in ("../models/small", "~/models/small", "$MODELS_HERE/small"):
        path.write_text(BASE + f'[backbone]\npath = "{written}"\n[items]\nencoder = "{written}"\n')
        config = load_config(path)
        assert (config.backbone.path, config.items.encoder) == (folder, folder)
    path.write_text(BASE + '[backbone]\npath = "org/name"\n')
    config = load_config(path)
    assert (config.backbone.path, config.items.encoder) == ("org/name", None)


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
    monkeypatch.setenv("DRIFTREC_DATA", "")
    assert load_config(path).log.sequences == str(Path("data/x/log.txt").resolve())
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
