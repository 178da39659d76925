"""The language model under the adapter: `small`, a Llama built from numbers, or any local decoder LM.

A backbone is the decoder stack without its output head; rows for item codes live in `models.generative`, so nothing
here is ever resized. Remote code and pickled weights are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedModel

from models import processor
from models.untrusted import check_model_folder

CONTROL_TOKENS = 4
"""Rows of `small`'s own vocabulary: beginning of sequence, and three spare ones; those of text, if any, follow."""


@dataclass(frozen=True)
class Backbone:
    """A decoder stack and what is needed to put item codes around it.

    Attributes:
        stack: maps `inputs_embeds` (B, T, d) to hidden states (B, T, d).
        bos: row of the stack's embedding that opens every sequence.
        head: (V, d) output rows of the stack's own vocabulary, or None where it has none (`small`).
        pretrained: it holds general knowledge, so stage 0 trains an adapter and not every weight.
    """

    stack: PreTrainedModel
    bos: int
    head: Tensor | None
    pretrained: bool


def small_backbone(hidden: int, layers: int, heads: int, feed_forward: int, seed: int, text: int = 0) -> Backbone:
    """A Llama with random weights (Touvron et al., 2023), the embedded default.

    Args:
        hidden: width d.
        layers: decoder layers.
        heads: attention heads; d / heads must be even.
        feed_forward: inner width of the gated MLP.
        seed: of the initial weights.
        text: rows for the words and bytes of queries, after the control tokens.
    """
    config = LlamaConfig(
        vocab_size=CONTROL_TOKENS + text,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stack = LlamaModel(config)
    return Backbone(stack=stack, bos=0, head=None, pretrained=False)


def pretrained_backbone(path: str) -> Backbone:
    """Load a decoder LM from a local folder or by hub id, in float32.

    Raises:
        ValueError: no safetensors weights there, an encoder-decoder, or a state that is not plain attention.
    """
    if Path(path).is_dir():
        try:
            check_model_folder(Path(path))
        except ValueError as error:
            raise ValueError(f"backbone.path: {error}") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone.path = {path!r} cannot be loaded: {_first_line(error)}") from None
    if model.config.is_encoder_decoder or not getattr(model, "_supports_sdpa", True):
        raise ValueError(f"backbone.path = {path!r} is a {model.config.model_type}; a decoder with attention is needed")
    bos = model.config.bos_token_id
    stack = cast(PreTrainedModel, model.base_model)
    head = cast(nn.Linear, model.get_output_embeddings()).weight.detach()
    return Backbone(stack=stack, bos=int(bos if bos is not None else 0), head=head, pretrained=True)


def skeleton(path: str) -> PreTrainedModel | None:
    """The decoder stack that `pretrained_backbone` would load, without weights, from config.json alone.

    Returns:
        None where it is not on this machine, or cannot be read: loading it says why.
    """
    try:
        if Path(path).is_dir():
            check_model_folder(Path(path))
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # a config of somebody else's may break any rule
        return None
    return cast(PreTrainedModel, model.base_model)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def compute_device(name: str) -> torch.device:
    """Where models live: as told, or under `auto` the first CUDA device where there is one, else the processor.

    Raises:
        ValueError: `cuda` was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('backbone.device = "cuda", but torch sees no CUDA device here; use "auto", or a CUDA build')
    return torch.device(name)


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether autocast to bfloat16 is used: as told, or under `auto` where `device` multiplies it natively."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"amx_bf16", "avx512_bf16"} & processor.features())
