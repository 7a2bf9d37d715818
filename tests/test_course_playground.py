"""The playground: choices become steers, texts are those of `generate`, and errors say what to do."""

import pytest
import torch
from conftest import tiny

import steer_utils as su
from steer_utils.course import playground
from steer_utils.course.playground import Choice, compared

UP = su.OffsetSteer(3 * torch.arange(97.0).sin()[None], epsilon=1.0).at(1)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges that need no model."""
    judge = su.judges.Judge("length", None, lambda texts: [min(1.0, len(text) / 100) for text in texts])
    monkeypatch.setattr(playground, "two_judges", lambda: {"length": judge})


def test_texts_are_those_of_generate_and_numbers_those_of_the_metrics(tokenizer, judged):
    model, how = tiny("llama"), {"max_new_tokens": 6, "top_p": 0.9, "seed": 3}
    found = compared(model, tokenizer, "ab cd", UP, words="Smile!", seed=3, tokens=6)
    wanted = {
        name: su.generate(model, tokenizer, [text], steer=steer, **how)["completion"][0]
        for name, text, steer in [
            ("unsteered", "ab cd", None),
            ("steered", "ab cd", UP),
            ("in words", "Smile! ab cd", None),
        ]
    }
    assert found.completions == wanted
    assert found.numbers.index.tolist() == [*wanted]
    perplexity = su.metrics.perplexity(model, tokenizer, ["ab cd"] * 3, [*wanted.values()])
    assert found.numbers["perplexity"].tolist() == pytest.approx(perplexity.tolist())
    assert found.nats > 0
    assert compared(model, tokenizer, "ab cd", [], tokens=3).nats == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("choice", "kind"),
    [
        (Choice("activation addition", "Love - Hate", 2.0, 1), su.additions.addition.AdditionSum),
        (Choice("PPLM, bag of words", "space"), su.PPLM),
    ],
)
def test_a_choice_becomes_a_steer_and_strength_0_changes_nothing(choice, kind, tokenizer, judged):
    model = tiny("llama")
    assert isinstance(choice.steer(model), kind)
    weak = choice._replace(strength=0.0).steer(model)
    found = compared(model, tokenizer, "ab cd ef gh ij", weak, tokens=8)
    assert found.nats == pytest.approx(0, abs=1e-5)
    assert found.completions["steered"] == found.completions["unsteered"]


def test_what_the_lists_offer_is_there_for_the_embedded_model():
    model, _ = su.load()
    for name, mechanism in playground.MECHANISMS.items():
        assert all(hasattr(Choice(name, what).steer(model), "on") for what in mechanism.known)
    assert playground.usual(model) == "LM-Steer"
    assert playground.usual(tiny("llama")) == "activation addition"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice("activation addition", "Love"), "minus sign"),
        (Choice("PPLM, bag of words", "spacee"), "no wordlists 'spacee'"),
        (Choice("PPLM, bag of words", "space", -1.0), "stepsize must be at least 0"),
        (Choice("LM-Steer", "sentiment"), "for a width of"),
    ],
)
def test_a_choice_that_does_not_work_says_what_to_do(choice, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        choice.steer(tiny("llama"))


def test_the_button_writes_and_an_error_is_shown_where_the_texts_would_be(tokenizer, judged, monkeypatch):
    shown = []
    monkeypatch.setattr(playground, "display", lambda *pieces, **_: shown.extend(pieces))
    monkeypatch.delenv("STEER_UTILS_STATIC", raising=False)
    playground.show(tiny("llama"), tokenizer)
    controls = {child.description: child for child in shown.pop().children if hasattr(child, "description")}
    controls["prompt"].value, controls["tokens"].value = "ab cd ef gh ij kl", 5
    for pick in ("steer", "second steer"):
        controls[pick].value = "none"
    controls["Write"].click()
    assert "ab cd" in shown[0].data
    assert not controls["Write"].disabled
    controls["steer"].value = "LM-Steer"  # which is for another width
    shown.clear()
    controls["Write"].click()
    assert not controls["Write"].disabled
    assert "width" in shown[0].data
