"""demo.py as its user meets it: started, refused, and in a real browser (where there is one) used."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from interrupting import interrupt
from tiny_checkpoints import random_checkpoint, reciting_checkpoint, script_of

import demo
from command_line import UsageError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "Whether 'tis nobler in the mind to suffer the slings"
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings."

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed: requirements/demo.txt")

#: demo.py, where a step of a model takes some time: tiny ones would have answered before anybody could press a button.
SLOWED = """
import sys, time
import engine
step = engine.Engine.step
def slowed(*arguments):
    time.sleep(0.04)
    return step(*arguments)
engine.Engine.step = slowed
import demo
sys.exit(demo.main())
"""


# --- ways to run it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, a text, and a cache of their own."""
    folder = tmp_path_factory.mktemp("demo")
    reciting_checkpoint(folder / "reciting", script_of(SCRIPT))
    random_checkpoint(folder / "random")
    (folder / "text.txt").write_text(TEXT)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]

    def end(self) -> tuple[int, str]:
        """Presses Ctrl-C; returns the exit code and what was told on standard error after the page's address."""
        interrupt(self.process)
        out, err = self.process.communicate(timeout=60)
        assert out == "", "standard output stays clean"
        return self.process.returncode, err


@contextmanager
def serving(folder: Path, *arguments: object) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-c", SLOWED, f"--port={port}", f"--data={folder / 'text.txt'}", *map(str, arguments)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stderr is not None
        told = ""
        try:
            for line in process.stderr:
                told += line
                if "the page is at" in line:
                    break
            url = f"http://127.0.0.1:{port}"
            assert f"the page is at {url} (Ctrl-C ends it)" in told, told
            yield Server(url, process)
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    variants = (f"{folder / 'reciting'}+float32", f"{folder / 'random'}+float32")
    with serving(folder, f"--model-type={folder / 'random'}", "--variants", *variants) as server:
        yield server


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Any:
    """demo.py in this process, with input that it refuses: the one line that it says then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["demo.py", f"--model-type={folder / 'random'}", *map(str, arguments)])
        assert demo.main() == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("demo.py: error: ")
        return captured.err

    return call


# --- without a browser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variants", "int9"], "unknown variant 'int9': expected a folder, or words of float32, float16"),
        (["--variants", "float16", "fp8", "float16"], "expected each variant once but got 'float16' 2 times"),
        (["--variants"], "expected at least one argument"),
        (["--port=0"], "expected --port to be at least 1 but got 0"),
        (["--port=65536"], "expected --port to be at most 65535 but got 65536"),
        (["--port=http"], "invalid int value: 'http'"),
        (["--max-tokens=1"], "expected --max-tokens to be at least 2, or 0 for all, but got 1"),
        (["--theme=dark"], "unrecognized arguments: --theme=dark"),
    ],
)
def test_bad_options(run: Any, arguments: list[str], expected: str) -> None:
    assert expected in run(*arguments)


@needs_gradio
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variants", "./nowhere"], "expected a checkpoint folder or file at 'nowhere'"),
        (["--host=192.0.2.1"], "cannot serve at 192.0.2.1:"),
        ([f"--host={'a' * 300}"], "no such name (--port and --host choose another)"),
        (["--host=nobody.invalid"], "cannot serve at nobody.invalid:"),
        (["--data=nowhere.txt"], "cannot read nowhere.txt: No such file"),
    ],
)
def test_bad_input(run: Any, arguments: list[str], expected: str) -> None:
    assert expected in run(f"--port={free_port()}", *arguments)


@needs_gradio
def test_a_port_that_is_taken(run: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot serve at 127.0.0.1:{port}: Address already in use (--port and --host" in run(f"--port={port}")


@needs_gradio
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "no proxy at all", "socks9://x:y"])
def test_a_proxy_is_not_asked_for_the_own_page(
    proxy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gradio

    from web import page

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")

    class Ended:
        def wait(self) -> None:
            raise KeyboardInterrupt

    with gradio.Blocks(analytics_enabled=False) as blocks:
        gradio.HTML("page")
    port = free_port()
    with monkeypatch.context() as patch:
        patch.setattr(page, "threading", SimpleNamespace(Event=Ended))
        page.serve(blocks, "127.0.0.1", port)
    assert f"the page is at http://127.0.0.1:{port}" in capsys.readouterr().err
    assert os.environ["NO_PROXY"] == "example.org" and "no_proxy" not in os.environ, "downloads still have theirs"


@needs_gradio
def test_whatever_gradio_raises_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio

    from web import page

    def launch(*arguments: object, **options: object) -> None:
        raise RuntimeError("it is\nnot there")

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    with pytest.raises(UsageError, match=r"cannot serve at 127\.0\.0\.1:1: it is$"):
        page.serve(gradio.Blocks(), "127.0.0.1", 1)


def test_without_gradio(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "the page needs gradio" in (told := run()) and "pip install -r requirements/demo.txt" in told


@needs_gradio
def test_it_serves_a_page_that_asks_nobody_else_and_ends_by_ctrl_c(folder: Path) -> None:
    with serving(folder, f"--model-type={folder / 'reciting'}", "--variants", "float16", "bfloat16") as server:
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            html = answer.read().decode()
        assert answer.status == 200 and "NanoGPT, side by side" in html
        assert "bfloat16" in html
        assert "fonts.g" not in html and "googletagmanager" not in html
        loaded = re.findall(r"""(?:src|href)=["'](?:https?:)?//([^"'/]+)""", html)
        assert not loaded, "a page that loads from elsewhere is none without a network"
        code, err = server.end()
    assert code == 0 and err.splitlines()[-1] == "ended" and "Traceback" not in err


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, loaded; whatever it asks of another machine, and every mistake of its scripts, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    foreign, mistakes = [], []
    page.on("request", lambda request: foreign.append(request.url) if "://127.0.0.1:" not in request.url else None)
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector(".card")
    page.wait_for_function("document.querySelector('#go')?.disabled === false")
    yield page
    context.close()
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == [] and mistakes == []


def texts(page: Any, kind: str) -> list[str]:
    return [found.inner_text() for found in page.query_selector_all(f".card .{kind}")]


def fill(page: Any, name: str, value: str) -> None:
    page.fill(f"#{name} textarea, #{name} input[type=number]", value)
    page.keyboard.press("Tab")


def wait_until_done(page: Any) -> None:
    page.wait_for_function(
        "document.querySelectorAll('.card.done').length == 2 && document.querySelector('#go')?.disabled === false",
        timeout=60_000,
    )


def printable(text: str) -> str:
    """What a browser shows: random models also say control characters, which it drops."""
    return "".join(character for character in text if character.isprintable() and not character.isspace())


#: Notes every text that the first card shows.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const text = document.querySelector('.card .text')?.textContent;
        if (text && text != window.seen.at(-1)) window.seen.push(text);
    }).observe(document.querySelector('#cards'), {childList: true, subtree: true, characterData: true});
}"""


@needs_gradio
def test_answers_stream_under_their_numbers(page: Any, folder: Path) -> None:
    assert texts(page, "status") == ["ready", "ready"] and texts(page, "speed") == ["\N{EN DASH}"] * 2
    assert all(re.fullmatch(r"0\.\d\d MB", memory) for memory in texts(page, "memory"))
    assert all(float(number.replace(",", "")) > 1 for number in texts(page, "perplexity"))
    fill(page, "prompt", SCRIPT[:7])
    fill(page, "seed", "3")
    page.evaluate(WATCH)
    page.click("#go")
    wait_until_done(page)
    seen = page.evaluate("window.seen")
    growing = [text for text in seen if text.startswith(SCRIPT[:7])]
    assert len(growing) > 4, f"it came at once: {seen}"
    assert all(after.startswith(before) for before, after in itertools.pairwise(growing))
    reciting, other = texts(page, "text")
    assert reciting == SCRIPT
    command = [sys.executable, "example.py", f"--model-type={folder / 'random'}", "--dtype=float32", "--seed=3"]
    done = subprocess.run([*command, f"--input-text={SCRIPT[:7]}"], cwd=ROOT, capture_output=True, check=True)
    assert printable(other) == printable(done.stdout.decode())
    assert all(0 < float(speed.replace(",", "")) < 26 for speed in texts(page, "speed")), "steps of 0.04 s"
    assert all("done" in status for status in texts(page, "status"))
    assert page.inner_text("#told") == "Seed 3"


@needs_gradio
def test_stop_ends_the_answers(page: Any) -> None:
    assert page.is_disabled("#stop")
    fill(page, "prompt", "To be")
    page.click("#go")
    page.wait_for_selector(".card.running")
    page.wait_for_function("document.querySelector('#stop')?.disabled === false")
    assert page.is_disabled("#go")
    page.click("#stop")
    wait_until_done(page)
    assert all("stopped" in status for status in texts(page, "status"))
    assert all(int(status.split()[0]) < 59 for status in texts(page, "status")), "what fits the context"
    assert page.is_disabled("#stop")
    page.fill("#new-tokens input[type=number]", "2")
    page.keyboard.press("Tab")
    page.click("#go")
    page.wait_for_function("[...document.querySelectorAll('.status')].every(e => e.textContent.startsWith('2 tokens'))")
    wait_until_done(page)
    assert all("done" in status for status in texts(page, "status")), "it can be used again"


@needs_gradio
@pytest.mark.parametrize(
    ("prompt", "seed", "expected"),
    [
        ("", "1", "expected a prompt but got an empty one"),
        ("x" * 100, "1", "expected a prompt of at most 64 tokens, the model's context, but got 100"),
        ("To be", "-1", "expected a seed from 0 to 18446744073709551615 but got -1"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_line(page: Any, prompt: str, seed: str, expected: str) -> None:
    fill(page, "prompt", prompt)
    fill(page, "seed", seed)
    page.click("#go")
    page.wait_for_selector(".line.error")
    assert expected in page.inner_text("[role=alert]")
    assert texts(page, "status") == ["ready", "ready"], "the cards stay"
    assert not page.is_disabled("#go")


@needs_gradio
def test_text_is_no_markup(page: Any) -> None:
    prompt = "<b>x</b><img src=y onerror=alert(1)>"
    fill(page, "prompt", prompt)
    page.click("#go")
    wait_until_done(page)
    assert texts(page, "text")[0].startswith(prompt)
    assert not page.query_selector_all(".card img, .card b")


@needs_gradio
@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (390, 1)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(browser: Any, server: Server, width: int, columns: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector(".card")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [card.bounding_box() for card in page.query_selector_all(".card")]
    assert len({round(box["x"]) for box in boxes}) == columns
    background = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    brightness = sum(int(number) for number in re.findall(r"\d+", background)[:3]) / 3
    assert (brightness < 100) == (scheme == "dark"), background
    context.close()
