"""General English for GEMS's null space and for perplexity: WordNet's words and glosses, a line each, in two parts.

    python -m benchmarks.general_text /usr/share/wordnet data/wordnet

reads data.noun, data.verb, data.adj and data.adv (Debian's package wordnet-base; WordNet's licence allows any use) and
writes glosses.txt, nine lines of ten in a seeded order, and held_out.txt, the others.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from stages.workspace import replacing

PARTS = ("noun", "verb", "adj", "adv")
SHARE = 9
"""Of ten lines, so many are for training."""


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder with WordNet's data files")
    parser.add_argument("target", type=Path, help="folder for glosses.txt and held_out.txt")
    wish = parser.parse_args()
    missing = [name for name in (f"data.{part}" for part in PARTS) if not (wish.source / name).is_file()]
    if missing:
        parser.error(f"{wish.source}: no {', '.join(missing)}; name the folder that holds WordNet's data files")
    lines = [line for part in PARTS for line in glosses(wish.source / f"data.{part}")]
    random.Random(0).shuffle(lines)  # noqa: S311 (an order, no secret)
    cut = len(lines) * SHARE // 10
    wish.target.mkdir(parents=True, exist_ok=True)
    for name, own in (("glosses.txt", lines[:cut]), ("held_out.txt", lines[cut:])):
        with replacing(wish.target / name) as temporary:
            temporary.write_text("\n".join(own) + "\n", encoding="utf-8")
        print(f"{wish.target / name}: {len(own):,} lines")


def glosses(path: Path) -> Iterator[str]:
    """`word, word: gloss` of each synset (wndb(5WN): the fourth field counts the words, in hexadecimal)."""
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            if line.startswith("  "):  # the licence at the top
                continue
            head, _, gloss = line.partition("|")
            fields = head.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield f"{', '.join(word.replace('_', ' ') for word in words)}: {gloss.strip()}"


if __name__ == "__main__":
    main()
