"""Commands of whoever keeps a model in service: retrain, its schedule, its history, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.environment import started_in
from stages.errors import UserError

app = typer.Typer()
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="TOML file of the experiment.")]
Folder = Annotated[Path | None, typer.Option("--workspace", "-w", help="Folder for everything the run writes.")]
ThisFolder = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of an earlier run.")]


@app.command()
def retrain(
    config: ConfigFile,
    new: Annotated[str | None, typer.Option(help="File, folder or glob of new rows; absent: the config's.")] = None,
    close_now: Annotated[
        bool, typer.Option("--close-now", help="Close the open stage whatever its rule says.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be taken, closed and trained; change nothing.")
    ] = False,
    workspace: Folder = None,
) -> None:
    """Take new rows; where a stage closes, train a challenger and let the gate decide."""
    from flows import retraining, terminal

    plan = retraining.retrain_plan(config, started_in(_place(config, workspace)))
    if dry_run:
        from flows.foretelling import foretold

        terminal.stdout().print(foretold(plan, new, close_now), soft_wrap=True, markup=False)
    else:
        run_retrain(config, plan.workspace.root, new, close_now)


def run_retrain(config: Path, workspace: Path, new: str | None = None, close_now: bool = False) -> None:
    """Run the flow while holding the workspace, and print what it took and decided."""
    from flows import terminal
    from flows.experiment import exclusive
    from stages.append import files_named
    from stages.workspace import Workspace

    with exclusive(Workspace(workspace)), terminal.watching() as watcher:
        watcher.label = "starting Prefect"
        watcher.expect(0)
        from flows.running import run

        given = None if new is None else files_named(new)
        arguments = {"config": str(config.resolve()), "new": given, "close_now": close_now}
        said = run("retrain", {**arguments, "workspace": str(workspace)})
    terminal.stdout().print(said, soft_wrap=True, markup=False)


@app.command()
def rollback(workspace: ThisFolder) -> None:
    """Put the champion before the present one back into service; a retraining under way does not hold it up."""
    started_in(workspace)
    from flows import terminal
    from flows.experiment import InUseError, exclusive, remembered_config
    from flows.promotion import champion
    from flows.promotion.telling import told_apart

    config, place = remembered_config(workspace, answering=True)
    gone, back = champion.roll_back(config, place)
    said = "{} is in service again, {} is not".format(*told_apart([back, gone]))
    terminal.stdout().print(said, soft_wrap=True)
    onward = f"the next challenger goes on from the newest stage of {config.retrain.method}, not from this model"
    terminal.stdout().print(onward, soft_wrap=True)
    # It is done and said; what follows only shows it, and may take Prefect some seconds.
    try:
        with exclusive(place), terminal.watching() as watcher:
            watcher.label = "recording"
            from flows.running import run

            run("rollback", {"workspace": str(place.root.resolve())})
    except InUseError:
        later = "MLflow and Prefect are told by the run under way, or by the next one"
        terminal.stdout().print(later, soft_wrap=True)


@app.command()
def history(workspace: ThisFolder) -> None:
    """Print every decision about the champion, and which model is in service."""
    started_in(workspace)
    from flows import terminal
    from flows.experiment import made
    from flows.promotion import champion
    from flows.promotion.history import history_file, read_history
    from flows.promotion.telling import rows, told_apart
    from flows.reporting import tables

    place = made(workspace)
    lines, torn = read_history(place)
    present = champion.in_service(place)
    console = terminal.stdout()
    if lines:
        console.print(tables.decisions(rows(lines)))
    if torn:
        console.print(f"{torn} line(s) of {history_file(place)} cannot be read; a kill tears one", soft_wrap=True)
    shown = "nothing"
    if present is not None:
        shown = f"{told_apart([*champion.named(lines), present])[-1]}, since {present.since}"
    console.print(f"in service: {shown}", soft_wrap=True)


@app.command()
def gc(
    workspace: ThisFolder,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    keep: Annotated[
        int, typer.Option(help="Newest kept: checkpoints of each method, seed and protocol, and models in MLflow.")
    ] = 2,
    forget_report: Annotated[bool, typer.Option(help="Also what only the latest report names.")] = False,
) -> None:
    """Remove what nothing rests on: never the champion's lineage, never what the latest report names."""
    started_in(workspace)
    from flows import terminal
    from flows.experiment import exclusive, remembered_config
    from flows.promotion.retention import removable, remove, superseded

    config, place = remembered_config(workspace, answering=True)
    console = terminal.stdout()
    with exclusive(place):
        found = [*removable(place, keep, forget_report), *superseded(place, config.name, keep)]
        for removal in found:
            where = removal.path.relative_to(place.root)
            console.print(f"{removal.size / 2**20:8.1f} MiB  {where}  ({removal.why})", soft_wrap=True, markup=False)
        size = sum(removal.size for removal in found) if dry_run else remove(found)
    console.print(f"{len(found)} {'to remove' if dry_run else 'removed'}, {size / 2**20:.1f} MiB")


@app.command("serve-flows")
def serve_flows(
    config: ConfigFile,
    cron: Annotated[
        str | None, typer.Option(help='When, as cron says it; "0 3 * * *" is every night at three.')
    ] = None,
    every: Annotated[float | None, typer.Option(help="Instead of --cron: every so many seconds.")] = None,
    timezone: Annotated[str, typer.Option(help="Of --cron.")] = "UTC",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the Prefect server, this machine only.")] = 4200,
    workspace: Folder = None,
) -> None:
    """Retrain on a schedule until Ctrl-C; starts a Prefect server on this machine where none answers."""
    if (cron is None) == (every is None):
        raise UserError('serve-flows: give one of --cron "0 3 * * *" and --every SECONDS')
    place = _place(config, workspace)
    started_in(place)
    from flows import retraining, schedule
    from flows.experiment import see_fit

    plan = retraining.retrain_plan(config, place)
    see_fit(plan.config, plan.workspace)
    schedule.serve(config.resolve(), place, cron, every, timezone, port)


def _place(config: Path, workspace: Path | None) -> Path:
    """The workspace a flow will use; Prefect must know it before it is imported."""
    from stages.config import load_config

    return workspace or Path(load_config(config).workspace).expanduser()
