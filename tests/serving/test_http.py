"""serve.py as its clients see it: a process of its own, asked by the openai package and by plain HTTP."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Server
from tiny_checkpoints import CONTEXT, VOCABULARY, random_checkpoint

openai = pytest.importorskip("openai", reason="openai is not installed (requirements/test.txt)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    server = Server(folder, f"--chat-template={template}", "--max-queue=40", "--speculate=prompt-lookup")
    yield server
    assert server.close() == 0, "".join(server.lines)
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))


def test_openai_client(client: Any) -> None:
    """Whole, and as a stream: the same text."""
    asked = {"model": "tiny", "prompt": "What", "max_tokens": 20, "seed": 3, "temperature": 0.8, "logprobs": 2}
    whole = client.completions.create(**asked)
    again = client.completions.create(**asked)
    assert whole.choices[0].text == again.choices[0].text
    assert whole.usage.completion_tokens == 20 and whole.usage.prompt_tokens == 4
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    told = [value for chunk in chunks for c in chunk.choices for value in c.logprobs.token_logprobs]
    assert told == whole.choices[0].logprobs.token_logprobs
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_chat(client: Any) -> None:
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "seed": 1,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant" and len(whole.choices[0].logprobs.content) == 8
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    plain = client.completions.create(model="tiny", prompt="user:Hi\na:", max_tokens=8, seed=1)
    assert plain.choices[0].text == whole.choices[0].message.content


def test_many_at_once_get_what_each_gets_alone(server: Server) -> None:
    bodies = [
        {"prompt": f"{number % 5} and more of it", "max_tokens": 5 + number % 17, "seed": number, "n": 1 + number % 2}
        for number in range(24)
    ]

    def ask(body: dict[str, Any]) -> Any:
        answer = server.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text
        return [(c["text"], c["finish_reason"]) for c in answer.json()["choices"]]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, bodies)) == alone
    assert server.metric("kv_cache_pages_used") == 0


def test_beams(client: Any, server: Server) -> None:
    """The best of them, in falling order, whatever n is; each with its tokens' log-probabilities."""
    asked = {"prompt": "What", "max_tokens": 9, "logprobs": 1, "use_beam_search": True, "temperature": 0}
    three = server.post("/v1/completions", **asked, n=3, length_penalty=0.0, early_stopping="never").json()
    worth = [sum(choice["logprobs"]["token_logprobs"]) for choice in three["choices"]]
    assert worth == sorted(worth, reverse=True) and [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert all(len(choice["logprobs"]["tokens"]) == 9 for choice in three["choices"])
    assert three["usage"]["completion_tokens"] == 27
    two = server.post("/v1/completions", **asked, n=2, best_of=3, length_penalty=0.0, early_stopping="never").json()
    assert two["choices"] == three["choices"][:2]
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=5,
        n=2,
        extra_body={"use_beam_search": True, "length_penalty": 2.0},
    )
    plain = server.post(
        "/v1/completions", prompt="user:Hi\na:", max_tokens=5, n=2, use_beam_search=True, length_penalty=2.0
    ).json()
    assert [each.message.content for each in chat.choices] == [each["text"] for each in plain["choices"]]
    fields = server.http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"use_beam_search", "length_penalty", "early_stopping"} <= set(fields)
    assert server.metric("kv_cache_pages_used") == 0


def test_scores_of_a_prompt(server: Server) -> None:
    """As lm-eval asks for them: echo, logprobs, no or one token."""
    for most in (0, 1):
        choice = server.post(
            "/v1/completions", prompt=[72, 101, 108], echo=True, logprobs=1, max_tokens=most, temperature=0
        ).json()["choices"][0]
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == 3 + most and logprobs["tokens"][:3] == ["H", "e", "l"]
        assert logprobs["token_logprobs"][0] is None and all(v <= 0 for v in logprobs["token_logprobs"][1:])
        assert logprobs["text_offset"][:3] == [0, 1, 2]
        assert choice["text"].startswith("Hel")


def test_each_answer_echoes_the_prompt_and_its_scores(server: Server) -> None:
    asked = {"prompt": [72, 101, 108], "echo": True, "logprobs": 1, "max_tokens": 2, "n": 3, "seed": 1}
    answer = server.post("/v1/completions", **asked)
    assert answer.status_code == 200, answer.text
    first, *others = answer.json()["choices"]
    for other in others:
        assert other["logprobs"]["token_logprobs"][:3] == first["logprobs"]["token_logprobs"][:3]
        assert other["text"].startswith("Hel") and len(other["logprobs"]["tokens"]) == 5


REFUSED: dict[str, tuple[dict[str, Any], str | None]] = {
    "unknown field": ({"prompt": "a", "beams": 3}, "beams"),
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "wrong type": ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
    "too long": ({"prompt": "a" * (CONTEXT + 1)}, "prompt"),
    "too many": ({"prompt": "a", "max_tokens": CONTEXT + 1}, "max_tokens"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature"),
    "bias of nothing": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    "bias beyond": ({"prompt": "a", "logit_bias": {str(VOCABULARY): 1}}, "logit_bias"),
    "bias of no number": ({"prompt": "a", "logit_bias": {"1_0": 1}}, "logit_bias"),
    "nothing allowed": ({"prompt": "a", "allowed_token_ids": [256], "min_tokens": 1}, "allowed_token_ids"),
    "penalty beyond": ({"prompt": "a", "repetition_penalty": 1e-30}, "repetition_penalty"),
    "ids beyond": ({"prompt": [VOCABULARY]}, "prompt"),
    "mixed": ({"prompt": ["a", 3]}, "prompt"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix"),
    "best of few": ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
    "beams of a stream": ({"prompt": "a", "use_beam_search": True, "n": 2, "stream": True}, "stream"),
    "beams that are drawn": ({"prompt": "a", "use_beam_search": True, "n": 2, "temperature": 0.5}, "temperature"),
    "too many beams": ({"prompt": "a", "use_beam_search": True, "n": 65}, "num_beams"),
    "early stopping of nothing": ({"prompt": "a", "early_stopping": True}, "early_stopping"),
    "early stopping, now and then": ({"prompt": "a", "use_beam_search": True, "early_stopping": "x"}, "early_stopping"),
    "best of a stream": ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    "stream options": ({"prompt": "a", "stream_options": {}}, "stream_options"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(server: Server, body: dict[str, Any], param: str | None) -> None:
    answer = server.post("/v1/completions", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]


def test_not_there(server: Server) -> None:
    assert server.post("/v1/completions", model="gpt-5", prompt="a").status_code == 404
    assert server.http.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert server.http.post("/v1/completions", content=b"{").status_code == 400
    assert server.http.post("/v1/completions", content=b"x" * (5 << 20)).status_code == 413
    assert server.http.get("/v1/completions").status_code == 405


def test_small_endpoints(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    ids = server.post("/tokenize", prompt="Hé").json()
    assert ids["tokens"] == [*"Hé".encode()] and ids["count"] == 3
    assert server.post("/detokenize", tokens=ids["tokens"]).json() == {"prompt": "Hé"}
    info = server.http.get("/tokenizer_info").json()
    assert info["vocab_size"] == VOCABULARY and info["chat_template"].startswith("{% for m in messages %}")
    assert set(server.http.get("/openapi.json").json()["paths"]) >= {"/v1/completions", "/health"}
    assert "NanoGPT" in server.http.get("/").text
    assert server.http.get("/version").json()["version"]


def test_a_client_that_leaves_is_cancelled(server: Server) -> None:
    before = server.metric("generation_tokens_total")
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "n": 30, "max_tokens": 60, "stream": True, "ignore_eos": True}
    ) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        if server.metric("num_requests_running") == 0:
            break
        time.sleep(0.05)
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    assert server.metric("kv_cache_pages_used") == 0
    assert server.metric("generation_tokens_total") - before <= 30 * 60


def test_a_full_queue(server: Server) -> None:
    answer = server.post("/v1/completions", prompt=["a"] * 50)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    for _ in range(100):  # those that had been taken are cancelled, which the engine does before its next step
        if server.metric("num_requests_waiting") == 0:
            break
        time.sleep(0.05)
    assert server.metric("num_requests_waiting") == server.metric("num_requests_running") == 0


def test_a_key(folder: Path) -> None:
    server = Server(folder, "--api-key=secret")
    assert server.post("/v1/completions", prompt="a").status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers).status_code == 200
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/metrics").status_code == 401
    assert server.close() == 0


def test_chat_without_a_template(folder: Path) -> None:
    server = Server(folder)
    answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
    assert answer.status_code == 400 and "--chat-template" in answer.json()["error"]["message"]
    assert server.close() == 0


def test_an_error_is_no_end(tmp_path: Path) -> None:
    """Logits that are not finite: an error event, no [DONE]; and the next request is served."""
    from tiny_checkpoints import overflowing_checkpoint

    server = Server(overflowing_checkpoint(tmp_path / "overflows"))
    answer = server.post("/v1/completions", prompt="a", stream=True)
    assert "not finite" in answer.text and "[DONE]" not in answer.text
    assert server.post("/v1/completions", prompt="a").status_code == 500
    assert server.http.get("/health").status_code == 200
    assert server.close() == 0


def test_sigterm_finishes_what_runs(folder: Path) -> None:
    server = Server(folder)
    answers: list[Any] = []
    body = {"prompt": "a", "max_tokens": 60, "n": 20, "ignore_eos": True}
    asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", **body)))
    asking.start()
    while server.metric("num_requests_running") == 0 and not answers:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    asking.join(30)
    assert answers[0].status_code == 200 and len(answers[0].json()["choices"]) == 20
    assert server.process.wait(30) == 0


def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import serve

    for options, message in (
        (["--port=99999"], "--port to be at most 65535"),
        (["--host=nowhere.invalid"], "cannot listen on --host nowhere.invalid"),
        (["--api-key="], "expected an API key but got an empty one"),
        ([f"--model-type={folder}", "--cache-memory=1", "--port=0", "--chat-template=/none"], "cannot read /none"),
        ([f"--model-type={folder}", "--speculate=./none", "--port=0", "--no-engine-cache"], "./none"),
        ([f"--model-type={folder}", "--speculate=checkpoints/shakespeare", "--port=0"], "257 tokens, but"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve.py", *options])
        assert serve.main() == 2
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[-1] and errors[-1].startswith("serve.py: error:")
