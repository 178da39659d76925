import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from stages.config import Config
from stages.errors import UserError
from stages.log import read_log
from stages.published import read_blocks, read_index, read_sequences
from stages.split import load_stages, split_stages
from stages.workspace import Workspace, read_json

BLOCKS: list[dict[str, Any]] = [
    {
        "2": {"previous_block": [], "current_block": ["c", "a", "b"]},
        "10": {"previous_block": [], "current_block": ["b", "d"]},
    },
    {"2": {"previous_block": ["c", "a", "b"], "current_block": ["e", "d", "f"]}},
    {"2": {"previous_block": ["c", "a", "b", "e", "d", "f"], "current_block": ["a", "g", "h"]}},
]


def stored(folder: Path, blocks: list[dict[str, Any]], numbers: tuple[int, ...] = (0, 2, 10)) -> str:
    for number, block in zip(numbers, blocks, strict=True):
        (folder / f"set.block_{number}.json").write_text(json.dumps(block))
    return str(folder / "set.block_*.json")


def test_blocks_become_stages_in_number_order_with_each_users_order_kept(tmp_path):
    config = Config.model_validate(
        {"name": "t", "workspace": "w", "log": {"kind": "blocks", "blocks": stored(tmp_path, BLOCKS)}}
    )
    workspace = Workspace(tmp_path / "w")
    report = read_log(config, workspace)
    stages = split_stages(config, workspace)
    assert (report.accepted, report.users, report.items, report.short_users) == (11, 2, 8, 1)
    assert [(stage.users, stage.returning_users, stage.events, stage.new_items) for stage in stages] == [
        (2, 0, 5, 4),
        (1, 1, 3, 2),
        (1, 1, 3, 2),
    ]
    assert [stage.start for stage in stages] == [None, None, None]
    assert read_json(workspace.stages / "manifest.json")["clock"] is False
    first = pl.read_parquet(workspace.stage_file(0))
    assert first.select("user_id", "item_id").rows() == [("10", "b"), ("10", "d"), ("2", "c"), ("2", "a"), ("2", "b")]
    assert first["timestamp"].null_count() == 5
    assert load_stages(workspace) == stages


def test_the_order_of_users_in_a_block_file_does_not_matter(tmp_path):
    turned = [dict(reversed(block.items())) for block in BLOCKS]
    (tmp_path / "turned").mkdir()
    assert read_blocks(stored(tmp_path, BLOCKS), None)[0].equals(
        read_blocks(stored(tmp_path / "turned", turned), None)[0]
    )


@pytest.mark.parametrize("previous", [[], ["c", "a"], ["a", "c", "b"], ["c", "a", "b", "b"]])
def test_a_previous_block_that_is_not_the_joined_past_names_user_and_block(tmp_path, previous):
    blocks = [BLOCKS[0], {"2": {"previous_block": previous, "current_block": ["e"]}}]
    with pytest.raises(UserError, match=r"block_2\.json: user '2': previous_block \(\d items\) is not"):
        read_blocks(stored(tmp_path, blocks, (0, 2)), None)


def test_a_past_for_a_user_never_seen_is_refused(tmp_path):
    blocks = [BLOCKS[0], {"new": {"previous_block": ["a"], "current_block": ["e"]}}]
    with pytest.raises(UserError, match=r"block_2\.json: user 'new': previous_block"):
        read_blocks(stored(tmp_path, blocks, (0, 2)), None)


def test_an_item_without_semantic_id_is_refused(tmp_path):
    index = tmp_path / "index.json"
    index.write_text(json.dumps({item: ["<a_1>", "<b_2>"] for item in "abcdefg"}))
    with pytest.raises(UserError, match=r"block_10\.json: user '2': item 'h' is not in the semantic-ID index"):
        read_blocks(stored(tmp_path, BLOCKS), str(index))
    index.write_text(json.dumps({item: ["<a_1>", "<b_2>"] for item in "abcdefgh"}))
    assert read_blocks(stored(tmp_path, BLOCKS), str(index))[0].height == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not a readable JSON file"),
        ('{"u": {"current_block": ["a"]}}', "previous_block must be a list"),
        ('{"u": {"previous_block": [], "current_block": [1]}}', "current_block must be a list of item ids as text"),
        ('{"u": {"previous_block": [], "current_block": [""]}}', "current_block must be a list of item ids as text"),
        ('{"u": []}', "user 'u': expected"),
        (
            '{"u": {"previous_block": [], "current_block": []}, "u": {"previous_block": [], "current_block": []}}',
            "'u' is there twice",
        ),
    ],
)
def test_a_file_of_another_shape_is_refused_whole(tmp_path, text, message):
    (tmp_path / "set.block_0.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_blocks(str(tmp_path / "set.block_*.json"), None)


def test_an_index_has_the_same_levels_for_every_item(tmp_path):
    path = tmp_path / "index.json"
    path.write_text('{"a": ["<a_1>"], "b": ["<a_1>", "<b_1>"]}')
    with pytest.raises(UserError, match="same number of levels"):
        read_index(str(path))
    path.write_text('{"a": []}')
    with pytest.raises(UserError, match="item 'a' needs a list of tokens"):
        read_index(str(path))


def test_sequences_are_one_stage_in_the_lines_order(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("2 c a b c\n10 b d\n\n")
    config = Config.model_validate(
        {"name": "t", "workspace": "w", "log": {"kind": "sequences", "sequences": str(path)}}
    )
    workspace = Workspace(tmp_path / "w")
    report = read_log(config, workspace)
    (stage,) = split_stages(config, workspace)
    assert (report.short_users, report.duplicates, stage.events, stage.users) == (1, 0, 6, 2)
    assert pl.read_parquet(workspace.stage_file(0))["item_id"].to_list() == ["b", "d", "c", "a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1 a\n1 b\n", "line 2: user '1' is there twice"),
        (b"1 a\n2\n", "line 2: user '2' has no items"),
        (b"\n", "the file is empty"),
        (b"1 \xff\n", "not UTF-8"),
    ],
)
def test_broken_sequence_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "s.txt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_sequences(str(path))


def test_a_visit_without_items_adds_no_event(tmp_path):
    blocks = [{"u": {"previous_block": [], "current_block": []}, "v": {"previous_block": [], "current_block": ["a"]}}]
    frame, _, short = read_blocks(stored(tmp_path, blocks, (0,)), None)
    assert (frame.rows(), short) == ([("v", "a", 0)], 2)
