"""The playground of notebook 10: a prompt, one steer or two, and what they change, beside the same in words.

`compared` writes and measures; `show` puts widgets around it, for a notebook or, through Voilà, a projector.
"""

import html
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import hf
from ..additions.addition import get_x_vector
from ..generation import Steer, Steers, all_on, generate
from ..lm_steer.steer import LMSteer
from ..measure import judges, metrics, strength
from ..models import Messages, Model, prompt_texts
from ..pplm.classifier import ClassifierHead
from ..pplm.steer import PPLM
from . import plots, tables

NONE = "none"
PROMPT, WORDS = "The hotel by the station", "What a wonderful day! Everything is great."
SHOWN = 10  # next tokens in the figure


def two_judges() -> dict[str, judges.Judge]:
    return {"positive, VADER": judges.vader(), "positive, MiniLM": judges.minilm_sentiment()}


class Choice(NamedTuple):
    """A steer in a reader's terms. strength: 1 is a usual one, 0 none; also below 0 but for PPLM."""

    mechanism: str  # a key of `MECHANISMS`
    what: str
    strength: float = 1.0
    layer: int = 6  # where an addition goes

    def steer(self, model: Model) -> Steer:
        """The steer. ValueError or FileNotFoundError for something that the mechanism does not know."""
        return MECHANISMS[self.mechanism].make(self, model)


def _addition(choice: Choice, model: Model) -> Steer:
    texts = re.split(r"\s[−–-](?:\s|$)", choice.what, maxsplit=1)
    if len(texts) != 2:
        raise ValueError(
            f"write two texts with a minus sign between them, as Love - Hate, not {choice.what!r}"
        )
    pair = get_x_vector(*map(str.strip, texts), coeff=2 * choice.strength, act_name=choice.layer)
    return pair[0] + pair[1]


def _bag(choice: Choice, model: Model) -> Steer:
    return PPLM(bags=choice.what, stepsize=0.1 * choice.strength, gamma=1.0, num_iterations=1, top_k=0)


def _head(choice: Choice, model: Model) -> Steer:
    name, _, target = choice.what.partition(": ")
    head = ClassifierHead.from_pretrained(name, model)
    how = {
        "gamma": 1.0,
        "horizon_length": 0,
        "num_iterations": 1,
        "stepsize": 0.2 * choice.strength,
        "top_k": 0,
    }
    return PPLM(head=head, target_class_id=target, **how)


def _learned(choice: Choice, model: Model) -> Steer:
    return LMSteer.from_pretrained(choice.what, model).at(6 * choice.strength)


class Mechanism(NamedTuple):
    """How a choice becomes a steer, and what a reader may choose from."""

    make: Callable[[Choice, PreTrainedModel], Steer]
    known: Sequence[str]


MECHANISMS = {
    "activation addition": Mechanism(_addition, ["Love - Hate", "weddings -", "Anger - Calm"]),
    "PPLM, bag of words": Mechanism(_bag, ["space", "wedding", "military"]),
    "PPLM, classifier head": Mechanism(_head, ["sentiment: positive", "sentiment: negative"]),
    "LM-Steer": Mechanism(_learned, ["sentiment", "detoxification"]),
}


class Outcome(NamedTuple):
    """What was written, what is said of it, and how far the steer moves the model."""

    completions: dict[str, str]  # "unsteered", "steered" and, if there was something, "in words"
    numbers: pd.DataFrame  # a line for each of them
    nats: float  # KL(steered ‖ unsteered) a token, along 20 unsteered ones
    figure: Figure  # next-token probabilities without and with the steer


def compared(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    steer: Steers,
    *,
    words: str = "",
    chat: bool = False,
    seed: int = 0,
    tokens: int = 40,
) -> Outcome:
    """Continue a prompt without and with steers, from the same random numbers, and with an order in words.

    words: the order, put in front of the prompt or, with `chat`, into a system message. chat: the prompt is a
    user's message. Perplexities are those of the unsteered model after the prompt without the order.
    """
    shown = _messages(prompt) if chat else prompt
    asked = {"unsteered": (shown, None), "steered": (shown, steer)}
    if words:
        asked["in words"] = (_messages(prompt, words) if chat else f"{words} {prompt}", None)
    (context,), completions, lines = prompt_texts(tokenizer, [shown]), {}, {}
    for name, (read, one) in asked.items():
        start, how = time.perf_counter(), {"max_new_tokens": tokens, "top_p": 0.9, "seed": seed}
        text = generate(model, tokenizer, [read], steer=one, **how)["completion"][0]
        seconds = time.perf_counter() - start
        line = {name: judge([text])[0] for name, judge in two_judges().items()}
        line["perplexity"] = metrics.perplexity(model, tokenizer, [context], [text])[0]
        line["tokens a second"] = len(tokenizer(text, add_special_tokens=False)["input_ids"]) / seconds
        completions[name], lines[name] = text, line
    where = model, tokenizer, [shown]
    nats = strength.kl_along(steer, *where, seed=seed).mean().item()
    before = metrics.next_token_logits(*where)[0]
    with all_on(steer, model, tokenizer):
        after = metrics.next_token_logits(*where)[0]
    pair = (one.softmax(dim=-1).cpu() for one in (before, after))
    figure = plots.before_and_after(*pair, lambda i: tokenizer.decode([i]), count=SHOWN)
    plt.close(figure)  # else the end of a cell would show it, without a text for those who cannot see it
    return Outcome(completions, pd.DataFrame.from_dict(lines, orient="index"), nats, figure)


def _messages(prompt: str, system: str = "") -> Messages:
    order = [{"role": "system", "content": system}] if system else []
    return [*order, {"role": "user", "content": prompt}]


def draw(outcome: Outcome, prompt: str = "") -> None:
    """Show an outcome: the texts, each after the prompt, the numbers, and the next-token probabilities."""
    texts = {name: [prompt + text] for name, text in outcome.completions.items()}
    display(tables.texts(texts), HTML(outcome.numbers.round(2).to_html()))
    display(HTML(f"<p>The steer moves the model by {outcome.nats:.2f} nats a token.</p>"))
    alt = "The next-token probabilities that a steer changes most, unsteered and steered."
    display(outcome.figure, metadata={"image/png": {"alt": alt}})


def show(model: Model, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, tokens: int = 40) -> None:
    """The playground: controls, a button, and what the steers do. Without a kernel, one outcome.

    seed, tokens: what the controls begin with.
    """
    if not os.environ.get("STEER_UTILS_STATIC"):
        display(_widgets(model, tokenizer, seed, tokens))
        return
    mechanism = usual(model)
    steer = Choice(mechanism, MECHANISMS[mechanism].known[0]).steer(model)
    draw(compared(model, tokenizer, PROMPT, steer, words=WORDS, seed=seed, tokens=tokens), PROMPT)


def usual(model: Model) -> str:
    """The mechanism to begin with: LM-Steer, unless none comes with this model."""
    try:
        Choice("LM-Steer", "sentiment").steer(model)
    except ValueError:
        return "activation addition"
    return "LM-Steer"


def _widgets(model: Model, tokenizer: PreTrainedTokenizerBase, seed: int, tokens: int) -> widgets.Widget:
    wide = {"layout": {"width": "min(48em, 95%)"}, "style": {"description_width": "10em"}}
    prompt = widgets.Textarea(PROMPT, description="prompt", rows=2, **wide)
    chat = widgets.Checkbox(False, description="as a chat message", **wide)
    words = widgets.Text(WORDS, description="the same in words", **wide)
    first, second = (
        _pick(model, name, one, wide) for name, one in (("steer", usual(model)), ("second steer", NONE))
    )
    seed = widgets.IntText(seed, description="seed", **wide)
    tokens = widgets.IntSlider(tokens, 5, 100, description="tokens", **wide)
    button, output = widgets.Button(description="Write", button_style="primary"), widgets.Output()

    def write(_: Any = None) -> None:
        button.disabled = True
        output.clear_output(wait=True)
        with output:
            try:
                steers = [one for pick in (first, second) for one in pick.steers(model)]
                how = {"words": words.value, "chat": chat.value, "seed": seed.value, "tokens": tokens.value}
                outcome = compared(model, tokenizer, prompt.value, steers, **how)
                draw(outcome, "" if chat.value else prompt.value)
            except (ValueError, OSError) as problem:  # of a setting: it says what to do
                display(HTML(f"<p>{html.escape(str(problem))}.</p>"))
            finally:
                button.disabled = False

    button.on_click(write)
    rows = [prompt, chat, *first.controls, *second.controls, words, seed, tokens, button, output]
    return widgets.VBox(rows)


class _Pick(NamedTuple):
    """The controls of one steer."""

    mechanism: widgets.Dropdown
    what: widgets.Combobox
    strength: widgets.FloatSlider
    layer: widgets.IntSlider

    @property
    def controls(self) -> list[widgets.Widget]:
        return list(self)

    def steers(self, model: Model) -> list[Steer]:
        """The chosen steer, or none."""
        if self.mechanism.value == NONE:
            return []
        what = self.what.value or self.what.placeholder
        return [Choice(self.mechanism.value, what, self.strength.value, self.layer.value).steer(model)]


def _pick(model: Model, name: str, mechanism: str, wide: dict[str, Any]) -> _Pick:
    slow = wide | {"continuous_update": False}
    pick = _Pick(
        widgets.Dropdown(options=[NONE, *MECHANISMS], value=mechanism, description=name, **wide),
        widgets.Combobox(description="towards", ensure_option=False, **wide),
        widgets.FloatSlider(1, min=-3, max=3, step=0.25, description="strength", **slow),
        widgets.IntSlider(6, 0, len(hf.blocks(model)) - 1, description="layer", **slow),
    )

    def chosen(_: Any = None) -> None:
        """Offer what the mechanism knows, and hide what it does not use."""
        known = MECHANISMS[pick.mechanism.value].known if pick.mechanism.value in MECHANISMS else []
        pick.what.options, pick.what.value, pick.what.placeholder = known, "", next(iter(known), "")
        pick.strength.min = 0 if pick.mechanism.value.startswith("PPLM") else -3
        for control in (pick.what, pick.strength):
            control.layout.display = "" if known else "none"
        pick.layer.layout.display = "" if pick.mechanism.value == "activation addition" else "none"

    pick.mechanism.observe(chosen, "value")
    chosen()
    return pick
