"""A checkpoint: what is stored compared with what its configuration implies, and its parameters one by one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion import PARAMETER_DTYPES, convert, numpy_dtype
from loading import modelopt_layout, numbers
from loading.containers.tensors import Stored
from loading.errors import CheckpointError, listed
from loading.fingerprint import content_pieces
from loading.modelopt_layout import DESCRIPTION_FILE, Spec
from loading.opening import open_path
from loading.rank_folder import RankFolder
from loading.table import Parameter, parameters
from parallelism.mapping import Mapping
from parallelism.splitting import part_of


class Checkpoint:
    """A validated checkpoint on this machine. The files stay open (memory-mapped) as long as it lives.

    Attributes:
        path: The folder or file.
        config: Its settings.
        layout: How its parameters are named as they are stored.
        weight_files: The files that hold its weights.
        tokenizer_source: Where its tokenizer comes from: a folder, or what tokenizing/sources.py has.

    Raises:
        CheckpointError: at construction, from its settings and the headers of the weight files alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        opened = open_path(path)
        self.config, self.layout, self._tensors = opened.config, opened.layout, opened.tensors
        self.weight_files, self._origin = opened.files, opened.origin
        self.tokenizer_source = opened.tokenizer_source
        self._stored_names = self._without_prefix()  # → names in the file
        wte, head = (f"{self.layout.table[name].names[0]}.weight" for name in ("wte", "lm_head"))
        if self.config.tie_word_embeddings and wte not in self._stored_names and head in self._stored_names:
            self._stored_names[wte] = self._stored_names.pop(head)  # safetensors' save_model keeps either
        headers = self._headers()
        try:
            if opened.description is not None:
                fields = modelopt_layout.config_fields(
                    opened.description, self.config.tie_word_embeddings, self.layout, headers
                )
                self.config = replace(self.config, **fields)
            self._parameters = list(parameters(self.config, self.layout, has_conv1d=opened.description is None))
            expected = modelopt_layout.stored_tensors(self.config, self._with_stored_head(head), self.layout, headers)
        except ValueError as error:
            raise CheckpointError(f"{path / DESCRIPTION_FILE}: {error}") from None
        self._check_tensors(expected, headers)
        self._owners = {name: spec.of for name, spec in expected.items()}

    def _without_prefix(self) -> dict[str, str]:
        """The names of stored tensors without the layout's prefix → with it, where they have it."""
        names: dict[str, str] = {}
        for stored_name in self._tensors.tensors:
            name = stored_name.removeprefix(self.layout.prefix)
            if name.endswith(self.layout.ignored) or name in self.layout.copies:
                continue
            if name in names:
                raise CheckpointError(f"{self.path}: {name} is stored twice, with and without {self.layout.prefix!r}")
            names[name] = stored_name
        return names

    def _headers(self) -> dict[str, Stored]:
        return {name: self._tensors.tensors[stored_name] for name, stored_name in self._stored_names.items()}

    def _with_stored_head(self, head: str) -> list[Parameter]:
        """The parameters, and a tied head, which may be stored all the same."""
        if not self.config.tie_word_embeddings or head not in self._stored_names:
            return self._parameters
        [embedding] = (parameter for parameter in self._parameters if parameter.name == "wte.weight")
        piece = replace(embedding.pieces[0], name=head)
        return [*self._parameters, replace(embedding, name="lm_head.weight", pieces=(piece,))]

    def _check_tensors(self, expected: dict[str, Spec], found: dict[str, Stored]) -> None:
        """Compare the stored tensors with those that the settings imply; name all differences at once."""
        shapes, dtypes = [], []
        for name in expected.keys() & found.keys():
            spec, stored, stored_name = expected[name], found[name], self._stored_names[name]
            if not spec.fits(stored.shape):
                shapes.append(f"{stored_name} (expected {spec.shape}, got {stored.shape})")
            if stored.dtype not in spec.dtypes:
                dtypes.append(f"{stored_name} (expected {', '.join(spec.dtypes)}, got {stored.dtype})")
        faults = {
            "missing": [name for name in expected if name not in found],
            "unexpected": [self._stored_names[name] for name in found if name not in expected],
            "of a wrong shape": sorted(shapes),
            "of a wrong dtype": sorted(dtypes),
        }
        all_found = "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)
        if all_found:
            raise CheckpointError(
                f"the tensors in {str(self.path)!r} are not those that its {self._origin} implies: {all_found}"
            )

    def parameters(self, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every parameter by name, in the order of `parameter_shapes`, reading one tensor at a time.

        Args:
            dtype: "float32", "float16" or "bfloat16" (arrays of `ml_dtypes.bfloat16`), for all parameters but those of
                the norms, which always come as float32, and what has scales, which comes as float32 where
                `needs_float32_scales`.

        Yields:
            (name, array): C-contiguous; linear weights are (out, in); "lm_head.weight" (vocab, n_embd) only if untied
            or quantized, and if it is tied and `config.quant_embedding`, instead of "wte.weight".

            Of a quantized layer, the values that its integers stand for, which quantizing by the scales that follow
            gives back exactly, and "weight_scale", "input_scale", "pre_quant_scale" as the mode has them, where one
            element stands for the whole tensor with shape (). In int4-weight-only the weight is (in, out) and its
            scales (in / block_size, out). Of a quantized cache, "attn.k_scale" and "attn.v_scale" of each layer, of
            shape (). No scale is zero.

        Raises:
            CheckpointError: a number is not finite, or not in `dtype` (the tensor is named), a scale is negative, or a
                head is stored that differs from the embedding although the settings say that they are tied.
            ValueError: another `dtype`.
        """
        if dtype not in PARAMETER_DTYPES:
            raise ValueError(f"expected dtype to be one of {', '.join(PARAMETER_DTYPES)}, got {dtype!r}")
        self._check_tied_head()
        target, wide = numpy_dtype(dtype), numpy_dtype("float32")
        scaled_target = wide if self.needs_float32_scales(dtype) else target
        config, head = self.config, self.layout.table["lm_head"].names[0]
        with self._named():
            for parameter in self._in_order():
                if modelopt_layout.is_quantized(config, parameter.name):
                    yield from numbers.quantized(parameter, config, head, self._read, self._stored_names, scaled_target)
                else:
                    yield parameter.name, numbers.plain(parameter, self._read, wide if parameter.is_norm else target)
            if config.kv_cache_dtype is not None:
                for layer in range(config.n_layer):
                    for which in ("k", "v"):
                        name = self.layout.cache_scale.format(layer, which)
                        scale = numbers.cache_scale(name, config, self._read, scaled_target)
                        yield f"h.{layer}.attn.{which}_scale", scale

    def rank_parameters(self, dtype: str, mapping: Mapping) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a rank's part of every parameter that its stage has, by the whole model's names, in their order.

        Of what is not quantized nothing else is read from the files; of a folder of ranks' files that is shared in the
        same way, the rank's own file alone. A tied head that is more than the rank's part of the embedding
        (`Mapping.shares_embedding`) comes last in the last stage, as "lm_head.weight".

        Raises:
            CheckpointError: as `parameters` does, or the model cannot be shared so.
            ValueError: another `dtype`.
        """
        if dtype not in PARAMETER_DTYPES:
            raise ValueError(f"expected dtype to be one of {', '.join(PARAMETER_DTYPES)}, got {dtype!r}")
        with self._named():
            mapping.check(self.config)
            if self.config.quant_mode is not None or self.config.kv_cache_dtype is not None:
                head = None
                for name, array in self.parameters(dtype):
                    if mapping.is_of_stage(name, self.config.n_layer):
                        yield name, np.asarray(part_of(name, array, self.config, mapping), order="C")
                    if name == "wte.weight" and self.config.tie_word_embeddings and not self.config.quant_lm_head:
                        head = None if mapping.shares_embedding(self.config) else array
                if head is not None and mapping.is_last_stage:
                    head = part_of("lm_head.weight", head, self.config, mapping)
                    yield "lm_head.weight", np.asarray(head, order="C")
                return
            heads = []
            if self.config.tie_word_embeddings and not mapping.shares_embedding(self.config):
                [embedding] = (each for each in self._parameters if each.name == "wte.weight")
                heads = [replace(embedding, name="lm_head.weight")]
            for parameter in [*self._parameters, *heads]:
                if mapping.is_of_stage(parameter.name, self.config.n_layer):
                    kind = "float32" if parameter.is_norm else dtype
                    yield parameter.name, convert(parameter.name, self._part(parameter, mapping), numpy_dtype(kind))

    def _part(self, parameter: Parameter, mapping: Mapping) -> np.ndarray:
        """A rank's part of a parameter that is not quantized, as it is stored."""
        tensors = self._tensors
        if not isinstance(tensors, RankFolder) or not tensors.has_files_of(mapping):
            return part_of(parameter.name, numbers.Unread(parameter, self._read), self.config, mapping)
        if parameter.name == "lm_head.weight":
            return tensors.part("lm_head.weight", mapping)
        return np.concatenate([tensors.part(piece.name, mapping) for piece in parameter.pieces], parameter.axis)

    def norms(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the parameters of norms, in float32, as `parameters` does."""
        with self._named():
            for parameter in self._parameters:
                if parameter.is_norm:
                    yield parameter.name, numbers.plain(parameter, self._read, numpy_dtype("float32"))

    @property
    def stored_dtype(self) -> str:
        """The type of `PARAMETER_DTYPES` that loses nothing of the embedding as it is stored."""
        kinds = {"F16": "float16", "BF16": "bfloat16"}
        header = self._tensors.tensors[self._stored_names[f"{self.layout.table['wte'].names[0]}.weight"]]
        return kinds.get(header.dtype, "float32")

    def _in_order(self) -> list[Parameter]:
        """The parameters; a head that is quantized and stored beside the embedding that it shared is one of its own."""
        if not self.config.tie_word_embeddings or not self.config.quant_lm_head or self.config.quant_embedding:
            return self._parameters
        return self._with_stored_head(f"{self.layout.table['lm_head'].names[0]}.weight")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """What is wrong with a number is said with the checkpoint's path."""
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def needs_float32_scales(self, dtype: str) -> bool:
        """Whether a scale is below the normal numbers of `dtype`, which would round it coarsely, or to zero.

        Those of weights that are zero do not count: any other scale does as well.
        """
        return dtype != "float32" and numbers.has_small_scales(self._stored_names, self._read, numpy_dtype(dtype))

    def folded_layers(self) -> set[str]:
        """The layers ("h.0.attn.c_attn") whose pre_quant_scale was multiplied into the norm before them."""
        config = self.config
        if config.quant_mode != "int4-weight-only" or not config.has_pre_quant_scale:
            return set()
        return {
            parameter.name.removesuffix(".weight")
            for parameter in self._parameters
            if modelopt_layout.is_quantized(config, parameter.name)
            and len(parameter.pieces) > 1
            and f"{parameter.pieces[0].module}.pre_quant_scale" not in self._stored_names
        }

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of what is stored of every parameter, and of the scales beside it, by the model's names."""
        sizes: dict[str, int] = {}
        for name, header in self._headers().items():
            sizes[self._owners[name]] = sizes.get(self._owners[name], 0) + header.num_bytes
        return sizes

    def _read(self, name: str) -> np.ndarray:
        """A stored tensor, whole, by its name without the prefix."""
        return self._tensors.read(self._stored_names[name])

    def _check_tied_head(self) -> None:
        """Refuse a stored head that is not the embedding: transformers would not tie it, so its logits would differ."""
        if not self.config.tie_word_embeddings or self.config.quant_lm_head != self.config.quant_embedding:
            return
        step = max(1, 2**22 // self.config.n_embd)  # some 16 MB at a time
        wte, head = (self.layout.table[name].names[0] for name in ("wte", "lm_head"))
        for suffix in ("weight", "weight_scale"):
            if f"{head}.{suffix}" not in self._stored_names:
                continue
            names = [self._stored_names[f"{module}.{suffix}"] for module in (head, wte)]
            shape = self._tensors.tensors[names[0]].shape
            parts = [slice(start, start + step) for start in range(0, shape[0], step)] if shape else [...]
            if not all(_are_equal(*(self._tensors.read(name, part) for name in names)) for part in parts):
                raise CheckpointError(
                    f"{self.path / self._origin} ties {head}.{suffix} to {wte}.{suffix}, but the stored values differ: "
                    "expected equal values or tie_word_embeddings=false"
                )

    def fingerprint(self) -> str:
        """A hexadecimal hash that identifies the configuration and the weights, to name what is derived from them.

        It covers the validated config but for the tokens that end a text, every tensor's name, dtype and shape, and
        each weight file's content: in full up to 64 MB (so a copied small checkpoint keeps its fingerprint); of a
        larger file its size, its time of modification in nanoseconds, and 256 evenly spaced samples of 64 KiB, among
        them its start and its end.
        """
        settings: dict[str, Any] = {**self.config.as_dict(), "eos_token_ids": None}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        for name, stored_name in sorted(self._stored_names.items()):
            digest.update(repr((name, stored_name, self._tensors.tensors[stored_name])).encode())
        for path in self.weight_files:
            try:
                for piece in content_pieces(path):
                    digest.update(piece)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        return digest.hexdigest()


def _are_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors have the same values; NaN counts as one, for whoever reads the values to refuse."""
    return np.array_equal(a, b) or np.array_equal(a, b, equal_nan=True)
