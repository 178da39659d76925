"""Commands that offer what a run made to others: its model over HTTP or in MLflow's form, and its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.environment import started_in

app = typer.Typer()
ThisFolder = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of an earlier run.")]


@app.command()
def serve(
    workspace: ThisFolder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Absent: the champion, as it changes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed; absent: the lowest.")] = None,
    allowed_hosts: Annotated[
        str | None, typer.Option(help="Beyond this machine: name or name:port,... clients use; DRIFTREC_TOKEN too.")
    ] = None,
) -> None:
    """Answer recommendations and searches over HTTP, with a page to try them."""
    started_in(workspace)
    from flows import terminal
    from flows.serving.guarding import access

    rule = access(host, allowed_hosts)
    from flows.service import serve as run_service

    with terminal.watching(lines=True):
        console = terminal.stdout()
        run_service(workspace, host, port, rule, method, seed, lambda line: console.print(line, soft_wrap=True))


@app.command()
def export_model(
    workspace: ThisFolder,
    to: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="Absent: the champion.")] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed; absent: the lowest.")] = None,
) -> None:
    """Write the model in service as an MLflow model, for `mlflow models serve`. It holds the log's histories."""
    started_in(workspace)
    from flows import exporting, terminal

    folder = exporting.export_model(workspace, to, method, seed)
    terminal.stdout().print(f"model: {folder}", soft_wrap=True)


@app.command()
def ui(
    workspace: ThisFolder = Path("workspace/demo"),
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Of Prefect's page.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Of MLflow's page.")] = 5000,
) -> None:
    """Show Prefect and MLflow of a workspace, on this machine only, until Ctrl-C."""
    started_in(workspace)
    from flows import terminal
    from flows.ui import show, windows
    from stages.workspace import Workspace

    place = Workspace(workspace)
    both = windows(place, prefect_port, mlflow_port)
    place.create()
    if not (place.root / "mlflow.db").exists():
        from flows import stores  # Ctrl-C while MLflow's own server made it would leave one that cannot be opened

        stores.make(place)
    console = terminal.stderr()
    show(both, lambda line: console.print(line, soft_wrap=True))
