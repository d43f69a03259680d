"""The settings of a training run: defaults, then config files, then --key=value."""

from __future__ import annotations

import ast
import dataclasses
import math
import runpy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from command_line import UsageError

LARGEST = 1 << 63  # of whole numbers
MOST = 1024  # layers, threads, an adapter's rank
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
#: The linear layers of a GPT-2's blocks, as PEFT finds them: by the end of their names.
LORA_TARGETS = ("c_attn", "c_proj", "c_fc", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, with its default. Names are nanoGPT's where it has the same setting."""

    # Where from, where to
    dataset: str = "shakespeare_char"  # a folder under data/ that its prepare.py has filled, or any folder's full path
    out_dir: str = "out"  # a HuggingFace folder, and ckpt.pt beside it, from which a run resumes
    init_from: str = "scratch"  # scratch; resume: go on with out_dir; else a HuggingFace folder or hub name to finetune
    # Model; a checkpoint named by init_from brings its own n_layer, n_head and n_embd
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 256  # context, in tokens
    bias: bool = True  # False: the biases of linear layers and LayerNorms are zero and stay so
    dropout: float = 0.0  # of the embeddings and the residual branches
    attn_dropout: float = 0.0  # of the attention's weights; torch's fast attention on a CPU has none
    qat: bool = False  # quantization-aware: compute with weights in int8, and save them so (requirements/quant.txt)
    # LoRA: what init_from names stays as it is, and out_dir becomes a PEFT folder of an adapter for it
    lora_rank: int = 0  # of its matrices; 0: all weights are trained, and there is no adapter
    lora_alpha: float = 16.0  # the adapter adds lora_alpha / lora_rank * B @ A to a weight
    lora_dropout: float = 0.0  # of what goes into A
    lora_targets: str = "c_attn"  # the linear layers that it adds to, with commas between: c_attn,attn.c_proj,mlp.c_fc
    # Data; each process of torchrun takes a batch of its own in each of the accumulated steps
    batch_size: int = 8  # windows of block_size tokens
    gradient_accumulation_steps: int = 1  # batches to a step of the optimizer
    short_block_size: int = 0  # the run begins with as many tokens a step in windows of this length; 0: it does not
    short_share: float = 0.0  # of the steps
    bpe_dropout: float = 0.0  # the probability of skipping a merge, in the windows that are re-tokenized
    # AdamW
    max_iters: int = 3000
    learning_rate: float = 1e-3
    decay_lr: bool = True  # False: it stays as it is after the warm-up
    lr_decay_iters: int = 0  # where the cosine ends; 0: at max_iters
    min_lr: float = 1e-4  # and with which rate
    warmup_iters: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1  # of the matrices; biases and LayerNorms are not decayed
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 turns it off
    ema_decay: float = 0.0  # the saved weights are this moving average's; 0 saves the last step's
    # Evaluation
    eval_interval: int = 250  # steps
    eval_iters: int = 0  # batches of the validation text, at even distances; 0: all of it
    # Reports, beside those on stderr
    plot: bool = False  # draw the losses in out_dir/loss.png
    tensorboard: bool = False  # log to out_dir/tensorboard
    wandb_log: bool = False  # log to Weights & Biases
    wandb_project: str = "nanogpt-tripy"
    wandb_run_name: str = ""
    # System
    seed: int = 1337
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: the type of the matrix products; weights are float32
    compile: bool = False  # torch.compile: pays on a GPU; on two CPU cores it was slower than eager
    threads: int = 0  # CPU threads; 0 leaves torch's choice


def parse_config(argv: list[str]) -> TrainConfig:
    """Merge the defaults, then the config files, then the --key=value pairs of `argv`, whatever their order in it.

    >>> parse_config(["--n_layer=2", "--learning_rate=1e-4"]).n_layer
    2
    """
    from_files: dict[str, Any] = {}
    from_flags: dict[str, Any] = {}
    for argument in argv:
        if not argument.startswith("--"):
            from_files |= read_config_file(Path(argument))
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            raise UsageError(f"expected --key=value, not {argument!r}")
        try:
            from_flags[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            from_flags[key] = value  # a bare word, such as --device=cpu
    return make_config(from_files | from_flags)


def read_config_file(path: Path) -> dict[str, Any]:
    """Run a config file and return what it assigns; its imports and _private names are its own business."""
    try:
        assigned = runpy.run_path(str(path))
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from None
    except Exception as error:  # the file is the user's program: whatever it raises is about that file
        raise UsageError(f"the config file {path} fails: {type(error).__name__}: {error}") from None
    return {k: v for k, v in assigned.items() if not k.startswith("_") and not isinstance(v, ModuleType)}


def make_config(overrides: dict[str, Any]) -> TrainConfig:
    """Return the defaults with `overrides`, each checked for its name, its type and its range."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for key, value in overrides.items():
        if key not in fields:
            raise UsageError(f"unknown key {key!r}; the keys are {', '.join(fields)}")
        wanted = type(fields[key].default)
        if wanted is float and type(value) is int and abs(value) < LARGEST:
            overrides[key] = value = float(value)
        if type(value) is not wanted:
            raise UsageError(f"{key} must be of type {wanted.__name__}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key} must be a finite number, not {value}")
        if isinstance(value, int) and value >= LARGEST:
            raise UsageError(f"{key} must be below {LARGEST}, not {value}")
    config = TrainConfig(**overrides)
    counts = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps")
    for key in (*counts, "max_iters", "eval_interval"):
        if getattr(config, key) < 1:
            raise UsageError(f"{key} must be at least 1, not {getattr(config, key)}")
    for key in ("n_layer", "threads", "lora_rank"):
        if getattr(config, key) > MOST:
            raise UsageError(f"{key} must be at most {MOST}, not {getattr(config, key)}")
    at_least_0 = ("learning_rate", "min_lr", "weight_decay", "grad_clip", "short_block_size")
    for key in ("lr_decay_iters", "warmup_iters", "eval_iters", "threads", "seed", *at_least_0):
        if getattr(config, key) < 0:
            raise UsageError(f"{key} must be at least 0, not {getattr(config, key)}")
    for key in ("dropout", "attn_dropout", "lora_dropout", "bpe_dropout", "short_share", "beta1", "beta2", "ema_decay"):
        if not 0 <= getattr(config, key) < 1:
            raise UsageError(f"{key} must be at least 0 and below 1, not {getattr(config, key)}")
    _check_lora(config)
    if config.n_embd % config.n_head:
        raise UsageError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
    if config.short_share and not 1 <= config.short_block_size <= config.block_size:
        raise UsageError(f"short_block_size must be 1 to block_size={config.block_size}, not {config.short_block_size}")
    return config


def _check_lora(config: TrainConfig) -> None:
    """Refuses an adapter that cannot be, and settings of one where there is none."""
    if config.lora_rank < 0:
        raise UsageError(f"lora_rank must be at least 1, or 0 for no adapter, not {config.lora_rank}")
    if config.lora_rank == 0:
        for key in LORA_FIELDS:
            if getattr(config, key) != getattr(TrainConfig, key):
                raise UsageError(f"{key}={getattr(config, key)} is for an adapter: give lora_rank, too")
        return
    if config.init_from == "scratch":
        raise UsageError(f"lora_rank={config.lora_rank} needs init_from, the checkpoint that the adapter is for")
    if config.qat:
        raise UsageError("expected lora_rank or qat=True, not both: an adapter's base stays as it is")
    if config.lora_alpha <= 0:
        raise UsageError(f"lora_alpha must be above 0, not {config.lora_alpha}")
    for target in config.lora_targets.split(","):
        if target not in LORA_TARGETS:
            raise UsageError(f"expected lora_targets to be of {', '.join(LORA_TARGETS)}, not {target!r}")
