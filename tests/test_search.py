"""Both objectives through training, evaluation and the baselines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.baselines.bm25 import K1, B, Bm25
from stages.checkpoint import ADAPTER, ROWS, read_tensors
from stages.commit import checkpoint_folder
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import evaluate_stage, recommender
from stages.evaluate import test_queries as asked
from stages.item_vectors import training_events
from stages.jobs import Evaluation, Job
from stages.train import train_stage, training_log
from stages.workspace import Workspace
from tests import searching, tiny

QUICK = {"training": {"first_epochs": 2, "epochs": 2}}


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return searching.ring(tmp_path_factory.mktemp("ring"))


def job(method: str, stage: int) -> Job:
    return Job(method, 0, "same_stage", stage)


def rows(workspace: Workspace, done: Evaluation) -> pl.DataFrame:
    return pl.read_parquet(workspace.root / done.path)


def test_one_model_learns_what_follows_and_what_a_query_names(ring: Workspace) -> None:
    config = tiny.config(training={"first_epochs": 60, "patience": 60, "batch_size": 16})
    train_stage(config, ring, job("single", 0))
    found = rows(ring, evaluate_stage(config, ring, job("single", 0), tested=0))
    scores = {str(name): part["hit_at_1"].mean() for (name,), part in found.group_by("objective")}
    assert set(scores) == {"recommendation", "search"}
    assert min(float(score or 0) for score in scores.values()) > 0.8  # pyright: ignore
    log = training_log(config, ring, load_dataset(config, ring), job("first", 0))
    assert log["training"][0].keys() >= {"ce/search", "ce/recommendation"}
    assert set(log["targets_by_objective"]) == {"recommendation", "search"}


@pytest.mark.parametrize("method", ["single", "peso", "cumulative_sum", "full_finetune"])
def test_a_later_stage_goes_on_from_what_searches_taught(method: str, tmp_path: Path) -> None:
    config = tiny.config(**QUICK, search={"mix": "equal"})
    digests = []
    for copy in ("a", "b"):
        workspace = searching.ring(tmp_path / copy, stages=2)
        train_stage(config, workspace, job(method, 1))
        folder = checkpoint_folder(config, workspace, load_dataset(config, workspace), job(method, 1))
        digests.append({path.name: path.read_bytes() for path in folder.glob("*.safetensors")})
        found = rows(workspace, evaluate_stage(config, workspace, job(method, 1), tested=1))
        assert found["objective"].unique().sort().to_list() == ["recommendation", "search"]
    assert digests[0] == digests[1]


def test_without_its_searches_a_log_gives_the_weights_of_a_log_that_had_none(tmp_path: Path) -> None:
    config = tiny.config(**QUICK, search={"objectives": ["recommendation"]})
    with_searches, without = searching.ring(tmp_path / "a", stages=1), searching.ring(tmp_path / "b", stages=1)
    purchases = pl.read_parquet(without.stage_file(0)).filter(pl.col("event") == "recommendation")
    purchases.write_parquet(without.stage_file(0))
    plain = tiny.config(**QUICK)
    stored = []
    for own, workspace in ((config, with_searches), (plain, without)):
        train_stage(own, workspace, job("single", 0))
        folder = checkpoint_folder(own, workspace, load_dataset(own, workspace), job("first", 0))
        stored.append({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"})
    assert folder.name in {path.name for path in with_searches.checkpoints.iterdir()}
    assert stored[0] == stored[1]


def test_a_recommendation_can_be_made_to_rest_on_purchases_alone(ring: Workspace) -> None:
    config = tiny.config(**QUICK, search={"rec_history": "recommendation"})
    train_stage(config, ring, job("single", 0))
    found = rows(ring, evaluate_stage(config, ring, job("single", 0), tested=0))
    assert set(found["objective"]) == {"recommendation", "search"}


@pytest.mark.parametrize("name", ["popularity", "recent_popularity", "item_graph", "bm25"])
def test_baselines_answer_the_objectives_they_can(name: str, ring: Workspace) -> None:
    found = rows(ring, evaluate_stage(tiny.config(), ring, job(name, 1), tested=1))
    wanted = ["search"] if name == "bm25" else ["recommendation", "search"]
    assert found["objective"].unique().sort().to_list() == wanted
    if name == "bm25":  # a query names its item, and items carry the queries that found them
        assert found["hit_at_1"].to_numpy().mean() > 0.8


def test_every_model_is_asked_the_same_queries(ring: Workspace) -> None:
    config = tiny.config(**QUICK)
    train_stage(config, ring, job("single", 1))
    places = []
    for name in ("single", "popularity", "item_graph"):
        found = rows(ring, evaluate_stage(config, ring, job(name, 1), tested=1))
        places.append(found.select("user", "cut", "targets", "objective", "new_item", "repeat"))
    assert places[0].equals(places[1])
    assert places[0].equals(places[2])


def test_bm25_by_hand() -> None:
    documents = ["red shoe", "red red hat", "blue hat and scarf"]
    lengths = np.array([2, 3, 4])
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # red stands in two of three documents
    counts = np.array([1, 2])
    expected = idf * counts * (K1 + 1) / (counts + K1 * (1 - B + B * lengths[:2] / 3))
    lists = Bm25(documents, np.array([2, 2]), exclude_history=False).recommend([np.array([], int)], 3, ["RED"])
    assert lists.items.tolist() == [[1, 0, 2]]
    assert lists.scores[0, :2] == pytest.approx(expected[::-1], rel=1e-6)
    assert lists.scores[0, 2] < 0  # without a word of the query, behind


def test_bm25_breaks_ties_by_popularity_and_leaves_the_history_out() -> None:
    documents = ["hat", "hat", "hat", "shoe"]
    nobody = np.array([], dtype=np.int64)
    plain = Bm25(documents, np.array([1, 1, 2]), exclude_history=False)
    assert plain.recommend([nobody, nobody], 4, ["hat", "unknown"]).items.tolist() == [[1, 2, 0, 3], [1, 2, 0, 3]]
    fresh = Bm25(documents, np.array([1, 1, 2]), exclude_history=True)
    assert fresh.recommend([np.array([1])], 4, ["hat"]).items.tolist() == [[2, 0, 3, -1]]
    with pytest.raises(ValueError, match="bm25 answers searches only"):
        plain.recommend([nobody], 1)


def test_a_search_baseline_refuses_a_log_without_searches(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=1)
    with pytest.raises(UserError, match="bm25 answers searches only"):
        evaluate_stage(tiny.config(), workspace, job("bm25", 0), tested=0)


def test_a_model_without_searches_refuses_a_query(tmp_path: Path) -> None:
    workspace, config = tiny.checkerboard(tmp_path, stages=1), tiny.config(**QUICK)
    train_stage(config, workspace, job("single", 0))
    model = recommender(config, workspace, load_dataset(config, workspace), job("single", 0))
    with pytest.raises(ValueError, match="trained without searches"):
        model.recommend([np.array([1])], 5, ["hat"])


def test_a_log_of_searches_alone_is_trained_and_tested(tmp_path: Path) -> None:
    workspace, config = searching.ring(tmp_path, stages=1), tiny.config(**QUICK)
    found = pl.read_parquet(workspace.stage_file(0)).filter(pl.col("event") == "search")
    found.write_parquet(workspace.stage_file(0))
    train_stage(config, workspace, job("single", 0))
    for name in ("single", "popularity", "recent_popularity", "item_graph", "bm25"):
        done = evaluate_stage(config, workspace, job(name, 0), tested=0)
        assert done.queries > 0
        assert set(rows(workspace, done)["objective"]) == {"search"}
    items = pl.read_parquet(workspace.catalogue / "items.parquet")
    assert len(training_events(config, workspace, items, 0)[0]) > 0


def test_a_pretrained_backbone_reads_queries_with_its_own_words_and_leaves_them_alone(tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=60, bos_token_id=1, **sizes)).save_pretrained(folder)
    words = {"<unk>": 0, "find": 2, **{f"thing{item}": 10 + item for item in range(tiny.ITEMS)}}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    workspace = searching.ring(tmp_path / "ring", stages=2)
    config = tiny.config(**QUICK, backbone={"path": str(folder), "precision": "float32"})
    train_stage(config, workspace, job("single", 1))
    own = load_dataset(config, workspace)
    stored = checkpoint_folder(config, workspace, own, job("single", 1))
    assert {path.name for path in stored.glob("*.safetensors")} == {ADAPTER, ROWS}
    assert set(read_tensors(stored).rows) == {"input_rows", "output_rows", "marker_rows"}
    model = recommender(config, workspace, own, job("single", 1))
    lists = model.recommend([np.array([1])] * 2, 5, ["find thing3", "find thing9"])
    assert lists.scores[0].tolist() != lists.scores[1].tolist()


def test_repeats_are_asked_for_on_request(ring: Workspace) -> None:
    own = load_dataset(tiny.config(), ring)
    counts = []
    for repeats in ("leave_out", "ask"):
        config = tiny.config(search={"repeats": repeats})
        counts.append(
            [len(asked(config, own, job("single", 0), 0, None, name)) for name in own.interactions.objectives]
        )
    assert counts[0] == counts[1]  # nine steps on a ring of sixteen repeat nothing
    once = own.interactions
    twice = replace(own, interactions=replace(once, items=np.where(once.searched, once.items, 0)))
    leaving, asking = (
        len(asked(tiny.config(search={"repeats": repeats}), twice, job("single", 0), 0, None, "recommendation"))
        for repeats in ("leave_out", "ask")
    )
    assert leaving == 0
    assert asking == counts[0][0]
