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
from stages.workspace import Workspace, read_json, sha256_file, write_json
from tests.stocked import Event, invent_stages, made, rows_of, settings_of, words, write_raw, write_stages


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


def late_rows() -> list[list[Event]]:
    """The stages with late rows in stage 0: of a new item, of one that stage 2 brought, and of one of its own."""
    first, *later = invent_stages()
    late = [("u00", item, 1 + 0.01 * place) for place, item in enumerate(["z999", "i033", "i002", "i000", "i001"])]
    return [[*first, *late], *later]


@KINDS
@pytest.mark.parametrize("quantizer", ["kmeans", "rqvae"])
def test_a_stage_rebuilt_with_late_rows_moves_no_code(tmp_path, kind, quantizer):
    config, workspace = settings_of(vectors=kind, quantizer=quantizer), made(tmp_path, invent_stages(), words())
    build_semantic_ids(config, workspace)
    before, coder = rows_of(workspace), (workspace.catalogue / "quantizer" / "codebooks.safetensors").read_bytes()
    write_stages(workspace, late_rows(), grown=True)
    report = build_semantic_ids(config, workspace)
    after, catalogue = rows_of(workspace), load_catalogue(workspace)
    assert (report.extended, report.collisions.items_sharing) == (34, 0)
    assert after.keys() - before.keys() == {"z999"}
    assert {item: after[item]["codes"] for item in before} == {item: before[item]["codes"] for item in before}
    assert (workspace.catalogue / "quantizer" / "codebooks.safetensors").read_bytes() == coder
    assert [after[item]["first_stage"] for item in ("z999", "i033", "i032")] == [0, 0, 2]
    assert catalogue.item_ids == sorted(after, key=lambda item: (after[item]["first_stage"], item))
    assert catalogue.known(0) == 26
    assert build_semantic_ids(config, workspace).reused


@KINDS
def test_items_of_a_stage_closed_after_a_rebuild_get_codes_beside_those_that_are_there(tmp_path, kind):
    config, workspace = settings_of(vectors=kind), made(tmp_path, invent_stages((24, 6)), words())
    build_semantic_ids(config, workspace)
    write_stages(workspace, late_rows()[:2], grown=True)
    build_semantic_ids(config, workspace)
    before = rows_of(workspace)
    write_stages(workspace, late_rows(), grown=True)
    build_semantic_ids(config, workspace)
    after = rows_of(workspace)
    assert {item: after[item] for item in before} == before
    assert len({tuple(row["codes"]) for row in after.values()}) == len(after) == 35


def test_a_catalogue_of_an_earlier_version_keeps_its_codes_when_a_stage_is_rebuilt(tmp_path):
    config, workspace = settings_of(vectors="tfidf"), made(tmp_path, invent_stages(), words())
    build_semantic_ids(config, workspace)
    path, manifest = workspace.catalogue / "items.parquet", workspace.catalogue / "manifest.json"
    pl.read_parquet(path).drop("coded").write_parquet(path)
    write_json(manifest, read_json(manifest) | {"digest": sha256_file(path)}, seal=True)
    before, noted = rows_of(workspace), load_catalogue(workspace).digest_of_codes(34)
    write_stages(workspace, late_rows(), grown=True)
    build_semantic_ids(config, workspace)
    after = rows_of(workspace)
    assert {item: after[item]["codes"] for item in before} == {item: before[item]["codes"] for item in before}
    assert load_catalogue(workspace).digest_of_codes(34) == noted


def test_stages_cut_anew_are_coded_anew(tmp_path):
    config, workspace = settings_of(vectors="cooccurrence"), made(tmp_path / "one", invent_stages(), words())
    build_semantic_ids(config, workspace)
    write_stages(workspace, late_rows())
    again = build_semantic_ids(config, workspace)
    assert again.extended == 0
    assert again.digest == build_semantic_ids(config, made(tmp_path / "other", late_rows(), words())).digest


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
    codes = coder.quantizer.encode(stage_vectors(config, workspace, coder, items, range(catalogue.known(0))))
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
