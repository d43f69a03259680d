"""What is quantized, how, and what it is calibrated on."""

from __future__ import annotations

import math
from dataclasses import dataclass

MODES = ("int8-weight-only", "int4-weight-only", "fp8", "int8-smoothquant")
METHODS = ("modelopt", "rtn", "gptq")
MODE_OF_BITS = {8: "int8-weight-only", 4: "int4-weight-only", 3: "int4-weight-only"}  # 3 bits in int4's container
KV_CACHE_DTYPES = ("float16", "int8", "fp8")
BLOCK = 128  # input features that share a scale in ModelOpt's int4
CALIB_SIZE = 32  # samples
CALIB_LENGTH = 256  # tokens of each, or the whole context where that is shorter
CALIB_BATCH_TOKENS = 2048  # that go through the model together: speed against memory
MOST_DAMPING = 1e6  # times the diagonal's mean: far less already leaves nothing of the Hessian
SMOOTHQUANT_ALPHA = 0.5  # the paper's; ModelOpt's own default of 1.0 moves the whole difficulty into the weights


class QuantizationError(Exception):
    """A checkpoint cannot be quantized as asked. The text is one line, ready to be shown to the user."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class QuantizationConfig:
    """What is quantized, how, and what it is calibrated on.

    Attributes:
        mode: One of `MODES`, or None to leave the linear layers as they are.

            - ``int8-weight-only``: one scale an output feature. No calibration.
            - ``int4-weight-only``: one scale for 128 input features, or for ``group_size``, after AWQ's scaling of the
              inputs (Lin et al. 2023, arXiv:2306.00978).
            - ``fp8``: weights and inputs in E4M3, one scale a tensor (Micikevicius et al. 2022, arXiv:2209.05433).
              The language-model head is included.
            - ``int8-smoothquant``: weights and inputs in int8, one scale a tensor, after SmoothQuant's scaling of the
              inputs (Xiao et al. 2022, arXiv:2211.10438).

            With the methods ``rtn`` and ``gptq`` it follows from ``bits``, and may be left out.
        method: How the weights of the linear layers are rounded: one of `METHODS`.

            - ``modelopt``: as the mode says, by NVIDIA ModelOpt.
            - ``rtn``: to the nearest integer.
            - ``gptq``: by GPTQ (Frantar et al. 2023, arXiv:2210.17323); gptq.py says how.
        bits: Of rtn and gptq: 8, 4 or 3. Three bits are stored in four. None: those of the mode.
        group_size: Of 4 or 3 bits: input features that share a scale. It has to divide the widths of all layers. None:
            128 in ModelOpt's method, in the others an output feature has one.
        clipping: Of rtn and gptq: scales are searched for the least error of the weights; else they span the largest.
        act_order: Of gptq: columns by decreasing diagonal of the Hessian; else from left to right.
        damping: Of gptq: what is added to the Hessian's diagonal, relative to the diagonal's mean.
        kv_cache_dtype: One of `KV_CACHE_DTYPES`; "float16" leaves the cache in the model's own type. One scale for the
            keys and one for the values of each layer.
        quant_lm_head: Also quantize the weight of the language-model head and, where it is tied, the embedding.
            Weight-only, without AWQ and SmoothQuant, whose scaling of columns an embedding would have to undo.
        quant_embeddings: In int8-weight-only, also quantize the token and the position embedding, one scale a row, and
            the head. Only biases and LayerNorms are left in float32: *full int8*.
        per_channel: In int8-smoothquant, one weight scale an output feature.
        per_token: In int8-smoothquant, one input scale a token, computed as it comes.
        calib_data: A UTF-8 text file, or the name of a data set at the HuggingFace hub. None: the embedded
            checkpoint's calibration.txt.
        calib_size: How many samples, evenly spaced over the text. They overlap where the text is short.
        calib_length: Tokens of each sample. None: 256, or the whole context where that is shorter.

    Raises:
        QuantizationError: a value that is not possible; the message says what was expected and what came.
    """

    mode: str | None = None
    kv_cache_dtype: str = "float16"
    quant_lm_head: bool = False
    quant_embeddings: bool = False
    per_channel: bool = False
    per_token: bool = False
    calib_data: str | None = None
    calib_size: int = CALIB_SIZE
    calib_length: int | None = None
    method: str = "modelopt"
    bits: int | None = None
    group_size: int | None = None
    clipping: bool = True
    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        self._settle_method()
        if self.mode is not None and self.mode not in MODES:
            raise QuantizationError(f"expected a quantization mode of {', '.join(MODES)} but got {self.mode!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            expected = ", ".join(KV_CACHE_DTYPES)
            raise QuantizationError(f"expected a KV cache dtype of {expected} but got {self.kv_cache_dtype!r}")
        if self.mode is None and self.kv_cache_dtype == "float16":
            raise QuantizationError("expected a quantization mode or a KV cache dtype other than float16 but got none")
        if self.quant_lm_head and self.mode is None:
            raise QuantizationError("expected a quantization mode with --quant-lm-head but got none")
        if self.quant_embeddings and self.mode != "int8-weight-only":
            raise QuantizationError(
                f"expected --quant-embeddings with int8-weight-only only but got it with {self.mode}"
            )
        if self.quant_embeddings and not self.quant_lm_head:
            raise QuantizationError("expected quant_embeddings with quant_lm_head only")
        for name in ("per_channel", "per_token"):
            if getattr(self, name) and self.mode != "int8-smoothquant":
                option = f"--{name.replace('_', '-')}"
                raise QuantizationError(f"expected {option} with int8-smoothquant only but got it with {self.mode}")
        for name in ("calib_size", "calib_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise QuantizationError(f"expected --{name.replace('_', '-')} to be at least 1 but got {value}")

    def _settle_method(self) -> None:
        """Checks the settings of rtn and gptq, and derives the mode from the bits or the bits from the mode."""
        if self.method not in METHODS:
            raise QuantizationError(f"expected --method to be {', '.join(METHODS)} but got {self.method!r}")
        if self.method == "modelopt":
            if self.bits is not None:
                raise QuantizationError("expected --bits with --method rtn or gptq only but got it without")
            if self.group_size is not None and self.mode != "int4-weight-only":
                raise QuantizationError(
                    f"expected --group-size with int4-weight-only, or --method rtn or gptq, but got it with {self.mode}"
                )
            if not self.clipping:
                raise QuantizationError("expected --no-clipping with --method rtn or gptq only but got it without")
        elif self.bits is None:
            bits = {mode: bits for bits, mode in reversed(MODE_OF_BITS.items())}
            if self.mode not in bits:
                shown = "neither" if self.mode is None else self.mode
                raise QuantizationError(
                    f"expected --bits, or a mode of {', '.join(bits)}, with --method {self.method} but got {shown}"
                )
            object.__setattr__(self, "bits", 4 if self.mode == MODE_OF_BITS[4] else 8)
        elif self.bits not in MODE_OF_BITS:
            raise QuantizationError(f"expected --bits to be {', '.join(map(str, MODE_OF_BITS))} but got {self.bits}")
        elif self.mode not in (None, MODE_OF_BITS[self.bits]):
            raise QuantizationError(
                f"expected {MODE_OF_BITS[self.bits]} with {self.bits} bits by {self.method} but got {self.mode}"
            )
        else:
            object.__setattr__(self, "mode", MODE_OF_BITS[self.bits])
        if self.method != "gptq" and not self.act_order:
            raise QuantizationError(f"expected --no-act-order with --method gptq only but got it with {self.method}")
        if self.method != "gptq" and self.damping != 0.01:
            raise QuantizationError(f"expected --damping with --method gptq only but got it with {self.method}")
        if not 0 < self.damping <= MOST_DAMPING:
            raise QuantizationError(
                f"expected --damping to be a positive number of at most {MOST_DAMPING:g} but got {self.damping}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise QuantizationError(f"expected --group-size to be at least 1 but got {self.group_size}")
        if self.group_size is not None and self.bits == 8:
            raise QuantizationError("expected --group-size with 4 or 3 bits: int8 has one scale an output feature")

    @property
    def needs_calibration(self) -> bool:
        """Whether anything depends on activations; the scales of int8 weights follow from the weights alone."""
        if self.method == "rtn":
            return self.kv_cache_dtype != "float16"
        return self.method == "gptq" or self.mode not in (None, "int8-weight-only") or self.kv_cache_dtype != "float16"

    def block(self, *widths: int) -> int:
        """Input features that share a stored scale in int4, of layers whose inputs have these widths.

        Where an output feature has one scale, it is repeated: layers of all widths have the same block, as the layout
        wants it, so it is the largest that divides them all.
        """
        if self.method == "modelopt":
            return self.group_size or BLOCK
        return self.group_size or math.gcd(*widths)
