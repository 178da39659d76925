"""The public logs of docs/data.md, read with the configs as they stand; counts are properties of the data sets."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from stages.config import Config, load_config
from stages.log import LogReport, read_log
from stages.split import Stage, split_stages
from stages.workspace import Workspace
from tests.public import public_log

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Reader = Callable[[str], tuple[LogReport, list[Stage], Workspace]]


@pytest.fixture
def real(tmp_path: Path) -> Reader:
    public_log()

    def read(name: str) -> tuple[LogReport, list[Stage], Workspace]:
        config, workspace = load_config(CONFIGS / f"{name}.toml"), Workspace(tmp_path / name)
        return read_log(config, workspace), split_stages(config, workspace), workspace

    return read


def frequent(workspace: Workspace, stage: Stage) -> int:
    """Users with at least five rows in the stage."""
    rows = pl.read_parquet(workspace.root / stage.path, columns=["user_id", "event"])
    kind = "search" if "search" in rows["event"] else "recommendation"
    users = rows.filter(event=kind)["user_id"].value_counts()
    return int((users["count"] >= 5).sum())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_loads_and_is_named_like_its_file(path, monkeypatch, tmp_path):
    monkeypatch.setenv("DRIFTREC_DATA", str(tmp_path))
    config = load_config(path)
    assert isinstance(config, Config)
    assert config.name == path.stem


def test_online_retail_has_the_counts_of_its_cleaning_rules(real: Reader):
    report, stages, workspace = real("online_retail")
    assert (report.accepted, report.users, report.items) == (766_079, 5_852, 4_619)
    assert (report.rows, report.duplicates, report.rejected) == (1_056_743, 22_108, {})
    assert (report.first, report.last) == ("2009-12-01T07:45:00+00:00", "2011-12-09T12:50:00+00:00")
    table = [(s.start and s.start[:16], s.events, s.users, s.returning_users, s.items, s.new_items) for s in stages]
    assert table == [
        ("2009-12-01T07:45", 459_636, 4_622, 0, 4_080, 4_080),
        ("2011-03-20T10:33", 76_614, 1_988, 1_644, 2_840, 221),
        ("2011-06-16T13:48", 76_567, 1_875, 1_574, 2_802, 151),
        ("2011-09-12T12:27", 76_648, 1_964, 1_590, 2_810, 141),
        ("2011-11-02T08:44", 76_614, 1_880, 1_669, 2_757, 26),
    ]
    assert [frequent(workspace, stage) for stage in stages] == [4_382, 1_845, 1_742, 1_833, 1_731]
    raw = pl.read_parquet(workspace.catalogue / "raw.parquet")
    assert set(raw["item_id"]) <= set(pl.read_parquet(workspace.log)["item_id"])
    assert raw["timestamp"].null_count() == 0


def test_online_retail_before_products_are_picked_has_its_published_size(real: Reader, tmp_path: Path):
    config = load_config(CONFIGS / "online_retail.toml")
    products = "AND StockCode ~ '^[0-9]{5}'"
    plain = [
        source.model_copy(update={"distinct": [], "where": str(source.where).replace(products, "")})
        for source in config.log.sources
    ]
    log = config.log.model_copy(update={"sources": plain})
    catalogue = config.catalogue.model_copy(update={"sources": []})
    report = read_log(config.model_copy(update={"log": log, "catalogue": catalogue}), Workspace(tmp_path / "w"))
    assert report.accepted + report.duplicates == 791_044
    assert (report.users, report.items) == (5_878, 4_631)


def test_the_video_games_blocks_have_their_published_counts(real: Reader):
    report, stages, _ = real("video_games")
    assert (report.accepted, report.users, report.items, report.short_users) == (134_173, 17_300, 25_935, 0)
    assert [(s.users, s.returning_users, s.events, s.items, s.new_items) for s in stages] == [
        (12_447, 0, 91_273, 18_450, 18_450),
        (1_035, 229, 7_491, 4_537, 1_467),
        (1_091, 219, 7_492, 4_269, 1_490),
        (1_949, 246, 14_646, 5_951, 2_612),
        (1_791, 319, 13_271, 5_641, 1_916),
    ]
    assert [s.events - 2 * s.users for s in stages] == [66_379, 5_421, 5_310, 10_748, 9_689]


def test_the_lastfm_tags_have_the_counts_of_their_month_boundaries(real: Reader):
    report, stages, workspace = real("lastfm_search")
    # Every tag is a search event; each artist a user touched in a month is one recommendation event besides.
    assert (report.accepted, report.users, report.items) == (186_473 + 84_984, 1_892, 12_523)
    assert report.filtered == 2  # the first file's empty line, met by both sources
    assert [(s.users, s.returning_users, s.items, s.new_items) for s in stages[1:]] == [
        (584, 414, 4_192, 694),
        (603, 406, 3_847, 627),
        (589, 462, 3_890, 573),
        (626, 518, 3_965, 496),
    ]
    assert [frequent(workspace, stage) for stage in stages[1:]] == [342, 348, 359, 358]
    log = pl.read_parquet(workspace.log)
    tags, touches = (log.filter(event=kind) for kind in ("search", "recommendation"))
    assert (len(tags), tags["query"].null_count()) == (186_473, 0)
    assert len(touches) == touches.select("user_id", "item_id", "timestamp").unique().height == 84_984
    assert set(report.rejected) == {"timestamp before log.earliest"}
    raw = pl.read_parquet(workspace.catalogue / "raw.parquet")
    assert len(set(log["item_id"]) - set(raw["item_id"])) == 390


def test_the_s3rec_sequences_are_one_stage(real: Reader):
    report, (stage,), _ = real("s3rec_lastfm")
    assert (report.users, report.items, report.accepted) == (1_090, 3_646, 52_551)
    assert (stage.index, stage.events, stage.start) == (0, 52_551, None)


def test_movielens_layouts_are_read_from_invented_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFTREC_DATA", str(tmp_path))
    one, csv = tmp_path / "ml-1m", tmp_path / "ml-latest-small"
    one.mkdir()
    csv.mkdir()
    rows = [(place % 3 + 1, place + 1, 5, 978_300_000 + place * 1000) for place in range(10)]
    (one / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows))
    (one / "movies.dat").write_bytes("1::Caf\xe9: Noir (1999)::Drama|Comedy\n".encode("latin-1"))
    (csv / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in rows)
    )
    (csv / "movies.csv").write_text('movieId,title,genres\n1,"Caf\xe9: Noir (1999)",Drama|Comedy\n', encoding="utf-8")
    digests = set()
    for name in ("movielens_1m", "movielens_csv"):
        config, workspace = load_config(CONFIGS / f"{name}.toml"), Workspace(tmp_path / name)
        report = read_log(config, workspace)
        assert [stage.events for stage in split_stages(config, workspace)] == [6, 1, 1, 1, 1]
        (item,) = pl.read_parquet(workspace.catalogue / "raw.parquet").to_dicts()
        assert (item["title"], item["categories"]) == ("Café: Noir (1999)", ["Drama", "Comedy"])
        assert item["text"] == "Café: Noir (1999) Drama Comedy"
        digests.add((report.digest, report.catalogue_digest))
    assert len(digests) == 1
