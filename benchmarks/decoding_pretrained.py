"""`benchmarks.decoding` on a real decoder LM: the folder DRIFTREC_BACKBONE names, such as SmolLM2-135M.

The claim is with the whole vocabulary scored on both sides (equal normalisation, equal items); a second row scores the
codes alone, which is what driftrec does by default.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.decoding import SIZES, compared, spread_out, task
from benchmarks.measure import Work, alternate, faster, flops, pretrained_folder, report
from models.backbone import pretrained_backbone
from models.generative import GenerativeModel

SCRIPT = "decoding_pretrained"
USERS, WIDTH = 2, 10


def main() -> None:
    """Measure decoding on a pretrained backbone, and record the rows."""
    path = pretrained_folder(SCRIPT)
    whole, codes = (
        GenerativeModel(pretrained_backbone(path), sum(SIZES), seed=0, full_vocabulary=full, dropout=0.0)
        for full in (True, False)
    )
    both = task(spread_out(whole), USERS, WIDTH)
    name = f"decoding, pretrained, {USERS} users × {WIDTH} beams"
    row = compared(name, both, mark=4)
    restricted = task(spread_out(codes), USERS, WIDTH)
    pair, work = alternate(restricted.ours, both.ours, repetitions=5), Work(flops=flops(restricted.ours))
    head = faster(
        f"{name}, codes only", "our search over the whole vocabulary", pair, mark=None, unit="users/s", work=work
    )
    report(SCRIPT, [row, replace(head, ours=USERS * (head.ours or 0), theirs=USERS * (head.theirs or 0))])


if __name__ == "__main__":
    main()
