"""Defaults for the libraries' environment variables, set before their import; whatever the user set stays.

Knows neither Prefect nor MLflow: both read these variables once, when they are imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from flows import login

DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # Any web page could else command a server of ours, a run's own included. By these names, as Prefect prefers others,
    # which are then the user's.
    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    login.ORIGINS: login.origins(4200),
    # The default of 20 s is too short for a first start on a busy two-core machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,models,regularizers,stages",
    # Our loggers also speak outside of flows (`driftrec ingest`), where Prefect has no run to file a line under.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # The run's logs still reach Prefect's UI; the console belongs to our own lines: Prefect's engine would print the
    # traceback of a user's mistake there.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would wait 120 s for a silent server and ask it seven times.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    # Threads that wait for each other by spinning slow a shared machine down many times over.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Without it cuBLAS may sum in another order each time, and torch refuses to run deterministically on a GPU.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "MPLBACKEND": "Agg",
    # torch's profiler tells the terminal when it starts and stops.
    "KINETO_LOG_LEVEL": "6",
    "TOKENIZERS_PARALLELISM": "false",
    # transformers would draw a bar for every backbone it loads, into logs too.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def set_defaults(root: Path | None = None) -> None:
    """Fill in the variables the user left unset.

    PREFECT_API_URL is never set: without it a flow starts its own server, with it a flow needs that server to answer.

    Args:
        root: the workspace; Prefect's database and logs go below it. Absent: Prefect's own folder is left alone.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if root is not None:
        os.environ.setdefault("PREFECT_HOME", str(root.resolve() / "prefect"))
    login.choose()


RUNNING_IN: list[Path] = []
"""The workspace of the command under way, for the crash file."""


def started_in(root: Path) -> Path:
    """`set_defaults` for a command that works in `root`, which is remembered for a crash file."""
    set_defaults(root)
    RUNNING_IN.append(root)
    return root
