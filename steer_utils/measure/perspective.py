"""Perspective, Google's judge of toxicity that published tables used; it ends on 2026-12-31.

Its makers have said so, and give out no new keys. What it said cannot be asked again afterwards, nor be
compared with `scorers.profanity_check()` or `scorers.detoxify()`, which stay. Answers are kept on disk, so an
interrupted call goes on where it was, and texts that were judged stay judged after the end of the service.
Source: https://developers.perspectiveapi.com. Needs: pip install google-api-python-client
"""

import hashlib
import json
import math
import os
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import embedded
from ..generation import progress
from .judges import Scorer

if TYPE_CHECKING:
    from googleapiclient.discovery import Resource
    from googleapiclient.errors import HttpError

KEY = "PERSPECTIVE_API_KEY"
END = "2026-12-31"
SERVICE = "https://commentanalyzer.googleapis.com"
# What it says of texts that it cannot judge, whenever it is asked.
UNJUDGED = ("LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE", "COMMENT_EMPTY", "COMMENT_TOO_LONG")


def perspective(
    attribute: str = "TOXICITY",
    *,
    languages: Sequence[str] = ("en",),
    requests_per_second: float = 1.0,
    retries: int = 5,
    path: str | Path | None = None,
    service: str = SERVICE,
) -> Scorer:
    """The probability that a reader finds a text toxic, or of another attribute, by Perspective.

    The key comes from the environment variable PERSPECTIVE_API_KEY. languages: what the texts are written in;
    none lets the service guess. requests_per_second: the quota, 1 unless Google granted more. retries: after
    too many requests (429), errors of the server (5xx) or of the network, after 2, 4, 8 … seconds at most.
    path: a file for the answers; by default perspective.sqlite in the cache directory. It holds no texts.

    A text that the service cannot judge (unsupported language, empty, too long) gets NaN, and one warning
    counts them. Making a scorer raises ValueError without a key or for an impossible setting,
    ModuleNotFoundError without Google's client. Calling it raises PermissionError if the key is refused,
    ValueError if the request is, and ConnectionError if the retries are used up; answers so far are kept.
    """
    if not os.environ.get(KEY):
        raise ValueError(f"Perspective needs a key: set the environment variable {KEY}")
    if not (math.isfinite(requests_per_second) and requests_per_second > 0):
        raise ValueError(f"requests_per_second must be above 0 and finite, not {requests_per_second!r}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, not {retries!r}")
    try:
        import googleapiclient  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("type: pip install google-api-python-client") from error
    warnings.warn(f"Perspective ends on {END}; what it says cannot be measured again then", stacklevel=2)
    question = {"languages": list(languages), "requestedAttributes": {attribute: {}}, "doNotStore": True}
    answers = _Answers(Path(path or embedded.cache_dir() / "perspective.sqlite"), question)
    client = _Client(service, attribute, question, requests_per_second, retries)
    return Scorer(f"Perspective v1alpha1, {attribute}", None, lambda texts: _judge(client, answers, texts))


def _judge(client: "_Client", answers: "_Answers", texts: Sequence[str]) -> np.ndarray:
    """The scores [N] of texts; those without an answer on disk are asked for, each once."""
    wanted = [text for text in dict.fromkeys(texts) if text not in answers]
    with progress(len(wanted), "text") as bar, closing(client):
        for text in wanted:
            answers[text] = client.ask(text)
            bar.update()
    found = [answers[text] for text in texts]
    if unjudged := Counter(answer for answer in found if isinstance(answer, str)):
        why = ", ".join(f"{count} {reason}" for reason, count in unjudged.items())
        warnings.warn(f"{unjudged.total()} of {len(texts)} texts have no score, but NaN: {why}", stacklevel=4)
    return np.array([math.nan if isinstance(answer, str) else answer for answer in found], dtype=float)


# --- asking -----------------------------------------------------------------------------------------------


@dataclass
class _Client:
    """Google's client, which retries after longer and longer pauses; so many requests a second, no more."""

    service: str
    attribute: str
    question: dict[str, Any]
    requests_per_second: float
    retries: int
    last: float = field(default=-math.inf)  # when it was last asked, on the monotonic clock

    @cached_property
    def resource(self) -> "Resource":
        """What the service says of itself; no key is needed for that."""
        from googleapiclient import discovery, http

        url = f"{self.service}/$discovery/rest?version=v1alpha1"
        told = {"discoveryServiceUrl": url, "cache_discovery": False, "num_retries": self.retries}
        return discovery.build("commentanalyzer", "v1alpha1", http=http.build_http(), **told)

    def ask(self, text: str) -> float | str:
        """The score of a text, or one of the reasons `UNJUDGED` why it has none."""
        from googleapiclient.errors import Error, HttpError
        from httplib2 import HttpLib2Error

        try:
            request = self.resource.comments().analyze(body=self.question | {"comment": {"text": text}})
            request.headers["x-goog-api-key"] = os.environ.get(KEY, "")  # in the URL, it would be logged
            self._wait()
            answer = request.execute(num_retries=self.retries)
        except HttpError as error:
            return _reason(error)
        except (Error, HttpLib2Error, OSError) as error:
            raise ConnectionError(f"{self.service} does not answer ({error!r}). {LATER}") from error
        return float(answer["attributeScores"][self.attribute]["summaryScore"]["value"])

    def close(self) -> None:
        """Close the connection; the next question opens another."""
        if "resource" in vars(self):
            self.resource.close()

    def _wait(self) -> None:
        time.sleep(max(0.0, self.last + 1 / self.requests_per_second - time.monotonic()))
        self.last = time.monotonic()


LATER = f"Answers so far are kept: call again to go on. The service ends on {END}."


def _reason(error: "HttpError") -> str:
    """Why a text has no score, if it is because of the text; else an exception that says what it is."""
    status = int(error.resp.status)
    try:
        details = json.loads(error.content)["error"]
        reasons = {one.get(name) for one in details.get("details", ()) for name in ("errorType", "reason")}
        said = f"{status}: {details.get('message', '')}"
    except (ValueError, KeyError, TypeError, AttributeError):
        reasons, said = set(), f"{status}"
    if status == 400 and (known := reasons.intersection(UNJUDGED)):
        return known.pop()
    if status in (401, 403) or "API_KEY_INVALID" in reasons:
        raise PermissionError(f"Perspective refuses the key in {KEY} ({said}). {LATER}") from error
    if status == 429 or status >= 500:
        raise ConnectionError(f"Perspective goes on answering {said}. {LATER}") from error
    raise ValueError(f"Perspective does not take this request ({said})") from error


# --- keeping ----------------------------------------------------------------------------------------------


class _Answers:
    """What was answered to a question about texts: a score, or why there is none; a table on disk."""

    def __init__(self, path: Path, question: dict[str, Any]) -> None:
        self.path, self.question = path, json.dumps(question, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._run("create table if not exists answers (asked text primary key, score real, reason text)")

    def __contains__(self, text: str) -> bool:
        return bool(self._run("select 1 from answers where asked = ?", self._key(text)))

    def __getitem__(self, text: str) -> float | str:
        (row,) = self._run("select score, reason from answers where asked = ?", self._key(text))
        return row[0] if row[1] is None else row[1]

    def __setitem__(self, text: str, answer: float | str) -> None:
        score, reason = (None, answer) if isinstance(answer, str) else (answer, None)
        self._run("insert or replace into answers values (?, ?, ?)", self._key(text), score, reason)

    def _key(self, text: str) -> str:
        return hashlib.sha256(json.dumps([self.question, text]).encode()).hexdigest()

    def _run(self, command: str, *values: str | float | None) -> list[tuple]:
        with closing(sqlite3.connect(self.path)) as database, database:
            return database.execute(command, values).fetchall()
