"""Semantic IDs under the models that were trained on them: none moves, and a model whose codes did is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.growing import OPEN_GATE, seconds, week, write_rows, write_shop
from flows import retraining, steps
from flows.experiment import remembered_config
from flows.promotion import champion
from flows.recommending import recommend
from flows.serving.served import InService, load_served
from stages.append import take_new_rows
from stages.checkpoint import MANIFEST
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.workspace import read_json, sha256_file, write_json
from tests.standing import Shop
from tests.stocked import rows_of

KINDS = ("tfidf", "cooccurrence")
LATE = {
    "new": [("u00", "i20", seconds(0.5))],
    "known": [("u00", "i03", seconds(0.5)), ("u00", "i05", seconds(0.6))],
    "of a later stage": [("u00", "i13", seconds(0.5)), ("u01", "i13", seconds(0.6))],
}


@pytest.fixture(scope="module", params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A first model at stage 1 and a promoted one at stage 2."""
    folder = tmp_path_factory.mktemp("codes")
    write_shop(folder, f'late = "rebuild"\n{OPEN_GATE}')
    shop = Shop(folder)
    shop.set("[items]", f'[items]\nvectors = "{request.param}"')
    return shop.begin()


@pytest.fixture
def shop(opened: Shop, tmp_path: Path) -> Shop:
    """A copy of it, to be changed."""
    return opened.copied(tmp_path)


def codes(shop: Shop) -> dict[str, list[int]]:
    return {item: row["codes"] for item, row in rows_of(shop.workspace).items()}


def listed(shop: Shop) -> list[tuple[str, str, float]]:
    return recommend(shop.workspace.root, history=["i01", "i02"], k=10).rows


def refit(shop: Shop) -> None:
    """A rebuilt stage brings an item, the gate keeps the champion, and the catalogue rots: all is fitted anew."""
    before = codes(shop)
    shop.set("minimum = -1", "minimum = 1")
    write_rows(shop.folder / "events" / "late.csv", [*LATE["new"]])
    shop.nightly()
    shop.set("minimum = 1", "minimum = -1")
    path = shop.workspace.catalogue / "items.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    steps.give_ids(retraining.retrain_plan(shop.config, shop.workspace.root))
    assert {item: codes(shop)[item] for item in before} != before


@pytest.mark.parametrize("late", LATE)
def test_a_rebuilt_stage_leaves_codes_and_answers_alone(shop: Shop, late: str) -> None:
    before, served, answered = codes(shop), shop.served, listed(shop)
    shop.set("minimum = -1", "minimum = 1")
    write_rows(shop.folder / "events" / "late.csv", [*LATE[late]])
    (line,) = shop.nightly()
    assert (line["decision"], line["anew"]) == ("kept", True)
    assert shop.served == served
    after = codes(shop)
    assert {item: after[item] for item in before} == before
    assert after.keys() - before.keys() == ({"i20"} if late == "new" else set())
    assert listed(shop) == answered
    assert load_served(shop.workspace.root).fault is None


def test_the_model_of_a_rebuilt_stage_knows_the_item_that_came_late(shop: Shop) -> None:
    write_rows(shop.folder / "events" / "late.csv", LATE["new"] * 3)
    (line,) = shop.nightly()
    assert line["decision"] == "rebuilt"
    assert "i20" in {item for item, *_ in recommend(shop.workspace.root, history=["i01"], k=20).rows}
    assert shop.nightly() == []


def test_while_a_closed_stage_has_no_codes_yet_the_models_answer_as_before_and_can_be_gone_back_to(shop: Shop) -> None:
    answered = listed(shop)
    write_rows(
        shop.folder / "events" / "week3.csv", [*week(3), ("u00", "i20", seconds(22)), ("u00", "i01", seconds(28))]
    )
    plan = retraining.retrain_plan(shop.config, shop.workspace.root)
    take_new_rows(plan.config, shop.workspace)
    with pytest.raises(UserError, match=r"events are of items without a code, .* run the command again that closed it"):
        load_dataset(plan.config, shop.workspace)
    assert listed(shop) == answered
    assert load_served(shop.workspace.root).fault is None
    config, _ = remembered_config(shop.workspace.root)
    taken_out, back = champion.roll_back(config, shop.workspace)
    assert (taken_out.job.stage, back.job.stage) == (2, 1)


def test_a_model_is_refused_whose_codes_have_moved(shop: Shop) -> None:
    place = InService(shop.workspace.root)
    served = place.current
    said = r"trained on other item codes than the catalogue has now; run `driftrec retrain`"
    refit(shop)
    with pytest.raises(UserError, match=said):
        listed(shop)
    with pytest.raises(UserError, match=said):
        load_served(shop.workspace.root)
    assert not place.look()
    assert place.current is served
    assert "other item codes" in (place.fault or "")
    config, _ = remembered_config(shop.workspace.root)
    with pytest.raises(UserError, match=r"other item codes.*the champion stays"):
        champion.roll_back(config, shop.workspace)


def test_a_champion_whose_codes_have_moved_is_trained_anew_and_not_held_against_its_scrambled_answers(
    shop: Shop,
) -> None:
    refit(shop)
    (line,) = shop.nightly()
    assert (line["decision"], line["differences"]) == ("rebuilt", None)
    assert "the champion, single after stage 2, cannot be loaded" in line["why"]
    assert load_served(shop.workspace.root).fault is None
    assert shop.nightly() == []


@pytest.mark.parametrize("change", ["levels = 3", "dimensions = 3"])
def test_other_settings_of_the_items_are_refused_where_models_rest_on_them(shop: Shop, change: str) -> None:
    before, answered = codes(shop), listed(shop)
    name = change.split()[0]
    text = "\n".join(line for line in shop.config.read_text().splitlines() if not line.startswith(f"{name} ="))
    shop.config.write_text(text.replace("[items]", f"[items]\n{change}"))
    with pytest.raises(UserError, match=r"settings in \[items\], and its models rest on them"):
        shop.nightly()
    assert (codes(shop), listed(shop)) == (before, answered)


def test_baskets_turned_on_under_a_model_have_it_trained_anew_where_that_moves_codes(shop: Shop) -> None:
    write_rows(shop.folder / "events" / "late.csv", [*LATE["new"]])
    shop.nightly()
    before = codes(shop)
    shop.set("[evaluation]", "[evaluation]\nbaskets = true")
    (line,) = shop.nightly()
    assert codes(shop) != before
    assert (line["decision"], line["differences"]) == ("rebuilt", None)
    assert load_served(shop.workspace.root).fault is None


def test_a_checkpoint_that_notes_no_codes_is_loaded(shop: Shop) -> None:
    answered = listed(shop)
    for folder in shop.workspace.checkpoints.iterdir():
        state = read_json(folder / "state.json")
        assert state.pop("codes")["items"] == (12, 13, 14)[state["job"]["stage"]]
        write_json(folder / "state.json", state)
        manifest = read_json(folder / MANIFEST)
        for row in manifest["files"]:
            path = folder / row["name"]
            row |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(folder / MANIFEST, manifest)
    assert listed(shop) == answered


def test_what_a_checkpoint_notes_of_codes_does_not_depend_on_the_future(shop: Shop) -> None:
    plan = retraining.retrain_plan(shop.config, shop.workspace.root)
    before = [load_dataset(plan.config, shop.workspace).note_of_codes(stage) for stage in range(3)]
    write_rows(shop.folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])
    shop.nightly()
    assert [load_dataset(plan.config, shop.workspace).note_of_codes(stage) for stage in range(3)] == before
