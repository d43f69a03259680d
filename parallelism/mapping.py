"""Which rank of tensor and pipeline parallelism holds what of a model (Shoeybi et al. 2019; Narayanan et al. 2021).

    Mapping(tp_size=2, pp_size=2, rank=3)    # the second half of every layer of the second half of the layers

Ranks are numbered as TensorRT-LLM numbers them (tensorrt_llm/mapping.py): those of a stage follow each other, so that
the ranks that sum up with each other, twice a layer, are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loading.config import CheckpointConfig


@dataclass(frozen=True)
class Mapping:
    """One rank among those of a model.

    Attributes:
        tp_size: How many ranks share every layer (tensor parallelism).
        pp_size: How many stages of layers there are (pipeline parallelism).
        rank: This one's number.
        embedding_sharding_dim: How the ranks of the first stage share the embeddings: 0: by rows, 1: by columns, None:
            not at all, each has them whole.

    Raises:
        ValueError: values that no rank can have.
    """

    tp_size: int = 1
    pp_size: int = 1
    rank: int = 0
    embedding_sharding_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"expected a rank from 0 to {self.world_size - 1} but got {self.rank}")
        if self.embedding_sharding_dim not in (None, 0, 1):
            raise ValueError(f"expected embedding_sharding_dim to be 0 or 1 but got {self.embedding_sharding_dim}")

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """The number of its stage."""
        return self.rank // self.tp_size

    @property
    def is_first_stage(self) -> bool:
        """Whether it has the embeddings."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it has the last norm and the head."""
        return self.pp_rank == self.pp_size - 1

    def of_rank(self, rank: int) -> Mapping:
        """Another rank of the same model."""
        return replace(self, rank=rank)

    def stage_ranks(self, stage: int) -> list[Mapping]:
        """The ranks of a stage, by their tp_rank."""
        return [self.of_rank(stage * self.tp_size + tp_rank) for tp_rank in range(self.tp_size)]

    def layers(self, n_layer: int) -> range:
        """Those of its stage. The first ``n_layer % pp_size`` stages have one more than the others."""
        size, longer = divmod(n_layer, self.pp_size)
        begin = self.pp_rank * size + min(self.pp_rank, longer)
        return range(begin, begin + size + (self.pp_rank < longer))

    def stage_of(self, name: str, n_layer: int) -> int:
        """The number of the stage that has a parameter or module."""
        stages = (self.of_rank(stage * self.tp_size) for stage in range(self.pp_size))
        return next(each.pp_rank for each in stages if each.is_of_stage(name, n_layer))

    def is_of_stage(self, name: str, n_layer: int) -> bool:
        """Whether its stage has a parameter, by the model's name ("h.3.ln_1.bias") or that of a module."""
        module, _, rest = name.partition(".")
        if module == "h":
            return int(rest.partition(".")[0]) in self.layers(n_layer)
        return self.is_first_stage if module in ("wte", "wpe") else self.is_last_stage

    def shares_embedding(self, config: CheckpointConfig) -> bool:
        """Whether every rank's part of a tied head is its part of the embedding, so that there is no other copy."""
        is_same_part = self.tp_size == 1 or self.embedding_sharding_dim == 0
        return config.tie_word_embeddings and not config.quant_lm_head and self.pp_size == 1 and is_same_part

    def check(self, config: CheckpointConfig) -> None:
        """Refuses a model that cannot be shared so.

        Raises:
            ValueError: sizes that do not divide; the text says which would.
        """
        if self.pp_size > config.n_layer:
            raise ValueError(
                f"expected pp_size to be at most {config.n_layer}, the number of layers, but got {self.pp_size}"
            )
        reason = _misfit(config, self.tp_size)
        if reason is not None:
            fitting = [size for size in range(1, config.n_head + 1) if _misfit(config, size) is None]
            raise ValueError(f"expected {reason} but got {self.tp_size}: {_listed(fitting)} would do")
        if self.embedding_sharding_dim == 1 and config.n_embd % self.tp_size:
            raise ValueError(
                f"expected tp_size to divide the width of {config.n_embd}, along which the embeddings are shared, but "
                f"got {self.tp_size}: embedding_sharding_dim 0 pads rows instead"
            )

    def local(self, config: CheckpointConfig) -> CheckpointConfig:
        """The settings of the layers that a rank has: those of a smaller model, whose layers are numbered from 0.

        Its vocabulary, context and width stay the model's.
        """
        return replace(
            config,
            n_layer=len(self.layers(config.n_layer)),
            n_head=config.n_head // self.tp_size,
            n_kv_head=max(1, config.kv_heads // self.tp_size),
            head_dim=config.head_size,
            n_inner=config.n_inner // self.tp_size,
        )


def _misfit(config: CheckpointConfig, tp_size: int) -> str | None:
    """What does not allow so many ranks to share a layer; None: nothing."""
    if config.n_head % tp_size:
        return f"tp_size to divide the {config.n_head} heads"
    if config.kv_heads % tp_size and tp_size % config.kv_heads:
        return f"tp_size to divide the {config.kv_heads} heads of keys and values, or to be a multiple of them,"
    if config.n_inner % tp_size:
        return f"tp_size to divide the MLP's width of {config.n_inner}"
    if config.quant_mode == "int4-weight-only":
        for width in (config.query_width, config.n_inner):
            if width // tp_size % config.block_size:
                return f"tp_size to leave whole int4 blocks of {config.block_size} of {width} input features"
    return None


def _listed(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes)) if len(sizes) < 3 else f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
