"""The command line. Nothing heavy is imported before a command needs it, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import logs, offering, upkeep
from flows.endings import ended
from flows.environment import RUNNING_IN, set_defaults
from stages.errors import UserError

if TYPE_CHECKING:
    from flows.reporting.findings import Findings

app = typer.Typer(
    name="driftrec",
    help="Keeps an LLM recommender current: stages, continual methods, one honest comparison.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(upkeep.app)
app.add_typer(offering.app)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="TOML file of the experiment.")]
Folder = Annotated[Path | None, typer.Option("--workspace", "-w", help="Folder for everything the run writes.")]
ThisFolder = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of an earlier run.")]
Stages = Annotated[int | None, typer.Option("--stages", min=1, help="Only the first N stages.")]
Users = Annotated[int | None, typer.Option("--users", min=1, help="Quick look: test a seeded sample of N users.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Training seeds, separated by commas.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes that share the work; absent: as many as suit.")
]
Profile = Annotated[
    bool, typer.Option("--profile", help="Also write where each stage's time goes; works in one process.")
]


@app.callback()
def settings(
    log_format: Annotated[
        str | None, typer.Option(help="text or json, one object a line; absent: DRIFTREC_LOG_FORMAT, else text.")
    ] = None,
) -> None:
    """Keeps an LLM recommender current: stages, continual methods, one honest comparison."""
    logs.choose_format(log_format)


@app.command()
def demo(
    workspace: Annotated[
        Path | None,
        typer.Option("--workspace", "-w", help="Folder; absent: workspace/demo, or workspace/demo_searches."),
    ] = None,
    seeds: Seeds = None,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas.")] = None,
    stages: Stages = None,
    users: Users = None,
    workers: Workers = None,
    searches: Annotated[
        bool, typer.Option("--searches", help="Also train and test the log's searches: GEMS beside its rivals.")
    ] = False,
) -> None:
    """Generate a shop log, compare methods on it, and show the best score anyone could reach."""
    from flows.demo import WORKSPACES, best_scores, write_demo

    workspace = workspace or WORKSPACES[searches]
    _start(workspace)
    from flows.experiment import exclusive
    from flows.reporting.stored import findings
    from stages.workspace import Workspace

    with exclusive(Workspace(workspace)):
        config = write_demo(workspace, searches)
    folder = _compare(config, workspace, methods, seeds, stages, users, workers)
    found = findings(folder)
    later = [stage for stage in found.stages if stage > 0]
    _show(folder, best_scores(workspace, found.protocols, found.objectives, later))


@app.command()
def ingest(config: ConfigFile, workspace: Folder = None) -> None:
    """Read and check the log; refused rows go to the workspace with their reasons."""
    from flows import steps, terminal
    from flows.experiment import exclusive

    plan = steps.draft_plan(config, _start(workspace))
    with exclusive(plan.workspace), terminal.watching(lines=True):
        steps.read(steps.claimed(plan))
    terminal.stdout().print(f"log: {plan.workspace.log}", soft_wrap=True)


@app.command()
def split(config: ConfigFile, workspace: Folder = None) -> None:
    """Cut the log into stages; print how it drifts and where the picture is."""
    from flows import steps, terminal
    from flows.experiment import exclusive
    from flows.reporting import tables
    from stages.drift import draw_drift, drift_table

    plan = steps.draft_plan(config, _start(workspace))
    with exclusive(plan.workspace):
        with terminal.watching(lines=True):
            plan = steps.claimed(plan)
            steps.read(plan)
            steps.split(plan)
        rows = drift_table(plan.workspace)
        picture = draw_drift(plan.workspace, plan.workspace.stages / "drift.png")
    console = terminal.stdout()
    console.print(tables.drift(rows, console.width))
    console.print(f"picture: {picture}", soft_wrap=True)


@app.command()
def train(
    config: ConfigFile,
    method: Annotated[str, typer.Option("--method", "-m", help="Which method.")] = "single",
    seeds: Seeds = None,
    stages: Stages = None,
    users: Users = None,
    workspace: Folder = None,
    workers: Workers = None,
    profile: Profile = False,
) -> None:
    """Train and test one method over all stages."""
    arguments = {"method": method, "seeds": _numbers(seeds), "stages": stages, "users": users}
    arguments |= {"workers": workers, "profile": profile}
    _show(_flow("continual", config, _start(_place(config, workspace)), arguments), profile=profile)


@app.command()
def compare(
    config: ConfigFile,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; absent: the config's.")] = None,
    seeds: Seeds = None,
    stages: Stages = None,
    users: Users = None,
    workspace: Folder = None,
    workers: Workers = None,
    profile: Profile = False,
) -> None:
    """Train several methods and seeds over the same stages, and report them beside the baselines."""
    place = _start(_place(config, workspace))
    _show(_compare(config, place, methods, seeds, stages, users, workers, profile), profile=profile)


AsUser = Annotated[str | None, typer.Option("--user", "-u", help="User id in the log; not with --history.")]
History = Annotated[str | None, typer.Option(help="Item ids, oldest first, with commas; not with --user.")]
Length = Annotated[int, typer.Option("-k", help="Length of the list.")]
ByMethod = Annotated[
    str | None, typer.Option("--method", "-m", help="Absent: the champion, or the best of the last report.")
]
OneSeed = Annotated[int | None, typer.Option("--seed", help="Training seed; absent: the lowest.")]


@app.command()
def recommend(
    workspace: ThisFolder,
    user: AsUser = None,
    history: History = None,
    k: Length = 10,
    method: ByMethod = None,
    seed: OneSeed = None,
) -> None:
    """Recommend items to a user of the log, or to anybody from a history."""
    _list(workspace, user, history, k, method, seed, None)


@app.command()
def search(
    workspace: ThisFolder,
    query: Annotated[str, typer.Option("--query", "-q", help="What to search for.")],
    user: AsUser = None,
    history: History = None,
    k: Length = 10,
    method: ByMethod = None,
    seed: OneSeed = None,
) -> None:
    """Search the catalogue, for a user of the log, for anybody with a history, or for nobody in particular."""
    _list(workspace, user, history, k, method, seed, query)


@app.command()
def report(
    workspace: ThisFolder,
    name: Annotated[str | None, typer.Option(help="Folder name below runs/reports; absent: the newest.")] = None,
) -> None:
    """Draw a report anew from its report.json, record it in MLflow, and print its tables."""
    _start(workspace)
    from flows import steps, terminal
    from flows.reporting import stored
    from flows.reporting.report import write_page
    from stages.workspace import Workspace, read_json

    place = Workspace(workspace)
    folder = stored.latest_report(place, name)
    with terminal.watching():
        write_page(read_json(folder / "report.json"), folder)
        chart = steps.record(place, folder) if (folder / "jobs.json").exists() else None
    _show(folder, chart=chart)


@app.command()
def analyse(
    workspace: Folder = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file of the experiment; absent: the workspace's copy.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; absent: all trained.")] = None,
    seed: OneSeed = None,
    stages: Stages = None,
    name: Annotated[str | None, typer.Option(help="Folder name below runs/reports; absent: the newest.")] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="Of conflict, transitions, titles, preservation and memory, by commas; absent: all."),
    ] = None,
) -> None:
    """Measure on the trained models of a report why its methods differ: conflict, forgetting, drift, memory."""
    _start(workspace)
    from flows import terminal
    from flows.analysing import FILE, analyse
    from flows.reporting import tables
    from stages.workspace import read_json

    with terminal.watching(lines=True):
        folder = analyse(workspace, config, _words(methods), seed, stages, name, _words(parts))
    found = read_json(folder / FILE)
    console = terminal.stdout()
    for table in tables.analysis(found):
        console.print(table)
    for note in found["notes"]:
        console.print(tables.escaped(note), style="dim")
    console.print(f"analysis: {folder / FILE}", soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


@app.command()
def resume(workspace: ThisFolder) -> None:
    """Go on with the last command of a workspace; committed stages are not trained again."""
    _start(workspace)
    from flows.experiment import last_command

    command, arguments, _ = last_command(workspace)
    config = Path(arguments.pop("config"))
    if command == "retrain":
        upkeep.run_retrain(config, workspace, **arguments)
        return
    _show(_flow(command, config, workspace, arguments))


@app.command()
def doctor(
    workspace: Folder = None,
    repair: Annotated[bool, typer.Option("--repair", help="Also close what killed runs left behind.")] = False,
) -> None:
    """Check versions, pins, processor, threads, memory, disk and a workspace; say what to do."""
    _start(workspace)
    from flows import terminal
    from flows.doctor import examine, healthy, repaired
    from flows.reporting import tables

    checks = [*examine(workspace), *(repaired(workspace) if repair else ())]
    console = terminal.stdout()
    marks = {"ok": "[green]ok[/]", "advice": "[yellow]advice[/]", "fault": "[red]fault[/]"}
    for check in checks:
        remedy = f"  → {tables.escaped(check.remedy)}" if check.remedy else ""
        line = f"{marks[check.level]:>6}  {check.subject}: {tables.escaped(check.found)}{remedy}"
        console.print(line, soft_wrap=True)
    raise typer.Exit(0 if healthy(checks) else 1)


def _list(
    workspace: Path,
    user: str | None,
    history: str | None,
    k: int,
    method: str | None,
    seed: int | None,
    query: str | None,
) -> None:
    """Print what one model ranks first."""
    _start(workspace)
    from flows import terminal
    from flows.recommending import recommend as ranked
    from flows.reporting import tables

    found = ranked(workspace, user, _words(history), k, method, seed, query)
    job = found.job
    console = terminal.stdout()
    recent = ", ".join(found.history[-5:]) or "nothing"
    asked = "" if query is None else f"searched for {tables.shortened(query)} "
    console.print(f"{tables.escaped(asked)}after {tables.escaped(recent)}", style="dim")
    title = f"{job.method}, seed {job.seed}, after stage {job.stage}"
    console.print(tables.recommendations(found.rows, title))


def _start(workspace: Path | None) -> Path | None:
    """Set the libraries' variables before their import, and remember where a crash file would go."""
    set_defaults(workspace)
    if workspace is not None:
        RUNNING_IN.append(workspace)
    return workspace


def _place(config: Path, workspace: Path | None) -> Path:
    """The workspace a flow will use; Prefect must know it before it is imported."""
    from stages.config import load_config

    return workspace or Path(load_config(config).workspace).expanduser()


def _compare(
    config: Path,
    workspace: Path | None,
    methods: str | None,
    seeds: str | None,
    stages: int | None,
    users: int | None,
    workers: int | None,
    profile: bool = False,
) -> Path:
    arguments = {"methods": _words(methods), "seeds": _numbers(seeds), "stages": stages, "users": users}
    return _flow("compare", config, workspace, {**arguments, "workers": workers, "profile": profile})


def _flow(name: str, config: Path, workspace: Path | None, arguments: dict[str, Any]) -> Path:
    """Run a flow while holding the workspace; returns the report's folder."""
    from flows import steps, terminal
    from flows.experiment import exclusive, last_flow_run

    # Before Prefect starts: a mistake in config or arguments is told at once.
    methods = [arguments["method"]] if "method" in arguments else arguments["methods"]
    plan = steps.draft_plan(config, workspace, methods, arguments["seeds"], users=arguments["users"])
    # The lock comes first: claiming writes the config, and another process may be working by the present one.
    with exclusive(plan.workspace), terminal.watching() as watcher:
        place = steps.claimed(plan).workspace
        watcher.label = "starting Prefect"
        watcher.expect(0)
        from flows.running import run

        # Texts: Prefect cannot rebuild a scheduled run's parameters of any other type.
        everything = {"config": str(config.resolve()), "workspace": str(place.root), **arguments}
        return Path(run(name, everything, last_flow_run(place)))


def _show(
    folder: Path,
    best: dict[tuple[str, str], dict[str, float]] | None = None,
    chart: str | None = None,
    profile: bool = False,
) -> None:
    """The report's tables and where everything is."""
    from flows import terminal
    from flows.reporting import stored, tables

    found: Findings = stored.findings(folder)
    console = terminal.stdout()
    for table in tables.headline(found, best, console.width):
        console.print(table)
    for note in found.report["notes"]:
        console.print(tables.escaped(note), style="dim")
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    chart = chart or stored.recorded_chart(folder)
    if chart is not None:
        console.print(f"chart:  {chart}", soft_wrap=True)
        command = f"make ui WORKSPACE={folder.parents[2]}"
        console.print(f"        start MLflow with `{command}` first; switch its view to model training", soft_wrap=True)
    else:
        later = f"`driftrec report --workspace {folder.parents[2]}` does it later"
        console.print(f"chart:  not recorded in MLflow; {later}", soft_wrap=True)
    if profile:
        pages = folder.parents[1] / "profiles"
        place = str(pages) if pages.exists() else "none: every stage was committed before, or had too few steps"
        console.print(f"profiles: {place}", soft_wrap=True)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str | None) -> list[int] | None:
    words = _words(text)
    if words is None:
        return None
    if not words or not all(word.isdecimal() for word in words):
        raise UserError(f"--seeds {text}: give whole numbers from 0, separated by commas")
    return [int(word) for word in words]


def main() -> None:
    """Run the command line; see `flows.endings` for its exit codes."""
    ended(app)


if __name__ == "__main__":
    main()
