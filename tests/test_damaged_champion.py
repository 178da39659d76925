"""A damaged champion is stood in for by an earlier one until it is mended or another passes the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.promotion import champion
from flows.recommending import recommend
from flows.serving.served import InService, load_served
from stages.errors import UserError
from tests.standing import ANEW, Shop


@pytest.fixture
def shop(promoted_shop: Shop, tmp_path: Path) -> Shop:
    """A copy of the promoted shop, to be changed."""
    return promoted_shop.copied(tmp_path)


def test_a_damaged_champion_is_stood_in_for_and_mended_without_a_decision(shop: Shop, driftrec: Any) -> None:
    first = champion.predecessors(shop.workspace)[1]
    answered, before = shop.listed(), shop.damage()
    place = InService(shop.workspace.root)
    assert place.current.job == first.job
    assert "single after stage 1 stands in for the champion" in (place.fault or "")
    assert "altered: adapter_model.safetensors; run `driftrec retrain`" in (place.fault or "")
    assert recommend(shop.workspace.root, user="u03", k=5).job == first.job
    assert not place.look()
    assert shop.nightly() == []
    assert shop.tensors.read_bytes() == before
    assert place.look()
    assert (place.current.job, place.fault) == (shop.served.job, None)
    assert shop.listed() == answered


def test_a_running_service_keeps_its_model_where_only_an_earlier_one_could_be_loaded(shop: Shop) -> None:
    place = InService(shop.workspace.root)
    served = place.current
    shop.damage()
    champion.renew(shop.workspace)
    assert not place.look()
    assert (place.current, place.failures) == (served, 1)
    assert "altered" in (place.fault or "")


def test_where_no_champion_is_intact_the_newest_one_s_damage_is_told(shop: Shop) -> None:
    for path in shop.workspace.checkpoints.glob("*-first-*/backbone.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"-first-.*altered: backbone\.safetensors; run `driftrec retrain`"):
        load_served(shop.workspace.root)


def test_a_damaged_champion_whose_settings_are_gone_is_replaced_by_who_passes_against_the_stand_in(shop: Shop) -> None:
    shop.damage()
    shop.set("[evaluation]", ANEW)
    (line,) = shop.nightly()
    assert (line["decision"], "single after stage 1" in line["scores"]) == ("rebuilt", True)
    assert "the champion, single after stage 2, cannot be loaded" in line["why"]
    assert load_served(shop.workspace.root).fault is None
