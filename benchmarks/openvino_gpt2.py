"""GPT-2 in OpenVINO's operations, with a key-value cache as its state.

The `openvino` package alone has no way from a checkpoint to a model with a cache and quantized weights (optimum-intel
and NNCF have), but its operations can be put together directly, in the patterns that its CPU plug-in recognises:
integers → convert → scale → matrix multiplication becomes one linear operation on compressed weights, and read state →
gather by beam → concatenate → attention becomes attention with a cache in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from random_weights import rounded

from loading.modelopt_layout import BLOCK
from weight_loader import CheckpointConfig


def _constant(values: Any, dtype: Any = np.int64) -> ov.Node:
    return op.constant(np.asarray(values, dtype))


def _weight(array: np.ndarray, width: str) -> ov.Node:
    """A weight (out, in) as it is kept, and the operations that make float32 of it."""
    if width == "fp16":
        return op.convert(op.constant(array.astype(np.float16)), "f32")
    rows, columns = array.shape
    numbers, scales = rounded(array, width, BLOCK if width == "int4" else columns)
    if width == "int8":
        floats = op.multiply(op.convert(op.constant(numbers), "f16"), op.constant(scales))
        return op.convert(floats, "f32")
    blocks = numbers.reshape(-1, 2)
    packed = (blocks[:, 0].view(np.uint8) & 0xF) | (blocks[:, 1].view(np.uint8) << 4)
    tensor = ov.Tensor(packed, [rows, columns // BLOCK, BLOCK], ov.Type.i4)
    kept = op.constant(tensor, shared_memory=False)  # a copy: `packed` does not live long enough
    floats = op.multiply(op.convert(kept, "f16"), op.constant(scales[:, :, None]))
    return op.convert(op.reshape(floats, _constant([rows, columns]), False), "f32")


class _Builder:
    def __init__(self, config: CheckpointConfig, tensors: Iterable[tuple[str, np.ndarray]], width: str) -> None:
        self.config, self.width, self.tensors = config, width, dict(tensors)
        self.idx = op.parameter([-1, -1], np.int64, name="idx")
        self.position = op.parameter([-1, -1], np.int64, name="position")
        self.beam = op.parameter([-1], np.int32, name="beam")
        for node, name in ((self.idx, "idx"), (self.position, "position"), (self.beam, "beam")):
            node.output(0).get_tensor().set_names({name})
        self.assignments: list[ov.Node] = []

    def linear(self, x: ov.Node, layer: str) -> ov.Node:
        weight = _weight(self.tensors[f"{layer}.weight"], self.width)
        return op.add(op.matmul(x, weight, False, True), op.constant(self.tensors[f"{layer}.bias"]))

    def norm(self, x: ov.Node, layer: str) -> ov.Node:
        normal = op.mvn(x, _constant([-1]), True, self.config.layer_norm_epsilon, "inside_sqrt")
        scaled = op.multiply(normal, op.constant(self.tensors[f"{layer}.weight"]))
        return op.add(scaled, op.constant(self.tensors[f"{layer}.bias"]))

    def cached(self, new: ov.Node, name: str, heads: int, size: int) -> ov.Node:
        """The keys or values so far (B, H, T, D), with the new ones at their end."""
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, heads, -1, size]), ov.Type.f32, name
        variable = Variable(info)
        batch = op.gather(op.shape_of(self.idx), _constant([0]), _constant(0))
        shape = op.concat([batch, _constant([heads]), _constant([0]), _constant([size])], 0)
        past = op.read_value(op.broadcast(op.constant(np.float32(0)), shape), variable)
        whole = op.concat([op.gather(past, self.beam, _constant(0)), new], 2)
        self.assignments.append(op.assign(whole, variable))
        return whole

    def attention(self, x: ov.Node, layer: int, mask: ov.Node) -> ov.Node:
        heads, width = self.config.n_head, self.config.n_embd
        size = width // heads
        qkv = op.split(self.linear(x, f"h.{layer}.attn.c_attn"), _constant(-1), 3)
        query, key, value = (
            op.transpose(op.reshape(part, _constant([0, 0, heads, size]), True), _constant([0, 2, 1, 3]))
            for part in qkv.outputs()
        )
        key = self.cached(key, f"key.{layer}", heads, size)
        value = self.cached(value, f"value.{layer}", heads, size)
        y = op.scaled_dot_product_attention(query, key, value, mask, causal=False)
        y = op.reshape(op.transpose(y, _constant([0, 2, 1, 3])), _constant([0, 0, width]), True)
        return self.linear(y, f"h.{layer}.attn.c_proj")

    def mask(self) -> ov.Node:
        """(B, 1, T, S): 0 where a token looks at itself or back, minus infinity elsewhere.

        A sequence needs its own: the plug-in's attention reads a batch's masks beyond the end of a single one.
        """
        last = op.reduce_max(self.position, _constant([0, 1]), False)
        slots = op.range(_constant(0), op.add(last, _constant(1)), _constant(1), output_type="i64")
        tokens = op.unsqueeze(self.position, _constant([1, 3]))  # (B, 1, T, 1)
        visible = op.less_equal(op.unsqueeze(slots, _constant([0, 1, 2])), tokens)
        return op.select(visible, op.constant(np.float32(0)), op.constant(np.float32(-np.inf)))

    def build(self) -> ov.Model:
        # Each has a weight of its own: the plug-in does not fuse the head's where the embedding uses it, too.
        embedding = op.convert(op.constant(self.tensors["wte.weight"].astype(np.float16)), "f32")
        head = _weight(self.tensors["wte.weight"], self.width)
        positions = op.convert(op.constant(self.tensors["wpe.weight"].astype(np.float16)), "f32")
        x = op.add(
            op.gather(embedding, self.idx, _constant(0)), op.gather(positions, self.position, _constant(0))
        )  # (B, T, C)
        mask = self.mask()
        for layer in range(self.config.n_layer):
            x = op.add(x, self.attention(self.norm(x, f"h.{layer}.ln_1"), layer, mask))
            hidden = op.gelu(self.linear(self.norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"), "tanh")
            x = op.add(x, self.linear(hidden, f"h.{layer}.mlp.c_proj"))
        last = op.gather(x, _constant([-1]), _constant(1))  # (B, 1, C)
        logits = op.matmul(self.norm(last, "ln_f"), head, False, True)
        inputs = [self.idx, self.position, self.beam]
        return ov.Model([op.result(logits)], self.assignments, inputs, "gpt2")


def build(config: CheckpointConfig, tensors: Iterable[tuple[str, np.ndarray]], width: str) -> ov.Model:
    """The model: inputs "idx" (B, T), "position" (B, T) int64 and "beam" (B,) int32, output float32 logits (B, 1, V).

    Args:
        tensors: Float32 parameters by name, linear weights (out, in).
        width: "fp16", "int8" or "int4".
    """
    return _Builder(config, tensors, width).build()
