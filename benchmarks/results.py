"""Writes docs/results.md from the newest report of each workspace named on the command line.

    python benchmarks/results.py workspace/video_games workspace/online_retail

Every number comes from a report.json; the page says which command made it, on what machine, from which data.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flows.findings import Cell, Difference, Findings
from stages.workspace import read_json

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
INTRODUCTION = """# Results

Full catalogue, every test user, trie-constrained beam, 95 % intervals by paired bootstrap over users. Means are over
the incremental stages; per-stage values, slices and R[i][j] are in each run's `report.html`. One training seed is a
quick look: the intervals hold for these trained models, not for the methods' training noise. The backbone is `small`
with about a million weights (`[backbone]` of each config), half the default, so that a run fits two cores. PESO's paper
reports other data sets (Instruments, Movies, Books), so none of these numbers can be set beside its tables.

Written by `python benchmarks/results.py WORKSPACE …` from the runs' `report.json`.
"""


def main(workspaces: list[Path]) -> None:
    parts = [INTRODUCTION, *(section(folder) for folder in workspaces)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


def section(root: Path) -> str:
    newest = read_json(root / "runs" / "reports" / "latest.json")["report"]
    found = Findings(read_json(root / "runs" / "reports" / newest / "report.json"))
    lines = [f"## {found.report['name']}", "", *facts(found), ""]
    for protocol in found.protocols:
        lines += [*table(found, protocol), ""]
    lines += [*slices(found), "", *continual(found), "", *costs(found), ""]
    return "\n".join(lines)


def facts(found: Findings) -> list[str]:
    report = found.report
    command, wall = report["command"], report["wall_seconds"]
    machine = report["machine"]
    methods = ",".join(command["methods"] or report["config"]["compare"])
    seeds = ",".join(str(seed) for seed in command["seeds"] or report["config"]["seeds"])
    collisions = report["collisions"]
    shown = ", ".join(f"{key} {value}" for key, value in machine.items() if not isinstance(value, dict | list))
    ahead = "; **the IDs were fitted on all stages' items (future catalogue known)**"
    return [
        f"    driftrec compare --config configs/{report['name']}.toml --methods {methods} --seeds {seeds}",
        "",
        f"- machine: {shown}",
        f"- wall time: {wall['training'] / 60:.0f} min of training and {wall['testing'] / 60:.0f} min of testing, each"
        " model and test counted once; other work ran beside it, so seconds compare methods only roughly",
        f"- beam {report['beam']}; invalid rate {report['invalid_rate']}; target rule: {rules(report['target_rule'])}",
        f"- semantic IDs shared by several items: {collisions['shared_ids']} ({collisions['items_sharing']} items)"
        + ahead * bool(report["catalogue_known_in_advance"]),
        *(f"- {note}" for note in report["notes"]),
    ]


def rules(rule: Any) -> str:
    return "; ".join(f"{key}: {value}" for key, value in rule.items()) if isinstance(rule, dict) else str(rule)


def table(found: Findings, protocol: str) -> list[str]:
    oracle = found.oracle(protocol)
    title = protocol.replace("_", "-")
    rows = [
        f"**{title}** (nothing can score above {oracle:.3f}: the share of targets in the catalogue at that time)",
        "",
        "| method | Hit@10 | NDCG@10 | Hit@10 less `single` | p (Holm) | users |",
        "|---|---|---|---|---|---|",
    ]
    for line in found.lines(protocol):
        hit, ndcg = line.cells["hit_at_10"], line.cells["ndcg_at_10"]
        gap = line.differences.get("hit_at_10")
        name = f"*{line.method}*" if line.baseline else line.method
        marks = ["**" if metric in line.best else "" for metric in ("hit_at_10", "ndcg_at_10")]
        rows.append(
            f"| {name} | {marks[0]}{interval(hit)}{marks[0]} | {marks[1]}{interval(ndcg)}{marks[1]} "
            f"| {interval(gap, sign=True)} | {chance(gap)} | {hit.users} |"
        )
    return rows


def interval(cell: Cell | Difference | None, sign: bool = False) -> str:
    if cell is None or cell.value is None:
        return "–"
    form = "+.4f" if sign else ".4f"
    low_high = f" [{cell.low:{form}}, {cell.high:{form}}]" if cell.low is not None else ""
    return f"{cell.value:{form}}{low_high}"


def chance(gap: Difference | None) -> str:
    return "–" if gap is None or gap.p_holm is None else f"{gap.p_holm:.3f}"


def slices(found: Findings) -> list[str]:
    rows = ["**Slices**, Hit@10, mean over the incremental stages", ""]
    rows += ["| method | protocol | " + " | ".join(found.slices) + " |", "|---|---|" + "---|" * len(found.slices)]
    for protocol in found.protocols:
        for method in found.methods:
            cells = [found.cell(method, protocol, "hit_at_10", part=part) for part in found.slices]
            shown = ["–" if cell is None or cell.value is None else f"{cell.value:.4f}" for cell in cells]
            rows.append(f"| {method} | {protocol.replace('_', '-')} | " + " | ".join(shown) + " |")
    return rows


def continual(found: Findings) -> list[str]:
    known = {method: found.continual(method) for method in found.methods}
    names = list(dict.fromkeys(name for values in known.values() for name in values))
    rows = ["**Over the stages** (Hit@10; R[i][j] on the seeded sample of users named above)", ""]
    rows += ["| method | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---|" + "---|" * len(names)]
    for method, values in known.items():
        if values:
            shown = ["–" if (value := values.get(name)) is None else f"{value:.4f}" for name in names]
            rows.append(f"| {method} | " + " | ".join(shown) + " |")
    return rows


def costs(found: Findings) -> list[str]:
    rows = [
        "**Cost of one update**, mean over the later stages and both protocols",
        "",
        "| method | seconds | trained weights | MB stored | peak MB of the process | queries/s tested |",
        "|---|---|---|---|---|---|",
    ]
    for method in found.methods:
        cost = found.costs(method)
        if cost:
            numbers = [
                number(cost["train_seconds"], 1, "{:.1f}"),
                number(cost["trained_parameters"], 1, "{:,.0f}"),
                number(cost["bytes"], 1e6, "{:.2f}"),
                number(cost["peak_memory_bytes"], 1e6, "{:.0f}"),
                number(cost.get("queries_per_second"), 1, "{:.0f}"),
            ]
            rows.append(f"| {method} | " + " | ".join(numbers) + " |")
    return rows


def number(value: float | None, unit: float, form: str) -> str:
    return "–" if value is None else form.format(value / unit)


if __name__ == "__main__":
    named = [Path(argument) for argument in sys.argv[1:]]
    if named:
        main(named)
    else:
        print("no workspace named, docs/results.md stays as it is; usage: python benchmarks/results.py WORKSPACE ...")
