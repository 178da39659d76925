"""The champion is what it was trained as: settings, rows and damage move it only through the gate."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growing import OPEN_GATE, listing, seconds, week, write_rows, write_shop
from flows import cli, experiment, retrain, retraining, schedule, steps
from flows.experiment import exclusive
from flows.promotion import champion, copies, telling
from flows.promotion.history import read_history
from flows.recommending import recommend
from flows.serving.served import InService, load_served
from stages.errors import UserError
from stages.workspace import Workspace, read_json, write_json


class Quietly:
    """The steps of a retraining without Prefect and MLflow."""

    take, grow, train, evaluate = retraining.take, retraining.grow, retraining.train, retraining.evaluate
    answers, decide = retraining.answers, retraining.decide
    mirror = staticmethod(lambda *_: None)


class Shop:
    """A shop's folder: its config, and the workspace that follows it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "shop.toml"
        self.workspace = Workspace(folder / "workspace")

    def begin(self) -> Shop:
        """Have a first model at stage 1 and a promoted one at stage 2."""
        self.nightly()
        write_rows(self.folder / "events" / "week2.csv", week(2) + week(3)[:1])
        assert [line["decision"] for line in self.nightly()] == ["promoted"]
        return self

    def set(self, before: str, after: str) -> None:
        """Change the config."""
        text = self.config.read_text()
        assert before in text
        self.config.write_text(text.replace(before, after))

    def nightly(self) -> list[dict[str, Any]]:
        """Retrain; the new lines of the history."""
        plan = steps.claimed(retraining.retrain_plan(self.config, self.workspace.root))
        return retrain.work(plan, None, False, Quietly)[1]

    def listed(self) -> list[tuple[str, str, float]]:
        """What `recommend` answers."""
        return recommend(self.workspace.root, user="u03", k=5).rows

    @property
    def served(self) -> champion.Champion:
        """The model that champion.json names."""
        found = champion.in_service(self.workspace)
        assert found is not None
        return found

    @property
    def tensors(self) -> Path:
        """A file of the champion's."""
        return self.workspace.checkpoints / self.served.key / "adapter_model.safetensors"

    def damage(self) -> bytes:
        """Change one byte of it; the bytes it had."""
        before = self.tensors.read_bytes()
        self.tensors.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        return before


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A first model at stage 1 and a promoted one at stage 2."""
    folder = tmp_path_factory.mktemp("standing")
    write_shop(folder, OPEN_GATE)
    return Shop(folder).begin()


@pytest.fixture
def shop(opened: Shop, tmp_path: Path) -> Shop:
    """A copy of it, to be changed."""
    shutil.copytree(opened.folder, tmp_path / "shop")
    return Shop(tmp_path / "shop")


@pytest.fixture
def driftrec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: exit code, output, error output."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["driftrec", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), " ".join(captured.out.split()), captured.err

    monkeypatch.setenv("DRIFTREC_PREFECT", "off")
    monkeypatch.setattr(retraining, "mirrored", lambda *_: None)
    return run


ANEW = "learning_rate = 5.0\n[evaluation]"


def test_a_champion_trained_anew_that_the_gate_refuses_changes_nothing_and_is_not_tried_again(shop: Shop) -> None:
    before, answered = shop.served, shop.listed()
    shop.set("[evaluation]", ANEW)
    shop.set("minimum = -1", "minimum = 1")
    (line,) = shop.nightly()
    assert (line["decision"], line["anew"], line["stage"]) == ("kept", True, 2)
    assert "single after stage 2 stays in service" in line["why"]
    assert "single after stage 2, trained anew, does not replace it" in line["why"]
    assert line["challenger"]["key"] != before.key
    assert line["differences"]["all"]["users"] == 40
    assert set(line["scores"]) >= {"single after stage 2", "single after stage 2, trained anew"}
    assert (shop.served, shop.listed()) == (before, answered)
    assert shop.nightly() == []


def test_a_champion_trained_anew_that_passes_can_be_gone_back_from(shop: Shop, driftrec: Any) -> None:
    before, answered = shop.served, shop.listed()
    shop.set("[evaluation]", ANEW)
    (line,) = shop.nightly()
    assert (line["decision"], line["champion"]["job"]) == ("rebuilt", line["challenger"]["job"])
    assert shop.served.key == line["challenger"]["key"] != before.key
    anew = shop.listed()
    assert anew != answered
    assert driftrec("rollback", "-w", shop.workspace.root)[0] == 0
    assert (shop.served.is_model(before), shop.listed()) == (True, answered)
    assert shop.nightly() == [], "what a roll back took out of service came back by itself"
    assert shop.listed() == answered


def test_going_back_within_a_stage_names_the_checkpoints(shop: Shop, driftrec: Any) -> None:
    before = shop.served
    shop.set("[evaluation]", ANEW)
    assert [line["decision"] for line in shop.nightly()] == ["rebuilt"]
    anew = shop.served
    old, new = (f"single after stage 2 ({one.key[-16:-8]})" for one in (before, anew))
    assert old != new
    _, said, _ = driftrec("rollback", "-w", shop.workspace.root)
    assert f"{old} is in service again, {new} is not" in said
    lines = read_history(shop.workspace)[0]
    shown = [row["champion"] for row in telling.rows(lines)]
    assert shown == ["single after stage 1", old, new, old]
    assert lines[-1]["why"].endswith(f"stage 2's model {anew.key[-16:-8]} was taken out of service")
    assert f"in service: {old}, since" in driftrec("history", "-w", shop.workspace.root)[1]


def test_a_history_is_told_only_of_a_workspace_of_this_version(shop: Shop, driftrec: Any) -> None:
    code, _, error = driftrec("history", "-w", shop.folder / "typo")
    assert (code, "typo: no driftrec workspace (config.json is missing)" in error) == (2, True)
    marker = shop.workspace.root / "workspace.json"
    marker.write_text(marker.read_text().replace('"schema": 1', '"schema": 2'))
    code, _, error = driftrec("history", "-w", shop.workspace.root)
    assert (code, "workspace schema 2, this version reads 1" in error) == (2, True)


def test_a_schedule_is_refused_where_every_run_would_be(
    shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "serve", lambda *_: pytest.fail("the schedule began"))
    shop.set("codes_per_level = 8", "codes_per_level = 16")
    code, _, error = driftrec("serve-flows", "-c", shop.config, "-w", shop.workspace.root, "--every", "9")
    assert (code, "other settings in [items]" in error) == (2, True)


@pytest.mark.parametrize("changed", ["workspace", "sample"])
def test_a_sample_of_users_too_small_for_the_gate_is_refused(shop: Shop, changed: str) -> None:
    shop.set("users = 1\n", "users = 30\n")
    shop.set("[evaluation]", "[evaluation]\nusers = 29")
    if changed == "sample":
        with pytest.raises(UserError, match=r"evaluation.users \(29\) is below retrain.gate.users \(30\)"):
            retraining.retrain_plan(shop.config)
    else:
        shop.set('method = "single"', 'method = "single"\nusers = 30')
        assert retraining.retrain_plan(shop.config).config.evaluation.users == 30


def test_the_challenger_of_changed_settings_meets_the_champion_of_the_old_ones(shop: Shop) -> None:
    before = shop.served
    shop.set("[evaluation]", ANEW)
    shop.set("minimum = -1", "minimum = 1")
    write_rows(shop.folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])
    lines = shop.nightly()
    assert [(line["decision"], line["stage"], "anew" in line) for line in lines] == [
        ("kept", 3, True),
        ("kept", 3, False),
    ]
    assert [line["champion"]["key"] for line in lines] == [before.key] * 2
    assert shop.nightly() == []


@pytest.mark.parametrize("change", ["learning_rate = 0.5\n[evaluation]", "history_length = 2\n[evaluation]"])
def test_settings_read_by_another_command_leave_the_answers_alone(shop: Shop, driftrec: Any, change: str) -> None:
    answered, served = shop.listed(), load_served(shop.workspace.root)
    plain = served.rank([served.past("u03", None)], 5)
    shop.set("[evaluation]", change)
    assert driftrec("ingest", "-c", shop.config, "-w", shop.workspace.root)[0] == 0
    assert shop.listed() == answered
    assert recommend(shop.workspace.root, user="u03", k=5, method="single").rows == answered
    served = load_served(shop.workspace.root)
    assert (served.fault, served.rank([served.past("u03", None)], 5)) == (None, plain)


def test_a_workspace_without_a_champion_answers_with_what_was_trained_last(shop: Shop, driftrec: Any) -> None:
    answered = shop.listed()
    for name in (champion.FILE, "history.jsonl"):
        (shop.workspace.root / name).unlink()
    shop.set("[evaluation]", ANEW)
    driftrec("ingest", "-c", shop.config, "-w", shop.workspace.root)
    assert shop.listed() == answered


def test_a_first_model_that_the_gate_refused_answers_only_where_it_is_named(tmp_path: Path, driftrec: Any) -> None:
    shop = Shop(tmp_path)
    write_shop(tmp_path, OPEN_GATE.replace("60000", "0.0001"))
    assert [line["decision"] for line in shop.nightly()] == ["kept"]
    asked = ("recommend", "-w", shop.workspace.root, "--user", "u03")
    code, _, error = driftrec(*asked)
    assert code == 2
    assert "nothing is in service; the gate refused single after stage 1" in error
    assert "`--method single` answers with it all the same" in error
    assert driftrec(*asked, "--method", "single")[0] == 0
    with pytest.raises(UserError, match="nothing is in service"):
        load_served(shop.workspace.root)
    assert load_served(shop.workspace.root, "single").job.stage == 1
    assert "in service: nothing" in driftrec("history", "-w", shop.workspace.root)[1]


def test_a_decision_that_a_kill_kept_from_champion_json_is_answered_by(shop: Shop) -> None:
    answered = shop.listed()
    (shop.workspace.root / champion.FILE).unlink()
    assert shop.listed() == answered


def test_an_earlier_code_version_s_champion_still_answers_and_meets_the_new_one(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import commit

    answered, before = shop.listed(), shop.served
    monkeypatch.setattr(commit, "CODE_VERSION", commit.CODE_VERSION + 1)
    commit._known.clear()
    assert shop.listed() == answered
    (line,) = shop.nightly()
    assert line["decision"] == "rebuilt"
    assert line["differences"]["all"]["value"] == 0.0, "the same bytes under another name answer otherwise"
    assert shop.served.key != before.key
    commit._known.clear()


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


def test_a_roll_back_waits_for_no_retraining(shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the workspace; the one that tests a challenger meanwhile decides anew."""
    script = (
        "import sys, pathlib\nfrom flows.experiment import exclusive\nfrom stages.workspace import Workspace\n"
        "with exclusive(Workspace(pathlib.Path(sys.argv[1]))):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(shop.workspace.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, said, _ = driftrec("rollback", "-w", shop.workspace.root)
        holder.communicate()
    assert (code, "MLflow and Prefect are told by the run under way" in said) == (0, True)
    assert shop.served.job.stage == 1
    assert [line["decision"] for line in copies.lacking(shop.workspace, "mlflow", 2)] == ["rolled_back"]
    with exclusive(shop.workspace):
        pass


def test_a_challenger_tested_against_a_model_since_taken_out_meets_the_one_that_is_back(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(shop.folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])
    config, _ = experiment.remembered_config(shop.workspace.root)
    answers = retraining.answers

    def rolled_back(plan: Any, match: Any) -> Any:
        if match.champion.job.stage == 2:
            champion.roll_back(config, shop.workspace)
        return answers(plan, match)

    monkeypatch.setattr(Quietly, "answers", staticmethod(rolled_back))
    (line,) = shop.nightly()
    assert (line["decision"], line["stage"]) == ("promoted", 3)
    assert "single after stage 1" in line["scores"]
    decisions = [line["decision"] for line in read_history(shop.workspace)[0]]
    assert decisions == ["first", "promoted", "rolled_back", "promoted"]


def test_a_late_row_that_rebuilds_a_stage_asks_the_gate(shop: Shop) -> None:
    before = shop.served
    shop.set('method = "single"', 'method = "single"\nlate = "rebuild"')
    shop.set("minimum = -1", "minimum = 1")
    write_rows(shop.folder / "events" / "late.csv", [("u00", "i03", seconds(15.5))])
    (line,) = shop.nightly()
    assert (line["decision"], line["anew"]) == ("kept", True)
    assert shop.served == before
    assert shop.listed()
    files = listing(shop.workspace.root)
    assert shop.nightly() == []
    assert {name for name, digest in listing(shop.workspace.root).items() if files.get(name) != digest} <= {
        "config.json",
        "champion.lock",
    }
    assert read_json(champion.champion_file(shop.workspace))["key"] == before.key


def test_a_rotten_count_of_recorded_decisions_stops_no_retraining(shop: Shop) -> None:
    path = shop.workspace.root / "runs" / "copies.json"
    for content in ("{", "[]", '{"schema": 1}'):
        path.write_text(content)
        assert shop.nightly() == []


RETRAIN = ("retrain", "-c", "shop.toml", "-w")
WRONG = [
    ("champion.json", "[]", ("recommend", "--user", "u03", "-w"), "not a champion"),
    ("champion.json", '{"job": {"stage": "2"}}', ("rollback", "-w"), ""),
    ("champion.json", '{"job": {"stage": "2"}}', ("history", "-w"), "not a champion"),
    ("config.json", "[]", ("recommend", "--user", "u03", "-w"), "not the settings"),
    ("config.json", '{"config": {"log": {"sources": [{}]}}}', RETRAIN, "not the settings"),
    ("workspace.json", "[1]", ("rollback", "-w"), "not a workspace's name"),
    ("last_command.json", "{}", ("resume", "-w"), "not a command"),
    ("last_command.json", '{"command": "retrain", "arguments": {}}', ("resume", "-w"), "not a command"),
    ("runs/trained.json", "{}", ("recommend", "--user", "u03", "-m", "single", "-w"), "not a list of trained"),
]


@pytest.mark.parametrize(("name", "content", "command", "said"), WRONG)
def test_a_file_of_another_shape_is_named_with_its_remedy(
    shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch, name: str, content: str, command: tuple[str], said: str
) -> None:
    monkeypatch.chdir(shop.folder)
    path = shop.workspace.root / name
    path.write_text(content)
    code, _, error = driftrec(*command, shop.workspace.root)
    if said:
        assert (code, "defect" in error) == (2, False), error
        (told,) = [line for line in error.splitlines() if line.startswith("driftrec: ")]
        assert f"{name}: {said}" in told
        assert ");" in told, "no remedy"
    else:
        assert (code, shop.served.job.stage) == (0, 1), "the history writes champion.json anew"


REFUSED = {
    "methods.odd": {"odd": {"method": "single", "gone": 1}},
    "seeds": [1, 1],
    "training.gone": {"gone": 1},
    "retrain.gate.users": {"gate": {"users": -1}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_stored_setting_that_this_version_refuses_keeps_no_model_from_answering(
    shop: Shop, driftrec: Any, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    answered, path, table = shop.listed(), shop.workspace.root / "config.json", key.partition(".")[0]
    found = read_json(path)
    given = REFUSED[key]
    found["config"][table] = {**found["config"][table], **given} if isinstance(given, dict) else given
    write_json(path, found, seal=True)
    assert shop.listed() == answered
    assert load_served(shop.workspace.root).job == shop.served.job
    assert table in caplog.text
    assert f"`driftrec resume -w {shop.workspace.root}`" in caplog.text
    code, said, _ = driftrec("rollback", "-w", shop.workspace.root)
    assert (code, "newest stage of single" in said) == (0, True)


@pytest.mark.parametrize("rot", ["cut", "empty", "bytes", "edited", "shape"])
@pytest.mark.parametrize(
    "command", [("recommend", "--user", "u03"), ("rollback",), ("serve", "--port", "0"), RETRAIN[:3]]
)
def test_settings_that_rotted_are_named_with_their_remedy(
    shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch, rot: str, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(shop.folder)
    path = shop.workspace.root / "config.json"
    whole = path.read_bytes()
    contents = {"cut": whole[:300], "empty": b"", "bytes": b"\xff" + whole, "shape": b'{"config": {"log": 1}}'}
    path.write_bytes({**contents, "edited": whole.replace(b'"beam": 20', b'"beam": 24')}[rot])
    code, _, error = driftrec(*command, "-w", shop.workspace.root)
    assert (code, "defect" in error) == (2, False)
    assert f"{path}: " in error
    assert f"move it away and run `driftrec resume -w {shop.workspace.root}`" in error
