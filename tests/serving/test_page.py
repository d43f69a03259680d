"""The page that serve.py shows, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Server
from tiny_checkpoints import random_checkpoint, reciting_checkpoint, script_of

SCRIPT = "Whether 'tis nobler — said he — in the mind to suffer"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Server]:
    folder = reciting_checkpoint(tmp_path_factory.mktemp("page") / "reciting", script_of(SCRIPT))
    server = Server(folder, "--api-key=secret")
    yield server
    assert server.close() == 0


def opened(browser: Any, url: str, **how: Any) -> tuple[Any, list[str]]:
    """The page, and whatever it asks of another machine and every mistake of its script."""
    page = browser.new_context(**how).new_page()
    wrong: list[str] = []
    page.on(
        "request", lambda request: wrong.append(request.url) if not request.url.startswith((url, "data:")) else None
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    return page, wrong


def wait_for(page: Any, condition: Callable[[], bool]) -> None:
    """The page's policy forbids what Playwright's own waiting does in it, evaluating a string."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it does not happen")


def ask(page: Any, **fields: str) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#go")
    wait_for(page, lambda: page.is_enabled("#go"))


def test_an_answer_and_what_the_server_does(browser: Any, server: Server) -> None:
    """With a key: without it, an error, and no numbers; with it, both. Then the answer, piece by piece."""
    page, wrong = opened(browser, server.url)
    ask(page, prompt=SCRIPT[:7], temperature="0")
    assert "expected the API key" in page.inner_text("#error") and page.inner_text("#model") == ""
    wait_for(page, lambda: page.get_attribute("#key", "placeholder") == "needed")
    ask(page, key="secret", max_tokens="58")
    assert page.inner_text("#error") == ""
    assert page.text_content("#answer") == SCRIPT
    count = len(SCRIPT.encode()) - 7 + 1
    assert page.inner_text("#status").startswith(f"{count} tokens in ") and "ended by itself" in page.inner_text(
        "#status"
    )
    ask(page, max_tokens="3")
    assert page.text_content("#answer") == SCRIPT[:10] and "as many as were asked for" in page.inner_text("#status")
    wait_for(page, lambda: page.inner_text("#rate").isdigit())
    assert page.inner_text("#model") == "reciting"
    assert page.inner_text("#running") == page.inner_text("#waiting") == "0"
    assert page.inner_text("#pages").startswith("0 of ")
    ask(page, max_tokens="1000")
    assert "max_tokens is 1000" in page.inner_text("#error")
    assert wrong == []


def test_ctrl_enter_asks(browser: Any, server: Server) -> None:
    page, wrong = opened(browser, server.url)
    page.fill("#key", "secret")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "58")
    page.fill("#prompt", SCRIPT[:7])
    page.press("#prompt", "Control+Enter")
    wait_for(page, lambda: page.inner_text("#status") != "")
    assert page.text_content("#answer") == SCRIPT and wrong == []


def test_stop_cancels(browser: Any, tmp_path: Path) -> None:
    """While an answer waits behind many others: it is no longer there then; and a server that has gone is an error."""
    server = Server(random_checkpoint(tmp_path / "tiny"), "--max-num-seqs=1")
    page, wrong = opened(browser, server.url, color_scheme="dark", viewport={"width": 360, "height": 800})
    page.fill("#max_tokens", "5")
    page.fill("#prompt", "b")
    body = {"prompt": ["a", "c"], "n": 125, "max_tokens": 63, "stream": True, "ignore_eos": True, "priority": -1}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # whose end would close the connection
        next(lines)
        page.click("#go")
        wait_for(page, lambda: page.is_enabled("#stop"))
        page.click("#stop")
        wait_for(page, lambda: page.is_enabled("#go"))
        assert page.inner_text("#status") == "stopped" and page.inner_text("#error") == ""
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, "nothing is cut off in a narrow window"
    wait_for(page, lambda: page.inner_text("#running") == "0")
    assert page.inner_text("#waiting") == "0"
    assert server.close() == 0 and wrong == []
    page.click("#go")
    wait_for(page, lambda: page.inner_text("#error") == "the server does not answer")
