"""The 99 + 1 mode: exact scores, one candidate file a split, and metrics that ranks can give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy import sparse

from flows.reporting import sections
from flows.reporting.findings import Findings
from models.backbone import small_backbone
from models.baselines.last_category import LastCategory
from models.beam import beam_search
from models.candidates import score_codes
from models.generative import GenerativeModel
from models.trie import Trie
from stages.analysis_config import AnalysisConfig
from stages.candidates import draw_candidates
from stages.config import BackboneConfig, load_config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import evaluate_stage
from stages.interactions import Interactions
from stages.items import build_semantic_ids
from stages.jobs import Evaluation, Job
from stages.log import read_log
from stages.metrics import hit_at_k, ndcg_at_k
from stages.queries import next_stage_tests
from stages.ranking import asking_of, targets_of
from stages.sampled import (
    LAST_CATEGORY,
    RANDOM,
    _means,
    check_identities,
    evaluate_sampled,
    last_category_rows,
    sampled_ranks,
    sampled_rows,
    untuned_rows,
)
from stages.split import split_stages
from stages.synthetic import write_demo_log
from stages.train import train_stage
from stages.workspace import Workspace
from tests import conftest, tiny, worded


def metrics_of(rank: np.ndarray) -> dict[str, float]:
    alone = np.ones(len(rank), dtype=np.int64)
    found = {f"hit_at_{k}": hit_at_k(rank, alone, k).mean() for k in (5, 10)}
    return {**found, **{f"ndcg_at_{k}": ndcg_at_k(rank, alone, k).mean() for k in (5, 10)}}


def test_a_random_ranker_scores_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    rank = sampled_ranks(rng.random((10_000, 100)), rng.integers(0, 100, 10_000))
    found = metrics_of(rank)
    check_identities(found)
    for name, expected in RANDOM.items():
        spread = np.sqrt(expected * (1 - expected) / 10_000)  # an upper bound for NDCG
        assert abs(found[name] - expected) < 3 * spread, name


def test_equal_scores_do_not_favour_the_target() -> None:
    place = np.random.default_rng(0).integers(0, 100, 10_000)
    rank = sampled_ranks(np.zeros((10_000, 100)), place)
    assert abs(metrics_of(rank)["hit_at_10"] - 0.1) < 0.01
    assert sampled_ranks(np.array([[1.0, 2.0, 1.0, 1.0]]), np.array([2])).tolist() == [3]
    assert sampled_ranks(np.array([[-np.inf, 2.0, 1.0]]), np.array([1])).tolist() == [1]


@pytest.mark.parametrize(
    ("name", "change"), [("ndcg_at_5", 0.03), ("ndcg_at_5", -0.03), ("ndcg_at_10", 0.02), ("ndcg_at_10", -0.02)]
)
def test_numbers_that_no_ranks_can_give_are_refused(name: str, change: float) -> None:
    found = metrics_of(np.random.default_rng(1).integers(1, 101, 500))
    check_identities(found)
    with pytest.raises(ValueError, match="the ranks are wrong"):
        check_identities({**found, name: found[name] + change})


def test_a_line_of_numbers_that_no_ranks_can_give_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = pl.DataFrame({"user": [0, 1], "objective": ["search"] * 2, "rank": [1, 7]})
    job = Job("single", 0, "same_stage", 1)
    (row,) = _means(ranked, job, 1)
    assert (row["hit_at_5"], row["hit_at_10"]) == (0.5, 1.0)
    monkeypatch.setattr("stages.sampled.ndcg_at_k", lambda rank, tied, k: 0.3 * hit_at_k(rank, tied, k))
    with pytest.raises(ValueError, match="the ranks are wrong"):
        _means(ranked, job, 1)


def drawing(histories: list[list[int]], targets: list[list[int]]) -> tuple[Interactions, np.ndarray, np.ndarray]:
    """A log whose last stage asks each user for a basket of targets; queries and items of the targets."""
    rows = [*map(len, histories)], [*map(len, targets)]
    items = np.array([item for own, asked in zip(histories, targets, strict=True) for item in (*own, *asked)])
    stages = np.concatenate([np.repeat([0, 1], [a, b]) for a, b in zip(*rows, strict=True)])
    baskets = np.concatenate([[*range(a), *[a] * b] for a, b in zip(*rows, strict=True)])
    offsets = np.cumsum([0, *(a + b for a, b in zip(*rows, strict=True))])
    log = Interactions([f"u{n}" for n in range(len(histories))], offsets, items, stages, baskets)
    found = targets_of(log, next_stage_tests(log, 1))
    return log, found.query, found.item


def test_candidates_are_distinct_and_outside_history_and_targets() -> None:
    log, query, item = drawing([[0, 1, 2], [5]], [[3, 4], [6]])
    asking = asking_of(log, next_stage_tests(log, 1), "recommendation", "both", exclude_history=True)
    for seed in range(20):
        found, place = draw_candidates(asking, query, item, np.ones(12), seed, negatives=6)
        assert found.shape == (3, 7)
        assert (found[np.arange(3), place] == item).all()
        assert all(len(set(line)) == 7 for line in found.tolist())
        assert all(not {0, 1, 2} & set(line) for line in found[:2].tolist())
        assert [len({3, 4} & set(line)) for line in found[:2].tolist()] == [1, 1]
        assert 5 not in found[2]
    again = draw_candidates(asking, query, item, np.ones(12), 19, negatives=6)
    assert np.array_equal(again[0], found)
    with pytest.raises(UserError, match="needs 8 items outside a user's history"):
        draw_candidates(asking, query, item, np.ones(12), 0, negatives=8)


def test_candidates_are_drawn_by_their_weights_and_the_targets_place_by_lot() -> None:
    log, query, item = drawing([[0]] * 3000, [[1]] * 3000)
    asking = asking_of(log, next_stage_tests(log, 1), "recommendation", "both", exclude_history=True)
    weights = np.array([0, 0, 1, 2, 4, 8, 0], dtype=float)
    found, place = draw_candidates(asking, query, item, weights, seed=3, negatives=1)
    drawn = np.bincount(found[np.arange(3000), 1 - place], minlength=7) / 3000
    assert drawn == pytest.approx(weights / weights.sum(), abs=0.03)
    assert np.bincount(place) / 3000 == pytest.approx([0.5, 0.5], abs=0.03)
    found, place = draw_candidates(asking, query, item, weights, seed=3, negatives=5)
    assert {tuple(sorted(line)) for line in found.tolist()} == {(1, 2, 3, 4, 5, 6)}
    assert np.bincount(place, minlength=6) / 3000 == pytest.approx(np.full(6, 1 / 6), abs=0.03)


def test_the_best_of_the_words_come_first_and_others_are_drawn_to_fill() -> None:
    log, query, item = drawing([[0]] * 400, [[1]] * 400)
    asking = asking_of(log, next_stage_tests(log, 1), "recommendation", "both", exclude_history=True)
    scores = np.array([9.0, 8.0, 0.0, 0.5, 0.25, 0.0, 0.0, 0.25, 0.0])  # of history, target and others

    def first(batch: np.ndarray) -> Any:
        return sparse.csr_array(np.tile(scores, (len(batch), 1)))

    def chosen(negatives: int) -> np.ndarray:
        found, place = draw_candidates(asking, query, item, np.ones(9), 0, negatives, first)
        assert (found[np.arange(400), place] == 1).all()
        return np.bincount(found.ravel(), minlength=9) / 400

    assert chosen(1) == pytest.approx([0, 1, 0, 1, 0, 0, 0, 0, 0])
    assert chosen(2) == pytest.approx([0, 1, 0, 1, 0.5, 0, 0, 0.5, 0], abs=0.1)  # equal scores by lot
    assert chosen(3) == pytest.approx([0, 1, 0, 1, 1, 0, 0, 1, 0])
    assert chosen(5) == pytest.approx([0, 1, 0.5, 1, 1, 0.5, 0.5, 1, 0.5], abs=0.1)  # filled by lot


def test_the_last_items_category_stands_above_popularity_by_hand() -> None:
    categories = [["a"], ["a", "b"], ["b"], [], ["c"], ["a"]]
    model = LastCategory(categories, np.array([1, 2, 3, 9, 5, 0]))
    histories = [np.array(own, dtype=np.int64) for own in ([4, 0], [1], [3], [], [7])]
    scores = model.score(histories, np.tile(np.arange(6), (5, 1)), queries=["c"] * 5)
    ranked = [np.argsort(-line, kind="stable").tolist() for line in scores]
    popular = [3, 4, 2, 1, 0, 5]
    assert ranked == [[1, 0, 5, 3, 4, 2], [2, 1, 0, 5, 3, 4], popular, popular, popular]
    assert scores[3].tolist() == [1, 2, 3, 9, 5, 0]
    few = model.score(histories[:1], np.array([[5, 3]]))
    assert few[0, 0] > few[0, 1]


def test_a_candidates_score_is_the_sum_of_its_codes_log_probabilities() -> None:
    backbone = small_backbone(hidden=16, layers=2, heads=2, feed_forward=32, seed=0)
    model = GenerativeModel(backbone, codes=9, seed=0, full_vocabulary=False, dropout=0.0).eval()
    codes = np.array([[a, b, c] for a in range(3) for b in range(3) for c in range(2)])
    offsets = torch.tensor([0, 3, 6])
    prompts = torch.tensor([[9, 0, 3, 6], [9, 9, 9, 9], [9, 2, 5, 9]])
    lengths = torch.tensor([4, 1, 3])
    chosen = torch.from_numpy(codes) + offsets
    with torch.no_grad():
        found = score_codes(model, prompts, lengths, chosen.expand(3, -1, -1))
        for line, length in enumerate(lengths.tolist()):
            for place, own in enumerate(chosen):
                tokens = torch.cat([prompts[line, :length], own])[None]
                log_p = model.logits(model.hidden(tokens[:, :-1])).log_softmax(dim=-1)[0, length - 1 :]
                expected = log_p[torch.arange(3), own].sum()
                assert float(found[line, place]) == pytest.approx(float(expected), abs=1e-4)
        leaves, scores = beam_search(model, Trie.build(codes), offsets, prompts, lengths, width=18)
    torch.testing.assert_close(found.gather(1, leaves), scores, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workspace]:
    """A generated log with enough items to draw from, read, cut and coded."""
    folder = tmp_path_factory.mktemp("sampled")
    path = conftest.write_tiny_experiment(folder)
    write_demo_log(folder, seed=0, users=40, items=200, stages=2)
    text = path.read_text(encoding="utf-8").replace("where = \"event = 'recommendation'\"\n", "")
    path.write_text(f'{text}\nnegatives = "uniform"\n', encoding="utf-8")
    config, workspace = load_config(path), Workspace(folder / "workspace")
    read_log(config, workspace)
    split_stages(config, workspace)
    build_semantic_ids(config, workspace)
    return path, workspace


def test_every_method_ranks_the_same_candidates_and_the_page_shows_them_apart(shop: tuple[Path, Workspace]) -> None:
    config, workspace = load_config(shop[0]), shop[1]
    jobs = [Job(name, 0, "same_stage", 1) for name in ("single", "popularity", "item_graph", "bm25")]
    train_stage(config, workspace, jobs[0])
    cells = [evaluate_stage(config, workspace, job, tested=1) for job in jobs]
    rows = sampled_rows(config, workspace, cells)
    assert len(list((workspace.stages / "candidates").glob("*.parquet"))) == 2  # one an objective
    assert {(row["method"], row["objective"]) for row in rows} == {
        (name, kind) for name in [*(job.method for job in jobs), LAST_CATEGORY] for kind in ("recommendation", "search")
    } - {("bm25", "recommendation")}
    assert len({row["targets"] for row in rows if row["objective"] == "recommendation"}) == 1
    text = max(rows, key=lambda row: row["hit_at_5"] * (row["objective"] == "search"))
    assert text["method"] == "bm25"
    report = conftest.invent_report()
    report["sampled"] = {"negatives": "uniform", "count": 99, "random": RANDOM, "rows": rows}
    page = str(sections.sampled(Findings(report)))
    assert "last_category" in page
    # Half of what this shop's customers take next is of the category of what they took last.
    last = {row["objective"]: row["hit_at_5"] for row in rows if row["method"] == LAST_CATEGORY}
    assert min(last.values()) > 2 * RANDOM["hit_at_5"]
    assert "99 + 1 candidates" in page
    assert "random" in page
    assert "0.0295" in page
    files = {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*.parquet")}
    assert sampled_rows(config, workspace, cells) == rows
    assert {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*.parquet")} == files
    # A bit that flips in the ranks or in the candidates is noticed, and the same are made again.
    ranks = [path for path in workspace.evaluations.glob("*.uniform-*.parquet") if "single" in path.name]
    for path in (*ranks, *(workspace.stages / "candidates").glob("*.parquet")):
        whole = path.read_bytes()
        path.write_bytes(whole[:40] + bytes([whole[40] ^ 4]) + whole[41:])
        for one in ranks:  # the candidates are looked at where ranks are missing
            one.with_suffix(".json").write_text("{}")
        assert sampled_rows(config, workspace, cells) == rows
        assert path.read_bytes() == whole


def test_negatives_by_words_are_hard_for_a_search_and_uniform_for_a_recommendation(
    shop: tuple[Path, Workspace],
) -> None:
    config, workspace = load_config(shop[0]), shop[1]
    words = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"negatives": "bm25_first"})})
    cells = [evaluate_stage(config, workspace, Job("bm25", 0, "next_stage", 0), tested=1)]
    easy, hard = (
        {(row["method"], row["objective"]): row for row in sampled_rows(own, workspace, cells)}
        for own in (config, words)
    )
    assert easy["bm25", "search"]["targets"] > 20
    assert hard["bm25", "search"]["ndcg_at_10"] < easy["bm25", "search"]["ndcg_at_10"]
    assert hard[LAST_CATEGORY, "recommendation"] == easy[LAST_CATEGORY, "recommendation"]
    drawn = {path.name.rsplit("-", 1)[0] for path in (workspace.stages / "candidates").glob("*.parquet")}
    assert "next_stage-search-on01-bm25_first" in drawn
    assert "next_stage-recommendation-on01-bm25_first" not in drawn


def test_an_untuned_backbone_ranks_the_same_candidates_by_their_titles(
    shop: tuple[Path, Workspace], tmp_path: Path
) -> None:
    config, workspace = load_config(shop[0]), shop[1]
    cell = Evaluation(Job("single", 0, "next_stage", 0), 1, "", "", 0.0, 0, sampled=False)
    assert untuned_rows(config, workspace, cell) == []  # `small` knows no words before it is trained
    titles = load_dataset(config, workspace).catalogue.titles
    path = str(worded.write_backbone(tmp_path, sorted({word for title in titles for word in title.split()})))
    asked = config.model_copy(update={"backbone": BackboneConfig(path=path), "analysis": AnalysisConfig(titles=7)})
    rows = untuned_rows(asked, workspace, cell)
    assert [(row["method"], row["objective"], row["targets"]) for row in rows] == [
        ("untuned", "recommendation", 7),
        ("untuned", "search", 7),
    ]
    assert untuned_rows(asked, workspace, cell) == rows  # kept, and read back
    assert all(0 < row["reachable"] <= 1 for row in rows)  # of the targets: no ranker finds one outside the catalogue
    assert untuned_rows(asked.model_copy(update={"analysis": AnalysisConfig(titles=0)}), workspace, cell) == []


def test_a_log_without_categories_has_no_line_for_them(tmp_path: Path) -> None:
    config, workspace = tiny.config(evaluation={"negatives": "uniform"}), tiny.checkerboard(tmp_path, stages=2)
    cell = Evaluation(Job("popularity", 0, "same_stage", 1), 1, "x.parquet", "d", 1.0, 1, sampled=False)
    assert last_category_rows(config, workspace, cell) == []


def test_the_mode_changes_no_full_ranking_and_is_off_by_default(shop: tuple[Path, Workspace]) -> None:
    config, workspace = load_config(shop[0]), shop[1]
    job = Job("popularity", 0, "same_stage", 1)
    off = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"negatives": "off"})})
    cells = [evaluate_stage(own, workspace, job, tested=1) for own in (config, off)]
    assert cells[0].path == cells[1].path
    assert evaluate_sampled(off, workspace, cells[1]) is None
    popular = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"negatives": "popularity"})})
    path = evaluate_sampled(popular, workspace, cells[0])
    assert path is not None
    uniform = evaluate_sampled(config, workspace, cells[0])
    assert uniform is not None
    ranks = [pl.read_parquet(one)["rank"].mean() for one in (path, uniform)]
    assert float(ranks[0] or 0) > float(ranks[1] or 0)  # pyright: ignore  # popular negatives are harder for popularity
