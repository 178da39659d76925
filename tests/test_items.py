import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import rqvae
from stages.config import Config
from stages.errors import UserError
from stages.interactions import load_catalogue
from stages.item_vectors import load_coder, stage_vectors, training_events
from stages.items import build_semantic_ids
from stages.workspace import Workspace, digest_of, sha256_file, write_json

START = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
Event = tuple[str, str, float]  # user, item, days after START
EVENT_SCHEMA = {
    "user_id": pl.String,
    "item_id": pl.String,
    "timestamp": pl.Datetime("us", "UTC"),
    "event": pl.String,
    "query": pl.String,
}
RAW_SCHEMA = {
    "item_id": pl.String,
    "title": pl.String,
    "text": pl.String,
    "categories": pl.List(pl.String),
    "timestamp": pl.Datetime("us", "UTC"),
}


def settings_of(**items: Any) -> Config:
    values = {"name": "items", "workspace": "w", "log": {"kind": "sequences", "sequences": "log.txt"}}
    small = {"levels": 3, "codes_per_level": 16, "dimensions": 8}
    return Config.model_validate({**values, "items": {**small, **items}})


def write_stages(workspace: Workspace, stages: list[list[Event]], clock: bool = True) -> None:
    """Stage files and manifest by the file contract, a stage every ten days."""
    rows = []
    for index, events in enumerate(stages):
        frame = pl.DataFrame(
            [(user, item, START + day * DAY if clock else None, "recommendation", None) for user, item, day in events],
            schema=EVENT_SCHEMA,
            orient="row",
        )
        order = ["user_id", "timestamp", "item_id"] if clock else ["user_id"]
        frame = frame.sort(order, maintain_order=True)
        path = workspace.stage_file(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path)
        ends = clock and index < len(stages) - 1
        rows.append(
            {
                "index": index,
                "end": (START + 10 * (index + 1) * DAY).isoformat() if ends else None,
                "digest": digest_of(frame.with_columns(pl.col("timestamp").cast(pl.String)).rows()),
                "sha256": sha256_file(path),
            }
        )
    write_json(workspace.stages / "manifest.json", {"schema": 1, "clock": clock, "stages": rows})


def write_raw(
    workspace: Workspace, rows: list[tuple[str, str | None, str | None, list[str] | None, float | None]]
) -> None:
    workspace.catalogue.mkdir(parents=True, exist_ok=True)
    dated = [(*row[:4], None if row[4] is None else START + row[4] * DAY) for row in rows]
    pl.DataFrame(dated, schema=RAW_SCHEMA, orient="row").write_parquet(workspace.catalogue / "raw.parquet")


def invent_stages(new: tuple[int, ...] = (24, 6, 4), seed: int = 0) -> list[list[Event]]:
    """Two tastes; every stage brings `new` items, and its users take known and new ones of their taste."""
    random, stages, known = np.random.default_rng(seed), [], 0
    for index, count in enumerate(new):
        fresh = np.arange(known, known + count)
        known += count
        events = []
        for user in range(20):
            taken = random.choice(np.arange(known)[np.arange(known) % 2 == user % 2], size=8)
            taken[1] = fresh[(user // 2 * 2 + user % 2) % count]
            taken[0] = fresh[user % count]
            events += [(f"u{user:02d}", f"i{item:03d}", 10 * index + 1 + step) for step, item in enumerate(taken)]
        stages.append(events)
    return stages


def words(count: int = 34) -> list[tuple[str, str | None, str | None, list[str] | None, float | None]]:
    shapes = ("mug", "scarf")
    return [
        (f"i{n:03d}", f"{('red', 'blue', 'green')[n % 3]} {shapes[n % 2]} no {n}", None, [shapes[n % 2]], None)
        for n in range(count)
    ]


def made(folder: Path, stages: list[list[Event]], raw: Any = None, clock: bool = True) -> Workspace:
    workspace = Workspace(folder)
    write_stages(workspace, stages, clock)
    if raw is not None:
        write_raw(workspace, raw)
    return workspace


def rows_of(workspace: Workspace) -> dict[str, dict[str, Any]]:
    frame = pl.read_parquet(workspace.catalogue / "items.parquet")
    return {row["item_id"]: row for row in frame.iter_rows(named=True)}


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rqvae, "STEPS", 100)


KINDS = pytest.mark.parametrize("kind", ["tfidf", "cooccurrence"])


@KINDS
@pytest.mark.parametrize("quantizer", ["kmeans", "rqvae"])
def test_every_item_with_an_event_has_its_own_id_inside_the_levels(tmp_path, kind, quantizer):
    workspace = made(tmp_path, invent_stages(), words(36))
    report = build_semantic_ids(settings_of(vectors=kind, quantizer=quantizer), workspace)
    catalogue = load_catalogue(workspace)
    assert (report.items, report.catalogue_only, report.vectors) == (34, 2, kind)
    assert catalogue.from_events is (kind == "cooccurrence")
    assert catalogue.sizes == report.codes_per_level == (6, 6, 16)
    assert len(np.unique(catalogue.codes, axis=0)) == 34
    assert (catalogue.codes < np.array(catalogue.sizes)).all()
    assert report.collisions.items_sharing == 0


def test_items_stand_in_the_order_of_first_stage_and_id(tmp_path):
    stages: list[list[Event]] = [[("u", "9", 1), ("u", "10", 2)], [("v", "01", 11), ("v", "9", 12), ("v", "1", 13)]]
    build_semantic_ids(settings_of(), made(tmp_path, stages))
    catalogue = load_catalogue(Workspace(tmp_path))
    assert catalogue.item_ids == ["10", "9", "01", "1"]
    assert catalogue.first_stage.tolist() == [0, 0, 1, 1]
    assert catalogue.known(0) == 2
    assert catalogue.titles == catalogue.item_ids


def test_auto_takes_text_where_half_of_the_items_of_stage_0_have_one(tmp_path):
    for name, described, kind in (("half", 12, "tfidf"), ("fewer", 11, "cooccurrence")):
        workspace = made(tmp_path / name, invent_stages(), words(described))
        assert build_semantic_ids(settings_of(), workspace).vectors == kind


def test_a_title_is_the_most_frequent_one_known_by_the_end_of_the_items_first_stage(tmp_path):
    stages: list[list[Event]] = [[("u", "a", 1), ("u", "b", 2)], [("u", "c", 11)], [("u", "d", 21)]]
    raw = [
        ("a", "first", "x", ["k", "l"], 1), ("a", "later", None, None, 10), ("a", "later", None, None, 10),
        ("b", "zebra", "", [], 1), ("b", "ant", None, None, 2), ("b", None, None, None, 3),
        ("c", "static", None, None, None), ("c", "dated", None, None, 19.5), ("c", "dated", None, None, 19.9),
        ("d", "far", None, None, 999), ("e", "no event", None, None, 1),
    ]  # fmt: skip
    report = build_semantic_ids(settings_of(vectors="tfidf"), made(tmp_path, stages, raw))
    rows = rows_of(Workspace(tmp_path))
    assert {item: row["title"] for item, row in rows.items()} == {
        "a": "first",  # the other title comes at the instant the stage ends, or later
        "b": "ant",  # a tie goes to the one that sorts first
        "c": "dated",
        "d": "far",  # the last stage is open
    }
    assert (rows["a"]["text"], rows["a"]["categories"]) == ("x", ["k", "l"])
    assert (rows["b"]["text"], rows["b"]["categories"]) == (None, None)
    assert report.catalogue_only == 1


def test_without_a_clock_dated_text_is_not_known_before_the_last_stage(tmp_path):
    stages: list[list[Event]] = [[("u", "a", 0)], [("u", "b", 0)]]
    raw = [("a", "dated", None, None, 5), ("b", "dated", None, None, 5), ("a", "plain", None, None, None)]
    build_semantic_ids(settings_of(vectors="tfidf"), made(tmp_path, stages, raw, clock=False))
    assert {item: row["title"] for item, row in rows_of(Workspace(tmp_path)).items()} == {"a": "plain", "b": "dated"}


@KINDS
@pytest.mark.parametrize("known", [1, 2])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(1, 10_000))
def test_nothing_that_happens_later_changes_an_earlier_items_code(tmp_path_factory, kind, known, seed):
    config, stages = settings_of(vectors=kind), invent_stages()
    mutated = stages[:known] + invent_stages((24, 9, 2), seed)[known:]
    rows = []
    for name, events, raw in (
        ("one", stages, words()),
        ("other", mutated, [*words(), ("i000", "x", "y", None, 10 * known)]),
    ):
        workspace = made(tmp_path_factory.mktemp(name), events, raw)
        build_semantic_ids(config, workspace)
        rows.append({item: row for item, row in rows_of(workspace).items() if row["first_stage"] < known})
    assert rows[0] == rows[1]
    assert len(rows[0]) == sum((24, 6)[:known])


@KINDS
def test_the_order_of_rows_and_raw_texts_does_not_matter(tmp_path, kind):
    stages, random = invent_stages(), np.random.default_rng(0)
    shuffled = [[events[row] for row in random.permutation(len(events))] for events in stages]
    digests = [
        build_semantic_ids(settings_of(vectors=kind), made(tmp_path / name, events, raw)).digest
        for name, events, raw in (("a", stages, words()), ("b", shuffled, words()[::-1]))
    ]
    assert digests[0] == digests[1]


@KINDS
@pytest.mark.parametrize("quantizer", ["kmeans", "rqvae"])
def test_a_stage_added_later_gives_what_building_all_at_once_gives(tmp_path, kind, quantizer):
    config, stages = settings_of(vectors=kind, quantizer=quantizer), invent_stages()
    grown = made(tmp_path / "grown", stages[:2], words())
    build_semantic_ids(config, grown)
    write_stages(grown, stages)
    report = build_semantic_ids(config, grown)
    assert report.extended == 30
    assert report.digest == build_semantic_ids(config, made(tmp_path / "whole", stages, words())).digest


def test_a_changed_text_moves_no_code_of_an_item_in_service(tmp_path):
    config, stages = settings_of(vectors="tfidf"), invent_stages()
    workspace = made(tmp_path, stages[:2], words())
    build_semantic_ids(config, workspace)
    before = rows_of(workspace)
    write_stages(workspace, stages)
    write_raw(workspace, [(row[0], f"new {row[1]}", *row[2:]) for row in words()])
    build_semantic_ids(config, workspace)
    after = rows_of(workspace)
    assert {item: after[item] for item in before} == before
    assert after["i033"]["title"].startswith("new")


def test_the_same_inputs_return_what_is_there_and_damage_is_built_anew(tmp_path):
    config, workspace = settings_of(), made(tmp_path, invent_stages(), words())
    first = build_semantic_ids(config, workspace)
    again = build_semantic_ids(config, workspace)
    assert (first.reused, again.reused) == (False, True)
    assert again.digest == first.digest
    for name in ("items.parquet", "quantizer/codebooks.safetensors", "quantizer/quantizer.json"):
        path = workspace.catalogue / name
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(bytes(damaged))
        said: list[str] = []
        mended = build_semantic_ids(config, workspace, said.append)
        assert (mended.reused, mended.digest) == (False, first.digest)
        assert "differ from their manifest" in said[0]


def test_other_settings_or_another_catalogue_are_built_anew(tmp_path):
    workspace = made(tmp_path, invent_stages(), words())
    one = build_semantic_ids(settings_of(), workspace)
    other = build_semantic_ids(settings_of(levels=4), workspace)
    assert not other.reused
    assert len(other.codes_per_level) == 4
    write_raw(workspace, words(30))
    assert not build_semantic_ids(settings_of(levels=4), workspace).reused
    assert one.digest != other.digest


def test_the_frozen_coder_on_disk_gives_the_codes_in_the_catalogue(tmp_path):
    config, workspace = settings_of(vectors="cooccurrence"), made(tmp_path, invent_stages())
    build_semantic_ids(config, workspace)
    coder, catalogue = load_coder(config, workspace), load_catalogue(workspace)
    items = pl.read_parquet(workspace.catalogue / "items.parquet")
    codes = coder.quantizer.encode(stage_vectors(config, workspace, coder, items, 0))
    assert np.array_equal(codes, catalogue.codes[: catalogue.known(0), :-1])
    assert not [file for file in workspace.catalogue.rglob("*") if file.suffix in (".pkl", ".pt", ".joblib")]


def test_cooccurrence_never_sees_a_users_last_two_events_of_a_stage(tmp_path):
    stages: list[list[Event]] = [
        [("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("u", "d", 4), ("v", "a", 1), ("v", "d", 2)],
        [("u", "e", 11), ("u", "a", 12), ("u", "b", 12.5)],
    ]
    workspace = made(tmp_path, stages)
    items = pl.DataFrame({"item_id": ["a", "b", "c", "d", "e"], "first_stage": [0, 0, 0, 0, 1]})
    users, numbers = training_events(settings_of(), workspace, items, 1)
    assert numbers.tolist() == [0, 1, 4]
    assert len(set(users.tolist())) == 1


def test_with_baskets_the_last_two_instants_are_held_out(tmp_path):
    stages: list[list[Event]] = [[("u", item, day) for item, day in zip("abcdef", (1, 1, 2, 3, 3, 3), strict=True)]]
    config = Config.model_validate({**settings_of().model_dump(), "evaluation": {"baskets": True}})
    items = pl.DataFrame({"item_id": list("abcdef"), "first_stage": [0] * 6})
    assert training_events(config, made(tmp_path, stages), items, 0)[1].tolist() in ([0, 1], [1, 0])


def test_a_stage_of_unseen_items_only_gets_codes(tmp_path):
    stages = [*invent_stages((24,)), [(f"w{n}", f"z{n:03d}", 11) for n in range(40)]]
    report = build_semantic_ids(settings_of(vectors="cooccurrence"), made(tmp_path, stages))
    assert report.items == 64
    assert report.collisions.items_sharing == 0


def test_ids_without_room_are_an_error_naming_item_and_remedy(tmp_path):
    stages = [*invent_stages((24,)), [(f"w{n}", f"z{n:03d}", 11) for n in range(40)]]
    config = settings_of(vectors="cooccurrence", levels=2, codes_per_level=4)
    workspace = made(tmp_path, stages)
    with pytest.raises(
        UserError, match=r"codes_per_level = 4: semantic id .* item .*; raise levels or codes_per_level"
    ):
        build_semantic_ids(config, workspace)
    assert not (workspace.catalogue / "items.parquet").exists()


def test_one_item_and_one_event_are_enough(tmp_path):
    report = build_semantic_ids(settings_of(), made(tmp_path, [[("u", "a", 1)]]))
    assert (report.items, report.codes_per_level) == (1, (1, 1, 16))


def test_control_strings_and_markup_in_titles_come_back_unchanged(tmp_path):
    titles = ["<a_12>", "### Response:", "</s><script>alert(1)</script>", "=1+1", "\u202eمرحبا 🎁\nnext"]
    stages: list[list[Event]] = [[("u", str(n), n) for n in range(5)]]
    workspace = made(tmp_path, stages, [(str(n), title, None, None, None) for n, title in enumerate(titles)])
    assert build_semantic_ids(settings_of(), workspace).vectors == "tfidf"
    assert load_catalogue(workspace).titles == titles


@pytest.mark.parametrize(
    ("stages", "items", "message"),
    [
        ([[], [("u", "a", 11)]], {}, "stage 0 has no events"),
        ([[("u", "a", 1)]], {"vectors": "tfidf"}, "none of 1 texts holds a word"),
        ([[("u", "a", 1)]], {"vectors": "encoder", "encoder": "./no-such-folder"}, 'items.vectors = "encoder"'),
    ],
)
def test_what_cannot_be_fitted_is_the_users_error(tmp_path, stages, items, message):
    with pytest.raises(UserError, match=message):
        build_semantic_ids(settings_of(**items), made(tmp_path, stages))


def test_a_damaged_stage_file_is_refused(tmp_path):
    workspace = made(tmp_path, invent_stages())
    workspace.stage_file(1).write_bytes(workspace.stage_file(0).read_bytes())
    with pytest.raises(UserError, match=r"stage=01.*split the log again"):
        build_semantic_ids(settings_of(), workspace)


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
    if "DRIFTREC_DATA" not in os.environ:
        pytest.skip("DRIFTREC_DATA is not set; it names the folder with amazon-video-games-blocks")
    folder = Path(os.environ["DRIFTREC_DATA"]) / "amazon-video-games-blocks"
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
