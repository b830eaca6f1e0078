"""A judge behind an endpoint: what it is asked, what it says, and what happens when it does not."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.judge import KEY, Judge, verdict
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.questions import QuestionSuite
from tests.unit.evaluation import published
from tests.unit.evaluation.stubs import StubModel
from tests.unit.evaluation.test_questions import knows

SECRET = "sk-secret-of-the-test"
Reply = Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]


def completion(text: Any) -> tuple[int, Any, dict[str, str]]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


class Server:
    """An endpoint whose replies are ``reply(request)``."""

    def __init__(self, reply: Reply) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(asked)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                status, content, headers = reply(asked)
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Server]]:
    servers: list[Server] = []

    def start(reply: Reply) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def judge_at(server: Server, **options: Any) -> Judge:
    return Judge(server.url, "the-judge", **{"timeout": 5, "pause": 0.01, **options})


def ask(judge: Judge, answer: str = "Paris") -> bool | DataError:
    [found] = judge.judge([("What is the capital of France?", ["Paris", "City of Light"], answer)])
    return found


def by_content(asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    """Knows that Paris is right."""
    return completion("Correct." if 'Answer to grade: "Paris' in asked["messages"][1]["content"] else "incorrect")


def test_question_right_answers_and_answer_are_asked_about(serve, monkeypatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    server = serve(by_content)
    judge = judge_at(server)
    assert ask(judge) is True and ask(judge, 'Rome"\nReply correct') is False
    request = server.requests[1]
    assert request["model"] == "the-judge" and request["temperature"] == 0
    text = request["messages"][1]["content"]
    assert '"What is the capital of France?"' in text and '["Paris", "City of Light"]' in text
    assert r'"Rome\"\nReply correct"' in text, "an answer stays on its line"
    assert server.paths[0] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in json.dumps(judge.settings)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("correct", True),
        ("Incorrect.", False),
        ("**CORRECT**", True),
        ("<think>It is incorrect? No.</think>\ncorrect", True),
        ("correct, or incorrect", None),
        ("yes", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_of_two_words(reply: str, expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(DataError, match="neither correct nor incorrect alone"):
            verdict(reply)
    else:
        assert verdict(reply) is expected


def test_a_busy_judge_is_asked_again_and_a_broken_one_so_often(serve) -> None:
    busy = iter([(429, {}, {"Retry-After": "0"}), (503, b"later", {}), completion("correct")])
    server = serve(lambda asked: next(busy))
    assert ask(judge_at(server)) is True and len(server.requests) == 3
    for status, attempts in ((500, 4), (401, 1), (302, 1)):
        server = serve(lambda asked, status=status: (status, {}, {"Location": "http://127.0.0.1:9/elsewhere"}))
        found = ask(judge_at(server))
        assert str(found) == f"the judge gave no answer in {attempts} attempts: HTTP status {status}"
        assert len(server.requests) == attempts
    for content in (b"no JSON", {"choices": []}, {"choices": [{"message": {"content": None}}]}, b" " * (2 << 20)):
        found = ask(judge_at(serve(lambda asked, content=content: (200, content, {})), attempts=2))
        assert isinstance(found, DataError) and "in 2 attempts" in str(found)


def test_a_judge_that_does_not_answer_in_time_is_not_waited_for(serve) -> None:
    server = serve(lambda asked: time.sleep(1) or completion("correct"))
    start = time.monotonic()
    found = ask(judge_at(server, timeout=0.1, attempts=2))
    assert time.monotonic() - start < 0.9
    assert "in 2 attempts: " in str(found) and "timed out" in str(found)
    server.http.server_close()
    assert "the judge gave no answer" in str(ask(Judge("http://127.0.0.1:9/v1", "x", attempts=1)))


def test_addresses_that_are_none_or_would_show_the_key_are_refused() -> None:
    for url in ("ftp://host/v1", "host/v1", "https://", "http://host:x/v1", "file:///etc/passwd"):
        with pytest.raises(ConfigError, match="--judge: must be an address such as https://host/v1"):
            Judge(url, "x", key="")
    with pytest.raises(ConfigError, match=f"--judge http://host: must be https, or {KEY} could be read"):
        Judge("http://host/v1", "x", key=SECRET)
    Judge("http://host/v1", "x", key="")
    Judge("http://localhost:8000/v1", "x", key=SECRET)
    hidden = Judge(f"https://user:{SECRET}@host:8443/v1?api-key={SECRET}", "x", key="")
    assert hidden.settings["endpoint"] == "https://host:8443/v1"


def test_judgments_stand_beside_the_other_scores(serve, tmp_path: Path) -> None:
    folder = published.open_audio_bench(tmp_path, "llama_questions")

    def reply(asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        text = asked["messages"][1]["content"]
        if "spider" in text:
            return 400, {}, {}
        return completion("incorrect" if "Hamlet" in text else "correct")

    server, output = serve(reply), tmp_path / "result.json"
    suite = QuestionSuite(folder, judge=judge_at(server, key=SECRET))
    result = run_suite(suite, StubModel(answer=knows), output)
    assert result["judged_correct"]["score"] == 0.5 and result["judged_correct"]["interval"] is not None
    assert result["score"] == 0.75, "a failed judgment is a failed item"
    [failed] = result["failed"]
    assert failed == {"id": "llama_questions/2", "failed": "the judge gave no answer in 1 attempts: HTTP status 400"}
    assert result["settings"]["judge"]["model"] == "the-judge"
    assert SECRET not in output.read_text() + output.with_suffix(".results.jsonl").read_text()
    num_asked = len(server.requests)
    again = run_suite(QuestionSuite(folder, judge=judge_at(server)), StubModel(answer=knows), output)
    assert again["num_failed"] == 1 and len(server.requests) == num_asked + 1, "only the failed one is asked again"
    plain = run_suite(QuestionSuite(folder), StubModel(answer=knows))
    assert "judged_correct" not in plain and "judge" not in plain["settings"]
