"""Commands that offer a trained model to others: over HTTP, or as an MLflow model."""

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
        str | None, typer.Option(help="Beyond this machine: name:port,... that clients use; DRIFTREC_TOKEN too.")
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
