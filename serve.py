"""Serves a GPT-2 over HTTP, by OpenAI's API: parse → load → compile (or open a saved engine) → serve.

    python serve.py
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "What is the answer?"}'

Requests are computed together, and each gets what it gets alone: the same tokens, text and log-probabilities, to the
last bit. It listens to this machine only, unless --host says otherwise.
"""

from __future__ import annotations

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command_line
import engine_cache
import quantization
import text_file
from command_line import UsageError
from engine_cache import EngineError
from quantization import QuantizationError
from weight_loader import Checkpoint, CheckpointError, open_checkpoint

if TYPE_CHECKING:
    from adapters.lora import Lora
    from adapters.prompts import PromptTable
    from engine import AdapterRoom
    from serving.http.adapters import AdapterNames
    from serving.http.service import Service

PORT = 8000
USUAL_RANK = 16  # of adapters that nobody has seen yet
REQUIREMENTS = "requirements/serve.txt"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint.

    Raises:
        UsageError, QuantizationError: an unknown option, or a value out of its range.
    """
    parser = command_line.Parser("serve.py", "Serve a GPT-2 by OpenAI's API.")
    command_line.add_model_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of weights and activations (default %(default)s)",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="what requests call it (default: --model-type's)")
    parser.add_argument("--chat-template", metavar="FILE", type=command_line.path, help="Jinja, for conversations")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for other machines, too (default %(default)s)")
    server.add_argument("--port", metavar="N", type=int, default=PORT, help="0: any that is free (default %(default)s)")
    key = server.add_mutually_exclusive_group()
    key.add_argument(
        "--api-key", metavar="KEY", help="requests have to send it (default: NANOGPT_TRIPY_API_KEY, if set)"
    )
    key.add_argument("--api-key-file", metavar="FILE", type=command_line.path, help="the key is on its first line")
    server.add_argument(
        "--max-queue", metavar="N", type=int, default=256, help="answers that wait (default %(default)s)"
    )
    server.add_argument(
        "--max-connections", metavar="N", type=int, default=1024, help="at the same time (default %(default)s)"
    )
    server.add_argument(
        "--max-body", metavar="MIB", type=int, default=4, help="of a request's body (default %(default)s)"
    )
    server.add_argument(
        "--shutdown-timeout",
        metavar="S",
        type=int,
        default=30,
        help="seconds in which requests may finish after SIGTERM (default %(default)s)",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-num-seqs", metavar="N", type=int, default=64, help="answers computed together (default %(default)s)"
    )
    engine.add_argument(
        "--max-step-tokens", metavar="N", type=int, default=512, help="of one step (default %(default)s)"
    )
    engine.add_argument("--cache-memory", metavar="MIB", type=int, help="for keys and values (default: at most 1024)")
    engine.add_argument("--no-prefix-cache", action="store_true", help="prompts that begin alike share nothing")
    engine.add_argument(
        "--speculate", metavar="prompt-lookup|NAME", help="guess tokens by lookup in the text, or by a smaller model"
    )
    adapters = parser.add_argument_group("adapters (LoRA)")
    adapters.add_argument(
        "--lora-modules", metavar="NAME=DIR", nargs="+", default=[], help="that requests may have, by these names"
    )
    adapters.add_argument(
        "--lora-dir", metavar="DIR", type=command_line.path, help="clients may have adapters loaded that lie in it"
    )
    adapters.add_argument(
        "--max-loras", metavar="N", type=int, default=8, help="in use at the same time (default %(default)s)"
    )
    adapters.add_argument("--max-cpu-loras", metavar="N", type=int, default=64, help="in memory (default %(default)s)")
    adapters.add_argument(
        "--max-lora-rank", metavar="N", type=int, help="of those that are loaded later (default: 16, or what is needed)"
    )
    adapters.add_argument(
        "--prompt-tables",
        metavar="NAME=FILE",
        nargs="+",
        default=[],
        help="prompt tables: requests for NAME, or for NAME:TASK of several tasks, begin with a task's virtual tokens",
    )
    engine.add_argument("--threads", metavar="N", type=int, help="of the runtime (default: the cores that it may use)")
    quantization.add_arguments(parser.add_argument_group("quantization"))
    command_line.add_engine_arguments(parser)
    options = parser.parse_args(arguments)
    options.quantization = quantization.config_from(options) if quantization.is_asked_for(options) else None
    command_line.check_range(
        options,
        port=(0, 65535),
        max_queue=(1, None),
        max_connections=(1, 1 << 20),
        max_body=(1, 1 << 10),
        shutdown_timeout=(0, 86400),
        max_num_seqs=(1, 1024),
        max_step_tokens=(1, 1 << 16),
        cache_memory=(1, 1 << 24),
        threads=(1, command_line.MAX_THREADS),
        max_loras=(1, 256),
        max_cpu_loras=(1, 1 << 16),
        max_lora_rank=(1, 256),
    )
    options.lora_modules = [_named_path("lora-modules", each) for each in options.lora_modules]
    options.prompt_tables = [_named_path("prompt-tables", each) for each in options.prompt_tables]
    names = [name for name, _ in (*options.lora_modules, *options.prompt_tables)]
    for name in names:
        if names.count(name) > 1 or name == options.served_model_name:
            raise UsageError(
                f"expected --lora-modules and --prompt-tables to have names of their own but {name!r} is there twice"
            )
    if len(options.lora_modules) > options.max_cpu_loras:
        raise UsageError(
            f"expected at most {options.max_cpu_loras} --lora-modules (--max-cpu-loras) but got "
            f"{len(options.lora_modules)}"
        )
    if options.lora_dir is not None and not options.lora_dir.is_dir():
        raise UsageError(f"expected --lora-dir to be a folder but got {options.lora_dir}")
    return options


def _named_path(option: str, text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not (name and found and path):
        raise UsageError(f"expected --{option} to be NAME=PATH but got {text!r}")
    return name, path


def api_key(options: argparse.Namespace) -> str | None:
    """The key that requests have to send, if any.

    Raises:
        UsageError: it is empty, no ASCII text, or its file cannot be read.
    """
    key: str | None = options.api_key or os.environ.get("NANOGPT_TRIPY_API_KEY")
    if options.api_key_file is not None:
        try:
            key = text_file.read_text(options.api_key_file).partition("\n")[0].strip()
        except OSError as error:
            raise UsageError(f"cannot read {options.api_key_file}: {error.strerror}") from None
    if options.api_key == "" or key == "":
        raise UsageError("expected an API key but got an empty one")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError("expected an API key of printable ASCII characters")
    return key


def check_packages() -> None:
    """Proves, before any long work, that the server's packages are there.

    Raises:
        UsageError: one is not.
    """
    try:
        import httptools
        import jinja2
        import msgspec
        import prometheus_client
        import starlette
        import uvicorn
    except ImportError as error:
        raise UsageError(
            f"serving needs the packages of {REQUIREMENTS} ({error}): pip install -r {REQUIREMENTS}"
        ) from None
    del httptools, jinja2, msgspec, prometheus_client, starlette, uvicorn


def run(options: argparse.Namespace) -> None:
    """Carries out the command."""
    check_packages()
    key = api_key(options)
    from serving.http.server import listen, serve

    socket = listen(options.host, options.port)
    with socket:
        service = build_service(options)
        command_line.report(
            f"serving {service.name} on http://{_shown(*socket.getsockname()[:2])} "
            f"({service.engine.pages.count} pages of {service.engine.pages.page_tokens} tokens)"
        )
        serve(service, socket, key, options)


def build_service(options: argparse.Namespace) -> Service:
    """The model, ready to be served."""
    from example import quantized
    from serving.engine import ServingEngine
    from serving.http.bridge import Bridge
    from serving.http.metrics import Metrics
    from serving.http.service import Service
    from serving.opening import open_draft, open_model, open_speculation
    from tokenizer import load_tokenizer

    checkpoint = open_checkpoint(options.model_type, options.revision)
    tokenizer = load_tokenizer(checkpoint.tokenizer_source, checkpoint.config.vocab_size)
    template = _template(options, checkpoint)
    draft = open_draft(options.speculate, checkpoint, tokenizer)
    prompts = _prompts(options, checkpoint)
    loras = _loras(options, checkpoint)
    if options.quantization is not None:
        checkpoint = quantized(checkpoint, options.quantization)
    adapters, room = _adapters(options, checkpoint, loras, prompts)
    if options.threads is not None:
        os.environ["NVTRIPY_PORTABLE_THREADS"] = str(options.threads)  # which the runtime reads when it is first used
    engines = engine_cache.chosen(options, lambda message: command_line.report(f"serve.py: {message}"))
    cache_bytes = None if options.cache_memory is None else options.cache_memory << 20
    try:
        opened = open_model(
            checkpoint, options.dtype, options.max_num_seqs, cache_bytes, engines, command_line.report, room
        )
        speculation = open_speculation(options.speculate, draft, options.dtype, engines, command_line.report)
    except EngineError as error:
        raise UsageError(str(error)) from None
    if prompts.prompts:
        opened.decoder.set_prompts(prompts.rows)
    if engines is not None:
        engines.save_pending(wait=False)
    bridge = Bridge()
    engine = ServingEngine(
        opened.decoder,
        tokenizer,
        frozenset(checkpoint.config.eos_token_ids),
        bridge.deliver,
        max_sequences=options.max_num_seqs,
        max_tokens=options.max_step_tokens,
        max_queue=options.max_queue,
        sharing=opened.can_share and not options.no_prefix_cache,
        branching=opened.can_share,
        speculation=speculation,
    )
    name = options.served_model_name or _name(options)
    service = Service(engine, tokenizer, bridge, Metrics(engine), name, template, adapters)
    bridge.observe = service.metrics.observe
    return service


def _prompts(options: argparse.Namespace, checkpoint: Checkpoint) -> PromptTable:
    """The tasks' prompts, by the names that requests call them.

    Raises:
        AdapterError: one cannot be used.
    """
    from adapters.prompts import Prompt, PromptTable, find_prompts

    found = []
    for name, path in options.prompt_tables:
        prompts = find_prompts(path, checkpoint)
        for number, each in enumerate(prompts):
            task = str(number) if each.name is None else each.name
            found.append(Prompt(name if len(prompts) == 1 else f"{name}:{task}", each.rows))
    return PromptTable(found, checkpoint.config.vocab_size)


def _loras(options: argparse.Namespace, checkpoint: Checkpoint) -> list[tuple[str, Lora]]:
    """The adapters that there are from the start, by name.

    Raises:
        AdapterError: one cannot be used.
    """
    from adapters.lora import find_lora

    return [(name, find_lora(folder, checkpoint)) for name, folder in options.lora_modules]


def _adapters(
    options: argparse.Namespace, checkpoint: Checkpoint, loras: list[tuple[str, Lora]], prompts: PromptTable
) -> tuple[AdapterNames | None, AdapterRoom | None]:
    """What requests may have beside the model, and the room for it and for adapters that may come.

    Raises:
        AdapterError: an adapter has no room, or cannot be used on this checkpoint.
    """
    from adapters.folding import folded_scales
    from adapters.places import Described, ranks_for
    from engine import AdapterRoom, room_of
    from serving.http.adapters import AdapterNames

    if not options.lora_modules and options.lora_dir is None and not prompts.prompts:
        return None, None
    base = Described(checkpoint.path, checkpoint.config, checkpoint.layout)
    room = room_of([lora for _, lora in loras]) or AdapterRoom()
    count, ranks = min(len(loras), options.max_loras), room.ranks
    if options.lora_dir is None and not loras:
        count = 0
    elif options.max_lora_rank is not None:
        count, ranks = options.max_loras, ranks_for(base, options.max_lora_rank)
    elif options.lora_dir is not None:
        usual = ranks_for(base, USUAL_RANK)
        count, ranks = options.max_loras, tuple(map(max, usual, ranks))
    folded = folded_scales(checkpoint) if count else {}
    ids = {each.name or "": prompts.ids(number) for number, each in enumerate(prompts.prompts)}
    names = AdapterNames(base, ranks, options.max_cpu_loras, options.lora_dir, ids, folded)
    for name, lora in loras:
        names.add(name, lora)
    return names, AdapterRoom(count, ranks, len(prompts.rows))


def _name(options: argparse.Namespace) -> str:
    name = str(options.model_type)
    return Path(name).name if Path(name).exists() else name


def _template(options: argparse.Namespace, checkpoint: Checkpoint) -> Any:
    """The chat template that was given, or the checkpoint's own.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    from jinja2 import TemplateError

    from serving.http.chat import ChatTemplate
    from serving.opening import chat_template_of

    source, tokens = chat_template_of(checkpoint)
    if options.chat_template is not None:
        try:
            source = text_file.read_text(options.chat_template)
        except OSError as error:
            raise UsageError(f"cannot read {options.chat_template}: {error.strerror}") from None
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokens)
    except TemplateError as error:
        where = options.chat_template or checkpoint.path
        raise UsageError(f"the chat template of {where} is none: {error}") from None


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main() -> int:
    """Exit code 0, or 2 after one line on standard error for input that cannot be used."""
    return command_line.main(
        "serve.py", lambda: run(parse_arguments()), CheckpointError, QuantizationError, prints=False
    )


if __name__ == "__main__":
    sys.exit(main())
