"""Writes docs/results.md: the reports of workspaces named on the command line, and the table of benchmarks.

    python -m benchmarks.results workspace/video_games workspace/online_retail    # the reports
    python -m benchmarks.results                # the benchmarks and the faults, from results.json and faults.json

Every number comes from a report.json, results.json or faults.json; the page says which command made it, on what
machine, from which data. Each part stands between marks of its own, and writing one leaves the others as they are.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.measure import percent
from flows.reporting.findings import Cell, Difference, Findings
from stages.errors import UserError
from stages.workspace import read_json, replacing

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
BENCHMARKS = PAGE.parent.parent / "benchmarks" / "results.json"
FAULTS = BENCHMARKS.with_name("faults.json")
INTRODUCTION = """# Results

Full catalogue, every test user, trie-constrained beam, 95 % intervals by paired bootstrap over users. Means are over
the incremental stages; per-stage values, slices and R[i][j] are in each run's `report.html`. Training seeds are the
outer level of the bootstrap: with several of them an interval holds the methods' training noise too; with one it holds
for these trained models only. The backbone is `small` with about a million weights (`[backbone]` of each config), half
the default, so that a run fits two cores. PESO's paper reports other data sets (Instruments, Movies, Books), so none of
these numbers can be set beside its tables.

Written by `python -m benchmarks.results WORKSPACE …` from the runs' `report.json`.
"""
SPEED = """# Speed

Each line is a script in `benchmarks/` that runs both sides in turn in one process and takes the median of the pairs'
ratios; in brackets the smallest and the largest of them. Above a mark with ≥ is good, below one with ≤. "Limit" is the
share of what this machine's own matmul (of the row's number type) and memory stream allow, measured in the same run:
the arithmetic of the matrix products, or everything read and written once, over the time taken. Sizes, counts and whole
commands have none. Written by `make bench`.
"""
BROKEN = """# Faults

Each row is a fault injected for real, as often as the table says ([reliability.md](reliability.md)). R: the repeated
run ends in the same bytes as an undisturbed one; E: a clear error, nothing lost; D: it carries on and says so; Q: rows
counted and set aside. Written by `make faults`.
"""


def refresh_reports(workspaces: list[Path], page: Path = PAGE) -> None:
    """Write the introduction, and the section of each workspace's newest report; other sections stay.

    Raises:
        UserError: a workspace without a report; nothing is written.
    """
    reports = [newest(folder) for folder in workspaces]
    replace_part(page, "introduction", INTRODUCTION)
    for found in reports:
        replace_part(page, f"report {found.report['name']}", section(found))


def refresh_benchmarks(results: Path = BENCHMARKS, page: Path = PAGE) -> None:
    """Write the part made from results.json.

    Raises:
        UserError: there is no results.json.
    """
    rows = read_json(results)["rows"]
    replace_part(page, "benchmarks", "\n".join([SPEED, *benchmark_table(rows)]))


def refresh_faults(faults: Path = FAULTS, page: Path = PAGE) -> None:
    """Write the part made from faults.json.

    Raises:
        UserError: there is no faults.json.
    """
    found = read_json(faults)
    rows = found["rows"]
    runs, passes = (sum(row[name] for row in rows) for name in ("runs", "passes"))
    seeds, days = (", ".join(sorted({str(row[name]) for row in rows})) for name in ("seed", "date"))
    lines = [
        f"{passes:,} of {runs:,} runs passed, {days}, seed {seeds}; each row at the commit it names.",
        "",
        "| | fault | expected | runs | passes | seconds | commit | the injection leaves out |",
        "|---|---|---|---|---|---|---|---|",
        *(fault_line(row) for row in rows),
    ]
    replace_part(page, "faults", "\n".join([BROKEN, *lines]))


def fault_line(row: dict[str, Any]) -> str:
    """A row of faults.json as a row of the table."""
    passes = f"{row['passes']}" if row["passes"] == row["runs"] and row["runs"] else f"**{row['passes']}**"
    texts = [row["row"], row["fault"], row["expectation"], row["runs"], passes, f"{row['seconds']:.0f}"]
    texts += [row["commit"], row["note"]]
    return "| " + " | ".join(" ".join(str(text).replace("|", "/").split()) for text in texts) + " |"


def replace_part(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks of the part called `name`, at the page's end where there are none yet."""
    opening, closing = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    part = f"{opening}\n{text.strip()}\n{closing}"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    head, found, rest = before.partition(opening)
    after = f"{head}{part}{rest.partition(closing)[2]}" if found else f"{before.rstrip()}\n\n{part}\n".lstrip()
    with replacing(page) as temporary:
        temporary.write_text(after, encoding="utf-8")
    print(f"wrote the {name} of {page}")


def benchmark_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a claim, notes below, then the machines."""
    lines = [
        "| what | beside | ratio | mark | ours | beside it | limit |",
        "|---|---|---|---|---|---|---|",
        *(benchmark_line(row) for row in rows),
        "",
    ]
    notes = [f"- {row['name']}: {text}" for row in rows if (text := "; ".join(_told(row)))]
    made: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        made.setdefault((row["machine"], row["measured"]), []).append(row["name"])
    machines = [f"- {day}, {machine}: {', '.join(names)}" for (machine, day), names in made.items()]
    return [*lines, *notes, "", *machines]


def _told(row: dict[str, Any]) -> list[str]:
    return [row[key] for key in ("note", "how", "limits") if row[key] and (key != "how" or row["ratio"] is not None)]


def benchmark_line(row: dict[str, Any]) -> str:
    """A row of results.json as a row of the table."""
    if row["ratio"] is None:
        return f"| {row['name']} | {row['rival']} | not measured | – | – | – | – |"
    spread = f" [{row['low']:.3g}, {row['high']:.3g}]" if row["low"] is not None else ""
    mark = "–" if row["mark"] is None else f"{'≥' if row['better'] == 'higher' else '≤'} {row['mark']:g}"
    missed = " **missed**" * (row["met"] is False)
    figures = ["–" if row[key] is None else f"{row[key]:,.4g} {row['unit']}" for key in ("ours", "theirs")]
    limit = "–" if row["limit"] is None else percent(row["limit"])
    cells = [row["name"], row["rival"], f"{row['ratio']:.3g}{spread}", mark + missed, *figures, limit]
    return "| " + " | ".join(cells) + " |"


def newest(root: Path) -> Findings:
    """One workspace's newest report."""
    reports = root / "runs" / "reports"
    return Findings(read_json(reports / read_json(reports / "latest.json")["report"] / "report.json"))


def section(found: Findings) -> str:
    """A report as a section of the page."""
    lines = [f"## {found.report['name']}", "", *facts(found), ""]
    for protocol in found.protocols:
        for objective in found.objectives:
            lines += [*table(found, protocol, objective), ""]
    lines += [*slices(found), "", *continual(found), "", *costs(found), ""]
    return "\n".join(lines)


def facts(found: Findings) -> list[str]:
    """What the numbers rest on: data, command, machine, time."""
    report = found.report
    command, wall = report["command"], report["wall_seconds"]
    machine = report["machine"]
    methods = ",".join(command["methods"] or report["config"]["compare"])
    seeds = ",".join(str(seed) for seed in command["seeds"] or report["config"]["seeds"])
    collisions = report["collisions"]
    users = f" --users {command['users']}" if command.get("users") else ""
    shown = ", ".join(f"{key} {value}" for key, value in machine.items() if not isinstance(value, dict | list))
    ahead = "; **the IDs were fitted on all stages' items (future catalogue known)**"
    return [
        f"    driftrec compare --config configs/{report['name']}.toml --methods {methods} --seeds {seeds}{users}",
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
    """A boundary rule in words."""
    return "; ".join(f"{key}: {value}" for key, value in rule.items()) if isinstance(rule, dict) else str(rule)


def table(found: Findings, protocol: str, objective: str) -> list[str]:
    """The headline of one protocol and objective; what does not answer the objective is left out."""
    oracle = found.oracle(protocol, objective)
    title = named(found, protocol, objective)
    rows = [
        f"**{title}** (nothing can score above {oracle:.3f}: the share of targets in the catalogue at that time)",
        "",
        f"| method | Hit@10 | NDCG@10 | Hit@10 less `{found.reference}` | p (Holm) | users |",
        "|---|---|---|---|---|---|",
    ]
    for line in found.lines(protocol, objective):
        if "hit_at_10" not in line.cells:
            continue
        hit, ndcg = line.cells["hit_at_10"], line.cells["ndcg_at_10"]
        gap = line.differences.get("hit_at_10")
        name = f"*{line.method}*" if line.baseline else line.method
        marks = ["**" if metric in line.best else "" for metric in ("hit_at_10", "ndcg_at_10")]
        rows.append(
            f"| {name} | {marks[0]}{interval(hit)}{marks[0]} | {marks[1]}{interval(ndcg)}{marks[1]} "
            f"| {interval(gap, sign=True)} | {chance(gap)} | {hit.users} |"
        )
    return rows


def named(found: Findings, protocol: str, objective: str) -> str:
    """A protocol in words, with the objective where there are several."""
    return protocol.replace("_", "-") + (f", {objective}" if len(found.objectives) > 1 else "")


def interval(cell: Cell | Difference | None, sign: bool = False) -> str:
    """A value with its 95 % interval."""
    if cell is None or cell.value is None:
        return "–"
    form = "+.4f" if sign else ".4f"
    low_high = f" [{cell.low:{form}}, {cell.high:{form}}]" if cell.low is not None else ""
    return f"{cell.value:{form}}{low_high}"


def chance(gap: Difference | None) -> str:
    """A p-value after Holm."""
    return "–" if gap is None or gap.p_holm is None else f"{gap.p_holm:.3f}"


def slices(found: Findings) -> list[str]:
    """Who is served how well."""
    rows = ["**Slices**, Hit@10, mean over the incremental stages", ""]
    rows += ["| method | protocol | " + " | ".join(found.slices) + " |", "|---|---|" + "---|" * len(found.slices)]
    for protocol, objective, method in product(found.protocols, found.objectives, found.methods):
        cells = [found.cell(method, protocol, "hit_at_10", objective, part=part) for part in found.slices]
        shown = ["–" if cell is None or cell.value is None else f"{cell.value:.4f}" for cell in cells]
        if any(cell is not None for cell in cells):
            rows.append(f"| {method} | {named(found, protocol, objective)} | " + " | ".join(shown) + " |")
    return rows


def continual(found: Findings) -> list[str]:
    """What is kept and what is learnt over the stages, a table an objective."""
    blocks = [_continual(found, objective) for objective in found.objectives]
    return [line for place, block in enumerate(blocks) for line in ([""] if place and block else []) + block]


def _continual(found: Findings, objective: str) -> list[str]:
    known = {method: values for method in found.methods if (values := found.continual(method, objective))}
    if not known and objective != found.objectives[0]:
        return []
    names = list(dict.fromkeys(name for values in known.values() for name in values))
    about = f"{objective}, " if len(found.objectives) > 1 else ""
    rows = [f"**Over the stages** ({about}Hit@10; R[i][j] on the seeded sample of users named above)", ""]
    rows += ["| method | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---|" + "---|" * len(names)]
    for method, values in known.items():
        shown = ["–" if (value := values.get(name)) is None else f"{value:.4f}" for name in names]
        rows.append(f"| {method} | " + " | ".join(shown) + " |")
    return rows


def costs(found: Findings) -> list[str]:
    """What one update costs."""
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
    """A value in a unit, or a dash."""
    return "–" if value is None else form.format(value / unit)


def main() -> None:
    """Refresh what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workspaces", nargs="*", type=Path, help="whose reports; absent: benchmarks and faults")
    wish = parser.parse_args()
    try:
        if wish.workspaces:
            refresh_reports(wish.workspaces)
        else:
            refresh_benchmarks()
            refresh_faults()
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
