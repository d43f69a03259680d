"""Which prefetch policy weights stream with: said by the environment, known of the processor, or measured and kept."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fused_graphs import Shape, empty_cache, model_graph

from nvtripy_portable import __version__
from nvtripy_portable.cpu import tuning
from nvtripy_portable.cpu.executor import Executor
from nvtripy_portable.cpu.tuning import CANDIDATES, DEFAULT, Processor
from nvtripy_portable.interpreter import ExecutionError

native = pytest.importorskip("nvtripy_portable._native", reason="the native executor is not built")

UNKNOWN = Processor("Nobody", 1, 2, "Processor of a test")
MUCH = [np.broadcast_to(np.zeros(1, np.uint8), (tuning.WORTH_MEASURING,))]  # of weights, none of them there


class Native:
    """A compiled module on another processor, which counts how often it has to measure."""

    def __init__(self, processor: Processor = UNKNOWN, threads: int = 2, fastest: str = "nta:4096") -> None:
        self.facts = (processor.vendor, processor.family, processor.model, processor.name)
        self.count = threads
        self.fastest = fastest
        self.measured = 0

    def processor(self) -> tuple[str, int, int, str]:
        return self.facts

    def threads(self) -> int:
        return self.count

    def kernels_for(self, isa: str) -> str:
        return isa or "best"

    def time_streaming(self, isa: str, policies: list[str], rounds: int, arrays: list[Any]) -> list[list[float]]:
        self.measured += 1
        return [[1.0 if each == self.fastest else 2.0] * rounds for each in policies]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A cache folder of the test's own, nothing measured, and the policy afterwards as before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_measured", {})
    before, threads = native.streaming(), native.threads()
    yield
    native.set_streaming(before)
    native.set_threads(threads)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("t0", "t0:16384"),
        ("t1:64", "t1:64"),
        ("nta:4096", "nta:4096"),
        ("t0:1048576", "t0:1048576"),
        ("none", "none"),
    ],
)
def test_policies(written: str, meant: str) -> None:
    native.set_streaming(written)
    assert native.streaming() == meant


@pytest.mark.parametrize(
    "wrong",
    ["t2", "T0", "t0:", "t0:63", "t0:1048577", "t0:-64", "t0:64 ", "t0:+64", "none:64", ":64", "t0:" + "9" * 40],
)
def test_what_is_no_policy(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, wrong)
    with pytest.raises(ExecutionError) as error:
        Executor.of(model_graph(Shape(), cache_dtype=None))
    message = str(error.value)
    assert message.startswith(f"expected {tuning.VARIABLE} to be t0, t1 or nta, with 64 to 1048576 bytes ahead")
    assert message.endswith(f"but got '{wrong}'") and "\n" not in message


def test_the_environment_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "nta:8192")
    assert Executor.of(model_graph(Shape(), cache_dtype=None)) is not None
    assert native.streaming() == "nta:8192"
    monkeypatch.setenv(tuning.VARIABLE, "")  # as if it were not set
    monkeypatch.setattr(tuning, "KNOWN", ())
    assert Executor.of(model_graph(Shape(), cache_dtype=None)) is not None
    assert native.streaming() == DEFAULT


@pytest.mark.parametrize(
    ("vendor", "family", "model", "policy"),
    [
        ("AuthenticAMD", 26, 0x02, "nta:16384"),  # Turin, Zen 5
        ("AuthenticAMD", 26, 0x44, "nta:16384"),  # Granite Ridge, Zen 5
        ("AuthenticAMD", 26, 0x50, None),  # Zen 6
        ("AuthenticAMD", 25, 0x01, "t0:16384"),  # Milan, Zen 3
        ("AuthenticAMD", 25, 0x11, None),  # Genoa, Zen 4
        ("GenuineIntel", 6, 0x8F, "t0:16384"),  # Sapphire Rapids
        ("GenuineIntel", 6, 0xCF, "t1:16384"),  # Emerald Rapids
        ("AuthenticAMD", 6, 0x8F, None),
        ("", 0, 0, None),  # ARM
    ],
)
def test_what_is_known_is_not_measured(vendor: str, family: int, model: int, policy: str | None) -> None:
    module = Native(Processor(vendor, family, model, "name"))
    assert tuning.known(tuning.this_processor(module)) == policy
    assert tuning.choose(module, "", MUCH) == (policy or "nta:4096")
    assert module.measured == (policy is None) and tuning.kept_file().exists() == (policy is None)


def test_this_processor_has_a_name() -> None:
    processor = tuning.this_processor(native)
    assert processor.name.strip() == processor.name != ""
    if sys.platform == "linux" and processor.vendor:
        lines = Path("/proc/cpuinfo").read_text().replace("\t", "").splitlines()
        assert f"vendor_id: {processor.vendor}" in lines
        assert f"cpu family: {processor.family}" in lines and f"model: {processor.model}" in lines


def test_measured_once_and_kept() -> None:
    module = Native()
    assert [tuning.choose(module, "", MUCH) for _ in range(3)] == ["nta:4096"] * 3 and module.measured == 1
    kept = json.loads(tuning.kept_file().read_text())
    key = "Processor of a test (Nobody 1/2), best, 2 threads"
    assert kept == {"version": __version__, "policies": {key: "nta:4096"}}
    assert [path.name for path in tuning.kept_file().parent.iterdir()] == ["streaming.json"]  # nothing left beside it


def test_the_next_process_reads_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.choose(Native(), "", MUCH)
    monkeypatch.setattr(tuning, "_measured", {})
    later = Native(fastest="t1:16384")
    assert tuning.choose(later, "", []) == "nta:4096" and later.measured == 0  # whatever the size of its model
    for other in (
        Native(threads=3, fastest="none"),
        Native(Processor("Nobody", 1, 3, UNKNOWN.name), fastest="none"),
        Native(Processor("Nobody", 1, 2, "another"), fastest="none"),
    ):
        monkeypatch.setattr(tuning, "_measured", {})
        assert tuning.choose(other, "", MUCH) == "none" and other.measured == 1
    monkeypatch.setattr(tuning, "_measured", {})
    assert tuning.choose(later, "avx2", MUCH) == "t1:16384"
    assert len(json.loads(tuning.kept_file().read_text())["policies"]) == 5


def test_a_small_model_is_not_worth_measuring() -> None:
    module = Native()
    assert tuning.choose(module, "", [np.zeros(1000, np.uint8)]) == DEFAULT
    assert module.measured == 0 and not tuning.kept_file().exists()
    assert tuning.choose(module, "", MUCH) == "nta:4096"  # the next one may be


KEY = "Processor of a test (Nobody 1/2), best, 2 threads"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"[]",
        b"null",
        b"{}",
        json.dumps({"version": __version__}).encode(),
        json.dumps({"version": __version__, "policies": []}).encode(),
        json.dumps({"version": __version__, "policies": {KEY: 5}}).encode(),
        json.dumps({"version": __version__, "policies": {KEY: ["none"]}}).encode(),
        json.dumps({"version": __version__, "policies": {KEY: "t9"}}).encode(),
        json.dumps({"version": "0.0.0", "policies": {KEY: "none"}}).encode(),
    ],
)
def test_a_file_that_cannot_be_used_is_replaced(content: bytes) -> None:
    tuning.kept_file().parent.mkdir(parents=True)
    tuning.kept_file().write_bytes(content)
    module = Native()
    assert tuning.choose(module, "", MUCH) == "nta:4096" and module.measured == 1
    assert json.loads(tuning.kept_file().read_text()) == {"version": __version__, "policies": {KEY: "nta:4096"}}


def test_the_file_does_not_grow_without_end() -> None:
    for threads in range(1, 101):
        tuning.keep(f"{threads} threads", "none")
    policies = json.loads(tuning.kept_file().read_text())["policies"]
    assert list(policies) == [f"{threads} threads" for threads in range(37, 101)]


@pytest.mark.parametrize("obstacle", ["a file where the folder should be", "a folder where the file should be"])
def test_what_cannot_be_kept_is_measured_again(obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tuning.kept_file().parent
    if obstacle.startswith("a file"):
        folder.parent.mkdir()
        folder.write_text("")
    else:
        (tuning.kept_file() / "within").mkdir(parents=True)
    module = Native()
    for _ in range(2):
        monkeypatch.setattr(tuning, "_measured", {})
        assert tuning.choose(module, "", MUCH) == "nta:4096"
    assert module.measured == 2
    assert folder.is_file() or os.listdir(folder) == ["streaming.json"]


def test_without_a_cache_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.kept_file() == tmp_path / ".cache" / "nanogpt-tripy" / "streaming.json"


def test_the_default_unless_another_is_clearly_faster() -> None:
    def times(*others: list[float]) -> list[list[float]]:
        return [[1.0] * 3, *others, *[[2.0] * 3] * (len(CANDIDATES) - 1 - len(others))]

    assert tuning.fastest(times([1.0] * 3, [1.0] * 3)) == DEFAULT
    assert tuning.fastest(times([0.97] * 3)) == DEFAULT
    assert tuning.fastest(times([0.9] * 3, [0.8] * 3)) == CANDIDATES[2]
    assert tuning.fastest(times([0.9, 1.2, 1.2])) == DEFAULT  # once, by chance
    assert (
        tuning.fastest([[2.0, 1.0, 2.0], *[[1.0] * 3] * (len(CANDIDATES) - 1)]) == DEFAULT
    )  # the default was disturbed


def test_measuring_reads_the_weights_and_leaves_the_policy() -> None:
    random = np.random.default_rng(0)
    weights = [random.integers(0, 256, count).astype(np.uint8) for count in (1, 70_000, 300_000)]
    native.set_streaming("t1:128")
    for isa in native.available_isas():
        for threads in (1, 3):
            native.set_threads(threads)
            seconds = native.time_streaming(isa, list(CANDIDATES), 3, weights)
            assert np.shape(seconds) == (len(CANDIDATES), 3) and np.min(seconds) > 0
    assert native.streaming() == "t1:128"
    with pytest.raises(ValueError, match="expected at least 65536 bytes in one piece"):
        native.time_streaming("", list(CANDIDATES), 1, weights[:1])


def test_a_model_on_an_unknown_processor_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with real weights: lowering measures, sets and keeps."""
    monkeypatch.setattr(tuning, "KNOWN", ())
    monkeypatch.setattr(tuning, "WORTH_MEASURING", 100_000)
    monkeypatch.setattr(tuning, "fastest", lambda seconds: f"t1:{4096 * len(seconds)}")
    monkeypatch.setattr(tuning, "CANDIDATES", ("t0", "t1:8192"))
    assert Executor.of(model_graph(Shape(vocabulary=4096), cache_dtype=None)) is not None
    assert native.streaming() == "t1:8192"
    assert list(json.loads(tuning.kept_file().read_text())["policies"].values()) == ["t1:8192"]


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize(
    ("weight_dtype", "scales"),
    [("f32", "none"), ("f16", "none"), ("i8", "rows"), ("i4", "128"), ("f8e4m3fn", "scalar")],
)
def test_the_same_bits_under_every_policy(
    isa: str, weight_dtype: str, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token and a prompt; and on so many threads that the weights are cut into smaller units."""
    monkeypatch.setenv("NVTRIPY_PORTABLE_ISA", isa)
    shape = Shape(layers=1, heads=2, head_size=64, context=32, vocabulary=20_000)
    graph = model_graph(shape, cache_dtype="f16", dtype="f16", weight_dtype=weight_dtype, scales=scales)
    executor = Executor.of(graph)
    assert executor is not None
    ids = np.random.default_rng(1).integers(0, shape.vocabulary, (1, 9)).astype(np.int32)
    results = set()
    for threads in (1, 12):
        native.set_threads(threads)
        for policy in (*CANDIDATES, "nta:64", "t0:1048576"):
            native.set_streaming(policy)
            cache: Any = empty_cache(shape, "f16")
            bits = b""
            for part, position in ((ids[:, :8], 0), (ids[:, 8:], 8)):
                last = np.array([part.shape[1] - 1], np.int32)
                logits, cache = executor.run([part, np.array([position], np.int32), cache, last])
                bits += np.asarray(logits).tobytes()
            results.add(bits)
    assert len(results) == 1
