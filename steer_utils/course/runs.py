"""The texts of notebook 08: what steers write at equal strength, kept on file with what judges say of them.

A run is the completions of all held-out prompts under one steer, the factor on it, its KL at each token, and
scores. What is on file for the same model, prompts and numbers is not written again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import data, models
from ..generation import generate
from ..measure import judges, metrics, strength
from ..measure.trials import by_prompt, trial
from . import notebook, tables

NAME = "08_texts"  # of the file
READER = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(eq=False)
class Runs:
    """Runs by name, such as "sentiment: LM-Steer at 0.5". anew: write all of them again."""

    model: models.Model
    tokenizer: PreTrainedTokenizerBase
    tuning: Sequence[str]  # prompts, to set strengths on
    test: Sequence[str]  # held-out prompts, to report on
    news: Sequence[str]  # texts that nobody asked to steer
    nats: Sequence[float]
    samples: int
    tokens: int
    seed: int
    second: str | None = None  # a model that reads the texts too, if it is there
    anew: bool = False
    on_file: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with suppress(LookupError):  # of another model
            self.on_file |= {} if self.anew else notebook.measured(NAME, self.model, **self.facts)["runs"]
        self.vader, self.minilm = judges.vader(), judges.minilm_sentiment()
        self.space_words = [*data.words("judge/space"), *data.words("space")]

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.on_file[key]

    def __contains__(self, key: str) -> bool:
        return key in self.on_file

    @property
    def facts(self) -> dict[str, Any]:
        """What two files of runs must share."""
        facts = {"prompts": [*self.tuning, *self.test], "samples": self.samples, "tokens": self.tokens}
        return facts | {"nats": list(self.nats), "seed": self.seed}

    @property
    def sampling(self) -> dict[str, Any]:
        return {"max_new_tokens": self.tokens, "top_p": 0.9, "top_k": 0, "seed": self.seed}

    # --- writing ------------------------------------------------------------------------------------------

    def write(
        self,
        key: str,
        makers: Iterable[Callable[[], Any]],
        nats: float | None = None,
        prefix: Callable[[], str] = str,
    ) -> None:
        """Write a run unless it is there; sample i is by the steer of the i-th maker, in turns.

        nats: a token, to which each steer is set; None leaves it. prefix: makes what stands before prompts.
        """
        if key in self:
            return
        units, before = [make() for make in makers], prefix()
        factors = [self.factor(unit, nats) if nats else 1.0 for unit in units]
        found = [strength.scaled(unit, by) for unit, by in zip(units, factors, strict=True)]
        how = {"num_samples": self.samples, "batch_size": 72} | self.sampling
        shown = [before + one for one in self.test]
        tables = [generate(self.model, self.tokenizer, shown, steer=one, **how) for one in found]
        turns = [table[table["sample"] % len(tables) == i] for i, table in enumerate(tables)]
        where = self.model, self.tokenizer, self.tuning
        along = partial(strength.kl_along, found[0], *where, tokens=self.tokens, prefix=before)
        facts = {"factor": factors[0], "prefix": before, "by_token": along().mean(dim=0).tolist()}
        facts |= {"own_text": along(own_text=True).mean().item()}
        facts["news"] = strength.loss_increase(self.model, self.tokenizer, self.news, found[0])
        self.keep(key, pd.concat(turns).sort_index()["completion"].tolist(), **facts)

    def write_best_of(self, key: str, n: int, score: Callable[[list[str]], Sequence[float]]) -> None:
        """Write, unless it is there, the best by a score of n unsteered completions for each sample."""
        if key not in self:
            prompts = np.repeat(list(self.test), self.samples).tolist()
            table = generate(
                self.model, self.tokenizer, prompts, num_samples=n, batch_size=72, **self.sampling
            )
            best = metrics.best_of(table, score(table["completion"].tolist()))
            self.keep(key, best["completion"].tolist())

    def keep(self, key: str, texts: list[str], **facts: Any) -> None:
        """Put texts on file, with what the judges that take long and the readers say of them."""
        found = facts | {"completion": texts, "MiniLM": self.minilm(texts).round(5).tolist()}
        toward_space = judges.sentence_embeddings(data.words("judge/space")).mean(axis=0)
        found["nearness"] = (judges.sentence_embeddings(texts) @ toward_space).round(5).tolist()
        prompts = np.repeat(list(self.test), self.samples).tolist()
        for loss, reader in self.readers.items():
            found[loss] = np.log(metrics.perplexity(*reader, prompts, texts)).round(4).tolist()
        self.on_file[key] = found
        notebook.keep(NAME, model=self.model, **self.facts, runs=self.on_file)

    @cached_property
    def readers(self) -> dict[str, READER]:
        """The models that read the texts: the unsteered one and, where it is there, the second."""
        found = {"loss": (self.model, self.tokenizer)}
        try:
            return found | {f"loss by {self.second}": models.load(self.second)} if self.second else found
        except (ImportError, OSError) as problem:  # a package or a download is missing
            print(f"{problem} No second model reads the texts.")
            return found

    def factor(self, steer: Any, nats: float) -> float:
        """What to scale a steer by so that it moves the model by so many nats a token."""
        try:
            where = self.model, self.tokenizer, self.tuning
            return strength.kl_factor(steer, nats, *where, tokens=self.tokens)
        except ValueError as problem:  # for a random model, say
            print(f"Left as it is: {problem}.")
            return 1.0

    def best_prefix(self, sentences: Sequence[str], attribute: str) -> str:
        """The sentence in front of the tuning prompts after which most completions have the attribute."""

        def judge(texts: list[str]) -> np.ndarray:
            if attribute == "space":
                return metrics.word_count(texts, self.space_words) > 0
            return (self.vader(texts) + self.minilm(texts)) / 2

        where = self.model, self.tokenizer, self.tuning
        write = partial(trial, *where, judges={"it": judge}, num_samples=2, **self.sampling)
        return max(sentences, key=lambda one: by_prompt(write(shown=(one + "{}").format), "it").mean())

    # --- reading ------------------------------------------------------------------------------------------

    @cache  # noqa: B019, there is one for a notebook
    def read(self, key: str, what: str) -> np.ndarray:
        """What is said of a run: the mean of each prompt's completions, [prompts]; an empty one has no loss.

        what: a judge, which says 1 for yes, 0 for no and one half where it takes no side, or a kept number.
        """
        run = self[key]
        known: Mapping[str, Callable[[], Any]] = {
            "VADER": lambda: np.heaviside(self.vader(run["completion"]) - 0.5, 0.5),
            "MiniLM": lambda: np.heaviside(np.subtract(run["MiniLM"], 0.5), 0.5),
            "p(positive)": lambda: run["MiniLM"],
            "distinct-2": lambda: [metrics.distinct(text, 2) for text in run["completion"]],
            "a word about space": lambda: metrics.word_count(run["completion"], self.space_words) > 0,
            "nearer to space": lambda: np.heaviside(
                np.subtract(run["nearness"], self["unsteered"]["nearness"]), 0.5
            ),
        }
        said = np.array(known[what]() if what in known else run[what], dtype=float)
        return pd.DataFrame(said.reshape(len(self.test), -1)).mean(axis=1).to_numpy()

    def change(self, key: str, what: str, other: str = "unsteered") -> np.ndarray:
        """By how much each prompt's mean differs from that of another run; prompts without one left out."""
        found = self.read(key, what) - self.read(other, what)
        return found[~np.isnan(found)]

    def key_of(self, attribute: str, name: str, nats: float = 0.5) -> str:
        """A run's name: at so many nats or not, for this attribute or for all."""
        names = (f"{attribute}: {name} at {nats}", f"{name} at {nats}", f"{attribute}: {name}", name)
        return next(key for key in names if key in self)

    def outcome(self, attribute_judges: Sequence[str], key: str) -> dict[str, metrics.Interval]:
        """Control by the judges, the cost by the readers, distinct-2, and the loss added on the news."""
        found = {judge: metrics.bootstrap(self.read(key, judge)) for judge in attribute_judges}
        for loss in [name for name in self[key] if name.startswith("loss")]:
            ratio = metrics.Interval(*np.exp(metrics.bootstrap(self.change(key, loss))))
            found["perplexity ratio" + loss.removeprefix("loss")] = ratio
        found["distinct-2"] = metrics.bootstrap(self.read(key, "distinct-2"))
        run = self[key]
        if "news" in run and not run.get("prefix"):  # which does not stand before the news
            found["loss on news"] = metrics.Interval(*run["news"])
        return found


def starred(rows: Mapping[str, Mapping[str, metrics.Interval]], judges: Sequence[str]) -> pd.DataFrame:
    """The lines as text; * where no other has more control, summed over judges, at no more perplexity."""
    places = {
        name: (-row["perplexity ratio"].mean, sum(row[judge].mean for judge in judges))
        for name, row in rows.items()
    }
    pairs = [(a, b) for a in rows for b in rows if places[a] != places[b]]
    beaten = {a for a, b in pairs if np.less_equal(places[a], places[b]).all()}
    table = tables.intervals(pd.DataFrame.from_dict(rows, orient="index"))
    return table.rename(lambda name: name if name in beaten else f"{name} *")


def verdicts(paired: Mapping[str, Mapping[str, metrics.Interval]]) -> str:
    """A line of Markdown for each comparison "a − b", whose intervals are of two judges and of the cost.

    More or less control is claimed where the intervals of both judges leave out zero on the same side.
    """
    lines = []
    for question, found in paired.items():
        first, second, cost = found.values()
        low, high = min(first.low, second.low), max(first.high, second.high)
        control = (
            "more control" if low > 0 else "less control" if high < 0 else "no clear difference in control"
        )
        price = "higher" if cost.low > 0 else "lower" if cost.high < 0 else "about the same"
        lines.append(f"* {question.replace(' − ', ', compared with ')}: {control}; perplexity {price}.")
    return "\n".join(lines)


def in_chat(tokenizer: PreTrainedTokenizerBase, order: str) -> str:
    """What the chat template puts before the model's answer to an order; without one, the order itself."""
    if not tokenizer.chat_template:
        return f"{order}\n"
    messages = [{"role": "user", "content": order}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
