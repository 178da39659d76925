"""`benchmarks.decoding` on a real decoder LM: the folder DRIFTREC_BACKBONE names, such as SmolLM2-135M.

    python -m benchmarks.decoding_pretrained               # 2 users, two minutes; what `make bench` runs
    python -m benchmarks.decoding_pretrained --users 32    # a row of its own, some ten minutes and more

The claim is with the whole vocabulary scored on both sides (equal normalisation, equal items); a second row scores the
codes alone, which is what driftrec does by default; it is left out with other numbers of users.
"""

from __future__ import annotations

import argparse

from benchmarks.decoding import SIZES, Task, compared, spread_out, task
from benchmarks.measure import Row, Work, alternate, faster, flops, pretrained_folder, report
from models.backbone import pretrained_backbone
from models.generative import GenerativeModel

SCRIPT = "decoding_pretrained"
USERS, WIDTH = 2, 10


def main() -> None:
    """Measure decoding on a pretrained backbone, and record the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=USERS, help=f"searched for at once; absent: {USERS}")
    users = parser.parse_args().users
    path = pretrained_folder(SCRIPT)
    both = task(pretrained(path, full=True), users, WIDTH)
    name = f"decoding, pretrained, {users} users × {WIDTH} beams"
    row = compared(name, both, mark=4)
    if users == USERS:
        report(SCRIPT, [row, codes_only(name, both, path)])
    else:
        report(f"{SCRIPT} --users {users}", [row])


def pretrained(path: str, full: bool) -> GenerativeModel:
    """The decoder LM with code rows, scoring its whole vocabulary or the codes alone."""
    return spread_out(GenerativeModel(pretrained_backbone(path), sum(SIZES), seed=0, full_vocabulary=full, dropout=0.0))


def codes_only(name: str, both: Task, path: str) -> Row:
    """Our search over the codes alone beside our search over the whole vocabulary."""
    restricted = task(pretrained(path, full=False), USERS, WIDTH)
    pair, work = alternate(restricted.ours, both.ours, repetitions=5), Work(flops=flops(restricted.ours))
    name, rival = f"{name}, codes only", "our search over the whole vocabulary"
    return faster(name, rival, pair, mark=None, unit="users/s", amount=USERS, work=work)


if __name__ == "__main__":
    main()
