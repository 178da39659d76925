"""Settings that do not fit the backbone are told before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError


def test_a_text_that_gems_cannot_read_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    from flows.steps import draft_plan

    config, words = tmp_path / "x.toml", tmp_path / "words.txt"
    base = 'name = "x"\nworkspace = "w"\n[[log.sources]]\npath = "a.csv"\n'
    own = '[methods.own]\nmethod = "gems"\ncorpus = "words.txt"\n'
    words.write_text("a text")
    config.write_text(base + own)
    with pytest.raises(UserError, match=r"x.toml: methods.own: corpus = .* `small` backbone reads no words"):
        draft_plan(config, methods=["own"])
    assert draft_plan(config, methods=["gems"]).methods == ("gems",)
    config.write_text(base + '[backbone]\npath = "some/model"\n' + own)
    assert draft_plan(config, methods=["own"]).methods == ("own",)
    words.unlink()
    with pytest.raises(UserError, match=r"words.txt' is no file; name a text file"):
        draft_plan(config, methods=["own"])


SHOP = 'name = "x"\nworkspace = "w"\n[[log.sources]]\npath = "a.csv"\n'
NARROW = "[backbone]\nhidden = 16\nlayers = 1\nheads = 2\nfeed_forward = 32\n[adapter]\nrank = 2\n"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            'method = "lora_moe"\nrank = 400\n',
            "methods.own.rank = 400 exceeds .*gate_proj, which is 32 x 16; give at most 16",
        ),
        (
            'method = "lora_moe"\ntargets = ["foo"]\n',
            r"methods.own.targets = \['foo'\] match no .*: down_proj, gate_proj, k_",
        ),
        (
            'method = "osf"\npreserved = 0.01\n',
            "methods.own.preserved = 0.01 keeps 0 of the 16 .*; give at least 0.0625",
        ),
        (
            'method = "gems"\nrank = 4096\n',
            "methods.own.rank = 4096 needs .*; give at most 5, or set allow_large_state = true",
        ),
        (
            'method = "gems"\nk_rule = "fixed"\nk_value = 16\n',
            'methods.own.k_value = 16 with k_rule = "fixed" leaves .* 16 input directions.*; give at most 15',
        ),
    ],
)
def test_settings_that_do_not_fit_the_backbone_are_told_before_anything_is_trained(
    own: str, message: str, tmp_path: Path
) -> None:
    from flows.steps import draft_plan

    config = tmp_path / "x.toml"
    config.write_text(f"{SHOP}{NARROW}[methods.own]\n{own}")
    with pytest.raises(UserError, match=f"x.toml: {message}"):
        draft_plan(config, methods=["own"])
    assert draft_plan(config, methods=["single"]).methods == ("single",)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("rank = 17", "adapter.rank = 17 exceeds .*, which is 16 x 16; give at most 16"),
        ('targets = ["foo"]', r"adapter.targets = \['foo'\] match no linear map"),
    ],
)
def test_an_adapter_that_does_not_fit_the_backbone_is_told_before_anything_is_trained(
    adapter: str, message: str, tmp_path: Path
) -> None:
    from flows.steps import draft_plan

    config = tmp_path / "x.toml"
    config.write_text(SHOP + NARROW.replace("rank = 2", adapter))
    with pytest.raises(UserError, match=f"x.toml: {message}"):
        draft_plan(config, methods=["frozen"])
