"""Semantic IDs that come with the data, and the published index of Video Games."""

import json
from pathlib import Path

import numpy as np
import pytest

from stages.config import Config
from stages.errors import UserError
from stages.interactions import load_catalogue
from stages.items import build_semantic_ids
from stages.workspace import Workspace, write_json
from tests.public import public_log
from tests.stocked import made, settings_of


def shipped(index: Path) -> Config:
    values = settings_of().model_dump()
    log = {"kind": "blocks", "blocks": "b*.json", "index": str(index)}
    return Config.model_validate({**values, "log": log, "items": {"index": "shipped"}})


def test_a_shipped_index_is_used_as_it_is_with_its_collisions_counted(tmp_path):
    path = tmp_path / "index.json"
    codes = {"a": ["<a_9>", "<b_1>"], "b": ["<a_9>", "<b_1>"], "c": ["<a_2>", "<b_5>"], "unsold": ["<a_4>", "<b_1>"]}
    write_json(path, codes)
    workspace = made(tmp_path / "w", [[("u", "b", 0), ("u", "c", 0)], [("u", "a", 0)]], clock=False)
    report = build_semantic_ids(shipped(path), workspace)
    catalogue = load_catalogue(workspace)
    assert catalogue.item_ids == ["b", "c", "a"]
    assert catalogue.codes.tolist() == [[2, 0], [0, 1], [2, 0]]
    assert (catalogue.shipped, catalogue.sizes) == (True, (3, 2))
    assert (report.collisions.shared_ids, report.collisions.items_sharing, report.collisions.largest_group) == (1, 2, 2)
    manifest = json.loads((workspace.catalogue / "manifest.json").read_text())
    assert (manifest["code_values"], manifest["index_only"]) == ([[2, 4, 9], [1, 5]], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ["<a_1>"]}', "1 items of the log have no semantic ID, first b"),
        ('{"a": ["<a_1>"], "b": ["a1"]}', "item 'b': a code looks like"),
        ("[1]", "index.json"),
        ("{", "not a readable JSON file"),
    ],
)
def test_a_shipped_index_that_does_not_fit_is_the_users_error(tmp_path, text, message):
    path = tmp_path / "index.json"
    path.write_text(text)
    workspace = made(tmp_path / "w", [[("u", "a", 0), ("u", "b", 0)]], clock=False)
    with pytest.raises(UserError, match=message):
        build_semantic_ids(shipped(path), workspace)


@pytest.fixture(scope="module")
def video_games(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """The published blocks as stage files, and their index."""
    folder = public_log("amazon-video-games-blocks")
    blocks = [json.loads(path.read_text()) for path in sorted(folder.glob("*.block_*.json"))]
    stages = [
        [(user, item, 0.0) for user, block in users.items() for item in block["current_block"]] for users in blocks
    ]
    return made(tmp_path_factory.mktemp("video_games"), stages, clock=False), next(folder.glob("*.index.*.json"))


def test_the_published_video_games_index_has_its_known_counts(video_games):
    workspace, index = video_games
    report = build_semantic_ids(shipped(index), workspace)
    manifest = json.loads((workspace.catalogue / "manifest.json").read_text())
    assert report.items == 25_935
    assert report.codes_per_level == (175, 256, 256, 256)
    assert manifest["prefixes"] == [175, 12_778, 23_133, 25_707]
    assert manifest["collisions"] == {"shared_ids": 174, "items_sharing": 402, "largest_group": 7}
    assert load_catalogue(workspace).known(0) == 18_450


def test_fitted_ids_tell_all_video_games_apart(video_games):
    workspace, _ = video_games
    report = build_semantic_ids(settings_of(levels=4, codes_per_level=256, dimensions=32), workspace)
    assert (report.vectors, report.codes_per_level) == ("cooccurrence", (256, 256, 256, 256))
    assert len(np.unique(load_catalogue(workspace).codes, axis=0)) == 25_935
