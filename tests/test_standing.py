"""The champion is what it was trained as: settings and rows move it only through the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import OPEN_GATE, listing, seconds, week, write_rows, write_shop
from flows import retraining, schedule
from flows.promotion import champion
from flows.recommending import recommend
from flows.serving.served import load_served
from stages.errors import UserError
from stages.workspace import read_json
from tests.standing import ANEW, Shop


@pytest.fixture
def shop(promoted_shop: Shop, tmp_path: Path) -> Shop:
    """A copy of the promoted shop, to be changed."""
    return promoted_shop.copied(tmp_path)


def test_a_champion_trained_anew_that_the_gate_refuses_changes_nothing_and_is_not_tried_again(shop: Shop) -> None:
    before, answered = shop.served, shop.listed()
    shop.set("[evaluation]", ANEW)
    shop.set("minimum = -1", "minimum = 1")
    (line,) = shop.nightly()
    assert (line["decision"], line["anew"], line["stage"]) == ("kept", True, 2)
    assert "single after stage 2 stays in service" in line["why"]
    assert "single after stage 2, trained anew, does not replace it" in line["why"]
    assert line["challenger"]["key"] != before.key
    assert line["differences"]["all"]["users"] == 40
    assert set(line["scores"]) >= {"single after stage 2", "single after stage 2, trained anew"}
    assert (shop.served, shop.listed()) == (before, answered)
    assert shop.nightly() == []


def test_a_schedule_is_refused_where_every_run_would_be(
    shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "serve", lambda *_: pytest.fail("the schedule began"))
    shop.set("codes_per_level = 8", "codes_per_level = 16")
    code, _, error = driftrec("serve-flows", "-c", shop.config, "-w", shop.workspace.root, "--every", "9")
    assert (code, "other settings in [items]" in error) == (2, True)


@pytest.mark.parametrize("changed", ["workspace", "sample"])
def test_a_sample_of_users_too_small_for_the_gate_is_refused(shop: Shop, changed: str) -> None:
    shop.set("users = 1\n", "users = 30\n")
    shop.set("[evaluation]", "[evaluation]\nusers = 29")
    if changed == "sample":
        with pytest.raises(UserError, match=r"evaluation.users \(29\) is below retrain.gate.users \(30\)"):
            retraining.retrain_plan(shop.config)
    else:
        shop.set('method = "single"', 'method = "single"\nusers = 30')
        assert retraining.retrain_plan(shop.config).config.evaluation.users == 30


def test_the_challenger_of_changed_settings_meets_the_champion_of_the_old_ones(shop: Shop) -> None:
    before = shop.served
    shop.set("[evaluation]", ANEW)
    shop.set("minimum = -1", "minimum = 1")
    write_rows(shop.folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])
    lines = shop.nightly()
    assert [(line["decision"], line["stage"], "anew" in line) for line in lines] == [
        ("kept", 3, True),
        ("kept", 3, False),
    ]
    assert [line["champion"]["key"] for line in lines] == [before.key] * 2
    assert shop.nightly() == []


@pytest.mark.parametrize("change", ["learning_rate = 0.5\n[evaluation]", "history_length = 2\n[evaluation]"])
def test_settings_read_by_another_command_leave_the_answers_alone(shop: Shop, driftrec: Any, change: str) -> None:
    answered, served = shop.listed(), load_served(shop.workspace.root)
    plain = served.rank([served.past("u03", None)], 5)
    shop.set("[evaluation]", change)
    assert driftrec("ingest", "-c", shop.config, "-w", shop.workspace.root)[0] == 0
    assert shop.listed() == answered
    assert recommend(shop.workspace.root, user="u03", k=5, method="single").rows == answered
    served = load_served(shop.workspace.root)
    assert (served.fault, served.rank([served.past("u03", None)], 5)) == (None, plain)


def test_a_workspace_without_a_champion_answers_with_what_was_trained_last(shop: Shop, driftrec: Any) -> None:
    answered = shop.listed()
    for name in (champion.FILE, "history.jsonl"):
        (shop.workspace.root / name).unlink()
    shop.set("[evaluation]", ANEW)
    driftrec("ingest", "-c", shop.config, "-w", shop.workspace.root)
    assert shop.listed() == answered


def test_a_first_model_that_the_gate_refused_answers_only_where_it_is_named(tmp_path: Path, driftrec: Any) -> None:
    shop = Shop(tmp_path)
    write_shop(tmp_path, OPEN_GATE.replace("60000", "0.0001"))
    assert [line["decision"] for line in shop.nightly()] == ["kept"]
    asked = ("recommend", "-w", shop.workspace.root, "--user", "u03")
    code, _, error = driftrec(*asked)
    assert code == 2
    assert "nothing is in service; the gate refused single after stage 1" in error
    assert "`--method single` answers with it all the same" in error
    assert driftrec(*asked, "--method", "single")[0] == 0
    with pytest.raises(UserError, match="nothing is in service"):
        load_served(shop.workspace.root)
    assert load_served(shop.workspace.root, "single").job.stage == 1
    assert "in service: nothing" in driftrec("history", "-w", shop.workspace.root)[1]


def test_a_decision_that_a_kill_kept_from_champion_json_is_answered_by(shop: Shop) -> None:
    answered = shop.listed()
    (shop.workspace.root / champion.FILE).unlink()
    assert shop.listed() == answered


def test_an_earlier_code_version_s_champion_still_answers_and_meets_the_new_one(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import commit

    answered, before = shop.listed(), shop.served
    monkeypatch.setattr(commit, "CODE_VERSION", commit.CODE_VERSION + 1)
    commit._known.clear()
    assert shop.listed() == answered
    (line,) = shop.nightly()
    assert line["decision"] == "rebuilt"
    assert line["differences"]["all"]["value"] == 0.0, "the same bytes under another name answer otherwise"
    assert shop.served.key != before.key
    commit._known.clear()


def test_a_late_row_that_rebuilds_a_stage_asks_the_gate(shop: Shop) -> None:
    before = shop.served
    shop.set('method = "single"', 'method = "single"\nlate = "rebuild"')
    shop.set("minimum = -1", "minimum = 1")
    write_rows(shop.folder / "events" / "late.csv", [("u00", "i03", seconds(15.5))])
    (line,) = shop.nightly()
    assert (line["decision"], line["anew"]) == ("kept", True)
    assert shop.served == before
    assert shop.listed()
    files = listing(shop.workspace.root)
    assert shop.nightly() == []
    assert {name for name, digest in listing(shop.workspace.root).items() if files.get(name) != digest} <= {
        "config.json",
        "champion.lock",
    }
    assert read_json(champion.champion_file(shop.workspace))["key"] == before.key
