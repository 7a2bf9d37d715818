"""Perspective against a server of our own that answers, refuses, stumbles and forgets as Google's does."""

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_utils.measure.perspective import KEY, perspective

SECRET = "the-secret-key"
ERROR = "type.googleapis.com/google.commentanalyzer.v1alpha1.Error"
pytestmark = pytest.mark.filterwarnings("ignore:Perspective ends on 2026-12-31:UserWarning")

Answer = tuple[int, dict[str, Any]]


def discovery(root: str) -> dict[str, Any]:
    """The part of Google's description of the service that the client needs."""
    analyze = {
        "id": "commentanalyzer.comments.analyze",
        "path": "v1alpha1/comments:analyze",
        "httpMethod": "POST",
        "parameters": {},
        "request": {"$ref": "AnalyzeCommentRequest"},
        "response": {"$ref": "AnalyzeCommentResponse"},
    }
    schemas = {
        name: {"id": name, "type": "object"} for name in ("AnalyzeCommentRequest", "AnalyzeCommentResponse")
    }
    return {
        "name": "commentanalyzer",
        "version": "v1alpha1",
        "rootUrl": f"{root}/",
        "servicePath": "",
        "parameters": {},
        "schemas": schemas,
        "resources": {"comments": {"methods": {"analyze": analyze}}},
    }


def score(text: str) -> float:
    return len(text) / 100


def scored(request: dict[str, Any]) -> Answer:
    (attribute,) = request["requestedAttributes"]
    value = score(request["comment"]["text"])
    return 200, {"attributeScores": {attribute: {"summaryScore": {"value": value, "type": "PROBABILITY"}}}}


def refused(status: int, message: str, **details: str) -> Answer:
    return status, {"error": {"code": status, "message": message, "details": [details] if details else []}}


class Service:
    """A server whose answers a test chooses: `answers` first, one after the other, and then a score."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.answer: Callable[[dict[str, Any]], Answer] = scored
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                service.paths.append(self.path)
                self.reply(200, discovery(service.url))

            def do_POST(self) -> None:
                service.paths.append(self.path)
                service.keys.append(self.headers["x-goog-api-key"])
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append(request)
                self.reply(*(service.answers.pop(0) if service.answers else service.answer(request)))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def texts(self) -> list[str]:
        return [request["comment"]["text"] for request in self.asked]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield service
    service.server.shutdown()
    thread.join()
    service.server.server_close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept each time; nobody waits."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def judge(service: Service, slept: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Makes a scorer that asks the server, its answers in a folder of the test."""
    monkeypatch.setenv(KEY, SECRET)
    told = {"service": service.url, "path": tmp_path / "new" / "answers.sqlite"}
    return lambda attribute="TOXICITY", **settings: perspective(attribute, **told | settings)


# --- answers ----------------------------------------------------------------------------------------------


def test_each_text_gets_its_score_in_order_and_is_asked_for_once(service, judge):
    found = judge()(["abc", "a longer text", "abc", "ü\n"])
    np.testing.assert_allclose(found, [0.03, 0.13, 0.03, 0.02])
    assert service.texts() == ["abc", "a longer text", "ü\n"]


def test_what_is_asked_is_what_the_service_documents(service, judge):
    judge("INSULT", languages=("de", "en"))(["abc"])
    assert service.asked == [
        {
            "comment": {"text": "abc"},
            "languages": ["de", "en"],
            "requestedAttributes": {"INSULT": {}},
            "doNotStore": True,
        }
    ]
    assert service.paths[-1].startswith("/v1alpha1/comments:analyze")


def test_the_key_goes_in_a_header_and_never_in_an_address(service, judge):
    judge()(["abc"])
    assert service.keys == [SECRET]
    assert not any(SECRET in path for path in service.paths)


def test_no_texts_need_no_service(service, judge):
    assert judge()([]).shape == (0,)
    assert service.paths == []


def test_the_scorer_has_a_name_with_its_version_and_no_accuracy_of_its_own(judge):
    scorer = judge("THREAT")
    assert scorer.name == "Perspective v1alpha1, THREAT"
    assert scorer.accuracy is None
    with pytest.raises(TypeError, match="not the single text 'abc'"):
        scorer("abc")


def test_whoever_makes_one_is_told_when_the_service_ends(judge):
    with pytest.warns(UserWarning, match="ends on 2026-12-31"):
        judge()


# --- keeping ----------------------------------------------------------------------------------------------


def test_answers_are_kept_on_disk_and_asked_for_no_more(service, judge):
    judge()(["abc", "de"])
    np.testing.assert_allclose(judge()(["de", "fghi", "abc"]), [0.02, 0.04, 0.03])
    assert service.texts() == ["abc", "de", "fghi"]


@pytest.mark.parametrize("other", [{"attribute": "INSULT"}, {"languages": ("de",)}])
def test_another_question_has_answers_of_its_own(service, judge, other):
    judge()(["abc"])
    judge(**other)(["abc"])
    assert service.texts() == ["abc", "abc"]


def test_no_text_is_written_to_the_file(judge, tmp_path):
    judge()(["something private"])
    assert b"private" not in (tmp_path / "new" / "answers.sqlite").read_bytes()


def test_what_was_answered_before_the_service_failed_is_not_lost(service, judge):
    service.answers = [scored(request("abc")), *[refused(503, "try later")] * 3]
    with pytest.raises(ConnectionError, match=r"503: try later.*call again to go on.*2026-12-31"):
        judge(retries=2)(["abc", "de", "f"])
    np.testing.assert_allclose(judge()(["abc", "de", "f"]), [0.03, 0.02, 0.01])
    assert service.texts() == ["abc", "de", "de", "de", "de", "f"]


def request(text: str) -> dict[str, Any]:
    return {"comment": {"text": text}, "requestedAttributes": {"TOXICITY": {}}}


# --- trouble ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_tried_again_after_growing_pauses(service, judge, slept, status):
    service.answers = [refused(status, "not now")] * 3
    np.testing.assert_allclose(judge(retries=3, requests_per_second=1e9)(["abc"]), [0.03])
    assert service.texts() == ["abc"] * 4
    pauses = [pause for pause in slept if pause > 1e-6]
    assert len(pauses) == 3
    assert all(pause <= 2**number for number, pause in enumerate(pauses, 1))


def test_a_text_that_cannot_be_judged_has_no_score_and_is_counted(service, judge):
    def answer(asked: dict[str, Any]) -> Answer:
        kinds = {"": "COMMENT_EMPTY", "nuqneH": "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"}
        kind = kinds.get(asked["comment"]["text"])
        return refused(400, "no", errorType=kind, **{"@type": ERROR}) if kind else scored(asked)

    service.answer = answer
    counted = "3 of 4 texts have no score, but NaN: 1 COMMENT_EMPTY, 2 LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"
    for _ in range(2):  # the second time from the file
        with pytest.warns(UserWarning, match=counted):
            found = judge()(["", "nuqneH", "abc", "nuqneH"])
        np.testing.assert_allclose(found, [np.nan, np.nan, 0.03, np.nan])
    assert service.texts() == ["", "nuqneH", "abc"]


@pytest.mark.parametrize(
    "answer",
    [
        refused(403, "The API is not enabled"),
        refused(401, "Who are you?"),
        refused(400, "API key not valid.", reason="API_KEY_INVALID"),
    ],
)
def test_a_key_that_is_refused_is_an_error_that_names_the_variable_and_not_the_key(
    service, judge, answer, caplog
):
    service.answer = lambda asked: answer
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(PermissionError, match=f"{KEY} .*{answer[0]}") as raised,
    ):
        judge()(["abc"])
    assert len(service.asked) == 1
    assert SECRET not in f"{raised.value}{raised.value.__cause__}{caplog.text}"


def test_retries_do_not_log_the_key(service, judge, caplog):
    service.answers = [refused(503, "later")]
    with caplog.at_level(logging.DEBUG):
        judge()(["abc"])
    assert SECRET not in caplog.text


def test_another_refusal_is_quoted(service, judge):
    service.answer = lambda asked: refused(400, "Attribute NONSENSE is unknown", errorType="UNKNOWN")
    with pytest.raises(ValueError, match="400: Attribute NONSENSE is unknown"):
        judge("NONSENSE")(["abc"])


@pytest.mark.parametrize("body", [{}, {"error": "text"}])
def test_a_refusal_in_an_unknown_layout_is_still_an_error(service, judge, body):
    service.answer = lambda asked: (403, body)
    with pytest.raises(PermissionError, match="403"):
        judge()(["abc"])


def test_a_service_that_is_gone_is_an_error_that_says_so(service, judge):
    scorer = judge(retries=1, service="http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 does not answer.*2026-12-31"):
        scorer(["abc"])


# --- pace and settings ------------------------------------------------------------------------------------


def test_requests_keep_their_distance(service, judge, slept, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    judge(requests_per_second=4)([f"text {i}" for i in range(9)])
    assert now[0] == pytest.approx(100 + 8 / 4)


def test_without_a_key_nothing_is_begun(judge, monkeypatch):
    monkeypatch.delenv(KEY)
    with pytest.raises(ValueError, match=f"set the environment variable {KEY}"):
        judge()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requests_per_second": 0}, "requests_per_second must be above 0 and finite, not 0"),
        ({"requests_per_second": float("inf")}, "not inf"),
        ({"retries": -1}, "retries must be at least 0, not -1"),
    ],
)
def test_impossible_settings_are_refused(judge, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        judge(**settings)


def test_without_the_client_the_error_says_what_to_type(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "googleapiclient", None)
    with pytest.raises(ModuleNotFoundError, match="pip install google-api-python-client"):
        judge()
