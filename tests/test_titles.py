"""Titles scored by a pretrained backbone in its own words, and a text's perplexity."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from models.backbone import pretrained_backbone
from models.generative import GenerativeModel
from models.titles import title_scores
from models.words import BackboneVocabulary
from stages.analysis import preservation, titles
from stages.analysis.measured import Scope, measured, preservation_rows, title_rows
from stages.analysis.titles import title_cases, title_ranks
from stages.candidates import draw_candidates
from stages.dataset import Dataset, load_dataset
from stages.errors import UserError
from stages.jobs import Job
from stages.train import train_stage
from tests import searching, tiny, worded


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of random weights with a tokenizer of words."""
    return worded.write_backbone(tmp_path_factory.mktemp("backbone"), (f"thing{n}" for n in range(tiny.ITEMS)))


def test_a_title_s_score_is_the_mean_log_probability_of_its_tokens(backbone: Path) -> None:
    whole = LlamaForCausalLM.from_pretrained(backbone).eval()
    model = GenerativeModel(pretrained_backbone(str(backbone)), 4, 0, full_vocabulary=False, dropout=0.0).eval()
    prompt, texts = [5, 9, 11], [[3], [7, 8, 2], [4, 4], [7, 8, 3]]
    found = title_scores(model, preservation.own_head(str(backbone)), prompt, texts)
    for title, score in zip(texts, found.tolist(), strict=True):
        tokens = torch.tensor([[1, *prompt, *title]])
        with torch.no_grad():
            log_p = whole(tokens).logits[0].log_softmax(dim=-1)
        expected = sum(float(log_p[len(prompt) + k, token]) for k, token in enumerate(title)) / len(title)
        assert score == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="title 1 is empty"):
        title_scores(model, preservation.own_head(str(backbone)), prompt, [[3], []])


def test_a_model_that_knows_nothing_has_the_vocabulary_s_size_as_perplexity(backbone: Path, tmp_path: Path) -> None:
    model = GenerativeModel(pretrained_backbone(str(backbone)), 4, 0, full_vocabulary=False, dropout=0.0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"thing{n % 16}" for n in range(600)), encoding="utf-8")
    stream = preservation.held_out_text(model, text, 10_000)
    head = preservation.own_head(str(backbone))
    assert preservation.text_perplexity(model, torch.zeros_like(head), stream) == pytest.approx(60)
    whole = LlamaForCausalLM.from_pretrained(backbone).eval()
    with torch.no_grad():
        rows = [batch.tokens for batch, _ in stream()]
        losses = [float(whole(row[None], labels=row[None]).loss) for batch in rows for row in batch]
    expected = math.exp(sum(losses) / len(losses))
    assert preservation.text_perplexity(model, head, stream) == pytest.approx(expected, rel=1e-4)
    text.write_text("find", encoding="utf-8")
    with pytest.raises(UserError, match="too short"):
        preservation.text_perplexity(model, head, stream)
    with pytest.raises(UserError, match=r"analysis\.text: corpus = .* is no file"):
        preservation.held_out_text(model, tmp_path / "none.txt", 10_000)


def many_items(dataset: Dataset) -> Dataset:
    """The ring's events on a catalogue of 120 items, enough for 99 negatives."""
    catalogue, extra = dataset.catalogue, range(tiny.ITEMS, 120)
    wider = replace(
        catalogue,
        item_ids=[*catalogue.item_ids, *(f"i{n}" for n in extra)],
        titles=[f"thing{n % tiny.ITEMS}" for n in range(120)],
        first_stage=np.concatenate([catalogue.first_stage, np.zeros(len(extra), dtype=np.int64)]),
    )
    return replace(dataset, catalogue=wider)


def test_cases_are_seeded_and_hold_the_target_once(tmp_path: Path) -> None:
    workspace, config = searching.ring(tmp_path, stages=1), tiny.config()
    dataset, job = many_items(load_dataset(config, workspace)), Job("first", 0, "same_stage", 0)
    cases = title_cases(config, dataset, job, "search", 5)
    again = title_cases(config, dataset, job, "search", 5)
    assert cases.prompts == again.prompts
    assert np.array_equal(cases.candidates, again.candidates)
    assert cases.candidates.shape == (5, 100)
    for prompt, row, place in zip(cases.prompts, cases.candidates, cases.place, strict=True):
        assert len(set(row.tolist())) == 100
        assert f'searched for "find thing{row[place]}"' in prompt
        assert prompt.startswith("A customer took: thing")
    plain = title_cases(config, dataset, job, "recommendation", 3).prompts
    assert all(prompt.endswith("Next, the customer took:") for prompt in plain)


def test_a_pretrained_model_is_held_against_its_untuned_self(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"thing{n % 16}" for n in range(600)), encoding="utf-8")
    quick = {"first_epochs": 1, "epochs": 1}
    own = {"path": str(backbone), "precision": "float32"}
    config = tiny.config(training=quick, backbone=own, analysis={"titles": 4, "text": str(text)})
    workspace = searching.ring(tmp_path / "ring", stages=2)
    train_stage(config, workspace, Job("single", 0, "same_stage", 1))
    scope = Scope(
        config, workspace, load_dataset(config, workspace), ("single",), 0, "same_stage", 1, (), lambda _: None
    )
    notes: list[str] = []
    found = preservation_rows(scope, notes)
    assert found["text"]
    assert [row["stage"] for row in found["perplexity"]] == [0, 1]
    assert found["perplexity"][1]["before"] == found["perplexity"][0]["value"]
    assert {row["value"] for row in found["drift"] if row["stage"] == 0} == {0.0}
    assert notes == []
    untuned = GenerativeModel(pretrained_backbone(str(backbone)), 4, 0, full_vocabulary=False, dropout=0.0)
    stream = preservation.held_out_text(untuned, text, config.analysis.text_tokens)
    head = preservation.own_head(str(backbone))
    assert found["untuned"] == pytest.approx(preservation.text_perplexity(untuned, head, stream), rel=1e-6)
    assert found["untuned"] != pytest.approx(found["perplexity"][0]["value"], rel=1e-4)  # stage 0 moved it
    assert title_rows(scope, notes) == []  # sixteen items are no hundred
    assert "Titles were not scored" in notes[0]
    monkeypatch.setattr(titles, "draw_candidates", partial(draw_candidates, negatives=5))
    rows = title_rows(scope, notes)
    assert [(row["objective"], row["cutoff"], row["cases"]) for row in rows] == [
        (objective, cutoff, 4) for objective in ("recommendation", "search") for cutoff in (5, 10)
    ]
    assert [row["before"] + row["gained"] - row["lost"] for row in rows if row["cutoff"] == 10] == [4, 4]  # of six
    assert all(row["before"] + row["gained"] <= row["cases"] for row in rows)
    assert title_rows(replace(scope, config=tiny.config()), notes) == []
    assert "reads no titles" in notes[-1]


def test_a_text_that_a_method_protected_is_not_held_out(tmp_path: Path) -> None:
    for name, words in (("kept.txt", "one two"), ("copy.txt", "one two"), ("other.txt", "three")):
        (tmp_path / name).write_text(words, encoding="utf-8")

    def refused(text: str, **settings: str) -> str | None:
        own = {"method": "gems", "corpus": str(tmp_path / "kept.txt"), **settings}
        config = tiny.config(methods={"keeper": own}, analysis={"text": str(tmp_path / text)})
        nothing = cast(Any, None)
        scope = Scope(config, nothing, nothing, ("single", "keeper"), 0, "same_stage", 1, (), lambda _: None)
        try:
            preservation.refuse_protected(config, scope.methods)
        except UserError as error:
            with pytest.raises(UserError, match="not held out"):  # before anything is read
                measured(scope)
            return str(error)
        return None

    for text in ("kept.txt", "copy.txt"):
        message = refused(text)
        assert message is not None
        assert "analysis.text and methods.keeper.corpus are the same text" in message
        assert message.endswith("name another file in analysis.text")
    assert refused("other.txt") is refused("none.txt") is refused("kept.txt", null_space="off") is None
    other = tiny.config(analysis={"text": str(tmp_path / "kept.txt")})
    preservation.refuse_protected(other, ("single", "gems"))


def test_a_titles_rank_counts_the_likelier_ones(backbone: Path, tmp_path: Path) -> None:
    workspace, config = searching.ring(tmp_path, stages=1), tiny.config()
    dataset = many_items(load_dataset(config, workspace))
    cases = title_cases(config, dataset, Job("first", 0, "same_stage", 0), "search", 6)
    model = GenerativeModel(pretrained_backbone(str(backbone)), 4, 0, full_vocabulary=False, dropout=0.0).eval()
    head, vocabulary = preservation.own_head(str(backbone)), BackboneVocabulary(str(backbone))
    ranks = title_ranks(model, head, vocabulary, dataset, cases)
    for rank, prompt, row, place in zip(ranks, cases.prompts, cases.candidates, cases.place, strict=True):
        texts = [vocabulary.encode(f" {dataset.catalogue.titles[item]}") for item in row]
        scores = title_scores(model, head, vocabulary.encode(prompt), texts)
        assert rank == 1 + int((scores > scores[place]).sum() + (scores[:place] == scores[place]).sum())
    assert len(set(ranks.tolist())) > 1
