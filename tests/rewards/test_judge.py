"""The judge against a small chat server of the test's own."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from accord.errors import ConfigError
from accord.rewards import REWARDS, Failed
from accord.types import Message, Prompt


class Server:
    """Answers every request with the next of `replies` (the last one for ever) and keeps what was asked."""

    def __init__(self):
        self.replies = [(200, "Rating: 5")]
        self.asked, self.headers = [], []
        self.meeting = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.headers.append(dict(self.headers))
                if outer.meeting is not None:
                    outer.meeting.wait(20)
                status, text = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                body = text if status != 200 or text.startswith("{") else json.dumps(answer(text))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                """Say nothing on the terminal."""

        def answer(text):
            return {"choices": [{"message": {"role": "assistant", "content": text}}]}

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.handle_error = lambda *_: None  # a client that has gone away is part of a test
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.httpd.shutdown()
    made.httpd.server_close()


@pytest.fixture
def ask(server, completion):
    """`ask("answer one", "answer two", **settings)`: what the judge says, failures as reasons."""

    def one(*texts, prompt="What is it?", **settings):
        given = {"name": "judge", "base_url": server.url, "model": "m", "backoff": 0.001, **settings}
        function = REWARDS["judge"].build(REWARDS["judge"].config.build(given), None)
        outcomes = function([Prompt("p", prompt)] * len(texts), [completion(text) for text in texts])
        return [each.reason if isinstance(each, Failed) else each for each in outcomes]

    return one


def test_the_last_rating_of_the_answer_is_the_reward(server, ask):
    server.replies = [(200, "Rating: 2 at first sight.\nBut it is kind.\nRating: 7.5")]
    assert ask("It is blue.") == [7.5]
    (body,) = server.asked
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    assert "What is it?" in body["messages"][0]["content"]
    assert "It is blue." in body["messages"][0]["content"]


def test_the_template_is_filled_once(server, ask):
    """Braces in the texts are text."""
    ask("{prompt} {x}", prompt="{completion}")
    content = server.asked[0]["messages"][0]["content"]
    assert content.count("{prompt} {x}") == 1
    assert content.count("{completion}") == 1


def test_a_conversation_is_shown_with_its_roles(server, ask):
    ask("Blue.", prompt=(Message("system", "Be brief."), Message("user", "A colour?")))
    assert "System: Be brief.\n\nUser: A colour?" in server.asked[0]["messages"][0]["content"]


def test_own_prompt_and_pattern(server, completion):
    server.replies = [(200, '{"choices": [{"message": {"content": "YES 3/4"}}]}')]
    kind = REWARDS["judge"]
    config = kind.config.build(
        {"name": "judge", "base_url": server.url, "model": "m", "prompt": "Good? {completion}", "pattern": r"(\d)/\d"}
    )
    assert kind.build(config, None)([Prompt("p", "q")], [completion("Blue.")]) == [3.0]
    assert server.asked[0]["messages"][0]["content"] == "Good? Blue."


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, ask, status):
    server.replies = [(status, "busy"), (status, "busy"), (200, "Rating: 4")]
    assert ask("Blue.") == [4.0]
    assert len(server.asked) == 3


def test_a_server_that_stays_busy_is_a_failure(server, ask):
    server.replies = [(503, "busy")]
    assert ask("Blue.", retries=2) == ["HTTP 503: busy"]
    assert len(server.asked) == 3


def test_a_refusal_is_not_asked_again(server, ask):
    server.replies = [(401, "no such key")]
    assert ask("Blue.") == ["HTTP 401: no such key"]
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("I would rather not.", "no number: "),
        ("{}", "not a chat completion: KeyError"),
        ("{broken", "not a chat completion: JSONDecodeError"),
        ('{"choices": [{"message": {"content": null}}]}', "not a chat completion: TypeError"),
    ],
)
def test_an_answer_without_a_number_is_a_failure(server, ask, body, reason):
    server.replies = [(200, body)]
    (found,) = ask("Blue.")
    assert found.startswith(reason)


def test_one_failure_leaves_the_others(server, ask):
    server.replies = [(400, "too long"), (200, "Rating: 1")]
    assert ask("a", "b", "c", concurrency=1) == ["HTTP 400: too long", 1.0, 1.0]


def test_no_server_is_a_failure(ask):
    (found,) = ask("Blue.", base_url="http://127.0.0.1:9/v1", retries=1)
    assert found.startswith("no connection")


def test_a_slow_server_is_a_timeout(server, ask):
    server.meeting = threading.Barrier(2)
    assert ask("Blue.", timeout=0.2, retries=0) == ["timeout"]
    server.meeting.abort()


def test_completions_are_judged_beside_each_other(server, ask):
    """The server answers three requests together or not at all."""
    server.meeting = threading.Barrier(3)
    assert ask("a", "b", "c", concurrency=3, retries=0, timeout=20.0) == [5.0, 5.0, 5.0]


def test_the_key_comes_from_the_environment(server, ask, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "abc")
    ask("Blue.", api_key_env="JUDGE_KEY")
    assert server.headers[0]["Authorization"] == "Bearer abc"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
        ask("Blue.", api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"base_url": "localhost:8000"}, "must begin with http"),
        ({"prompt": "Rate it."}, "must hold {completion}"),
        ({"api_key": "abc"}, "Did you mean 'api_key_env'"),
    ],
)
def test_wrong_settings(settings, complaint):
    given = {"name": "judge", "base_url": "http://127.0.0.1/v1", "model": "m", **settings}
    with pytest.raises(ConfigError, match=complaint):
        REWARDS["judge"].config.build(given)
