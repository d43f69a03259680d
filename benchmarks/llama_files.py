"""llama.cpp's file of a checkpoint: its architectures "gpt2" and "starcoder", which have the same tensors.

The names and the metadata are those of the specification in ggml's docs/gguf.md and of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weight_loader import open_checkpoint

_NAMES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
}
TYPES = {"fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


def write(path: Path, source: Path, width: str, tokens: Sequence[str] = (), merges: Sequence[str] = ()) -> None:
    """Writes the file of a float checkpoint, GPT-2 or multi-query GPTBigCode: every matrix in the width's type but the
    positions, which are float32 like vectors.

    Args:
        tokens: A byte-level BPE's by their ids, the last of which ends a text; none: token ids in, token ids out.
        merges: Its merges by their rank.
    """
    import gguf

    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    kind = gguf.GGMLQuantizationType[TYPES[width]]
    writer = gguf.GGUFWriter(path, "gpt2" if config.n_kv_head is None else "starcoder")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + TYPES[width]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(len(tokens) - 1)
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_add_bos_token(False)
    else:
        writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    for name, array in checkpoint.parameters("float32"):
        name = _gguf_name(name)
        if array.ndim == 2 and name != "position_embd.weight":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name.startswith("h."):
        _, layer, rest = name.split(".", 2)
        module, _, kind = rest.rpartition(".")
        return f"blk.{layer}.{_NAMES[module]}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_NAMES[module]}.{kind}"
