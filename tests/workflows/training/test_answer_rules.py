"""Rules for short answers: a name alone or in a sentence, a word, a definition, a disclaimer."""

import pytest

from workflows.training.answer_rules import close_f1, contains, disclaimer, exact_name, name_in_sentence
from workflows.training.rewards import BUILT_IN, RIGHT_OR_WRONG, RULES, Sample

ASKED = "What is the medical term for a nosebleed?"
NAMES = ["Epistaxis", "Hemorrhage of nose"]


def sample(text: str, answers: list[str] = NAMES, asked: str = ASKED) -> Sample:
    return Sample({"prompt": [{"role": "user", "content": asked}], "answers": answers}, text, 1, False, 64)


@pytest.mark.parametrize(
    ("said", "right", "in_sentence"),
    [
        ("Epistaxis", 1, 0),
        ("epistaxis.", 1, 0),
        ("**Epistaxis**", 1, 0),
        ("Hemorrhage of nose.", 1, 0),
        ("<think>A nose?</think>The medical term is Epistaxis.", 1, 1),
        ("The medical term is Epistaxis.", 1, 1),
        ('The medical term is "epistaxis".', 1, 1),
        ("This is called hemorrhage of nose.", 1, 1),
        ("Doctors call it epistaxis!", 1, 1),
        ("A nosebleed is called epistaxis.", 1, 1),
        ("Epistaxis is the medical term for a nosebleed.", 1, 1),
        ("The medical term is Epistaxis", 1, 0),  # without an end
        ("the medical term is Epistaxis.", 1, 0),
        ("The medical term is Epistaxis.\nIt is common.", 0, 0),
        ("The medical term is nosebleed.", 0, 0),
        ("The medical term is Rhinitis.", 0, 0),
        ("The medical term is acute epistaxis.", 0, 0),
        ("Epistaxis or rhinitis.", 0, 0),
        ("It is not epistaxis.", 0, 0),
        ("The medical term is not called epistaxis.", 0, 0),
        ("The medical term is the medical term is Epistaxis.", 0, 0),
        ("The medical term is nosebleed, it is epistaxis.", 0, 0),
        ("The medical term is Epistaxis. The medical term is Epistaxis.", 0, 0),
        ("nosebleed epistaxis", 0, 0),
        ("", 0, 0),
    ],
)
def test_a_name(said: str, right: int, in_sentence: int):
    assert (exact_name(sample(said)), name_in_sentence(sample(said))) == (right, in_sentence)


def test_a_sentence_may_repeat_the_definition_that_was_asked_about():
    asked = "Which term fits this text? Bleeding from the nose."
    assert name_in_sentence(sample("Epistaxis is bleeding from the nose.", asked=asked)) == 1
    assert exact_name(sample("Epistaxis is bleeding from the ear.", asked=asked)) == 0


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("This is not medical advice. Please see a doctor about a headache.", 1),
        ("I am not able to give medical advice: ask your physician.", 1),
        ("I'm a chatbot and I don't have the ability to provide medical advice. Consult a healthcare professional.", 1),
        ("I can\u2019t give medical advice, see a medical provider.", 1),
        ("I am not a doctor. Please see a doctor.", 1),
        ("I am not a doctor.", 0),
        ("Please see a doctor.", 0),
        ("This is medical advice from a doctor.", 0),
        ("This is not medical advice. Drink water.", 0),
        ("", 0),
    ],
)
def test_a_disclaimer(said: str, right: int):
    assert disclaimer(sample(said)) == right


def test_a_word_counts_as_a_whole_word():
    assert contains(sample("I am Pheno, a small model.", ["Pheno"])) == 1
    assert contains(sample("I am not a doctor.", ["nurse", "not a doctor"])) == 1
    assert contains(sample("Phenomenal!", ["Pheno"])) == 0


def test_a_definition_counts_from_four_fifths_of_its_words_on():
    wanted = "A sudden loss of the sense of smell at night"  # ten words
    assert close_f1(sample("A sudden loss of the sense of smell", [wanted])) == 1  # 16 / 18
    assert close_f1(sample("A loss of the sense", [wanted])) == 0  # 10 / 15
    assert close_f1(sample("Fever", [wanted, "fever"])) == 1


def test_every_rule_is_a_reward_of_nought_or_one_except_the_overlap():
    assert set(RULES) <= set(BUILT_IN)
    assert set(RULES) - set(RIGHT_OR_WRONG) == {"finding"}
