"""Words and sentences are nltk's, with its own parameters where they are installed and learned ones elsewhere."""

import nltk
import pytest
from nltk.tokenize import TreebankWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer, save_punkt_params

from custom_models.tokenization.words import punkt_is_installed, sentences, words, words_of
from workflows.errors import UserError

TEXT = "Dr. Smith isn't in. He left at 5 p.m. with Dr. Jones. Come back!"


@pytest.fixture
def no_punkt(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])


@pytest.fixture(scope="module")
def letters():
    """Plain text in which "Dr." and "p.m." are abbreviations often enough to be learned."""
    names = ("Smith", "Jones", "Brown", "Miller", "Taylor", "Wilson")
    return " ".join(
        f"We met Dr. {name} at {hour} p.m. on a long day in spring. In spring our talk with Dr. {name} was long."
        for name in names
        for hour in range(1, 12)
    )


def test_words_are_the_treebanks():
    assert words("He isn't in.") == ["He", "is", "n't", "in", "."]
    assert words('"Stop," she said (twice).') == TreebankWordTokenizer().tokenize('"Stop," she said (twice).')
    assert words('"Stop"') == ["``", "Stop", "''"]


def test_without_punkt_tab_abbreviations_are_learned_from_a_text(no_punkt, letters):
    assert not punkt_is_installed()
    found = ["Dr. Smith isn't in.", "He left at 5 p.m. with Dr. Jones.", "Come back!"]
    assert sentences(TEXT, learn_from=letters) == found
    assert sentences(TEXT) != found  # it is too short to learn from
    assert words_of(TEXT, learn_from=letters) == [words(sentence) for sentence in found]


def test_a_text_teaches_itself(no_punkt, letters):
    assert sentences(letters) == PunktSentenceTokenizer(letters).tokenize(letters)
    assert len(sentences(letters)) == 2 * 6 * 11


def test_nothing_but_white_space_is_lost(no_punkt, english):
    text = english[:50_000]
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_an_installed_punkt_tab_is_used(tmp_path, monkeypatch, letters):
    """Its parameters are those of the letters, in nltk's own files."""
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])  # nltk writes and reads there only
    save_punkt_params(PunktTrainer(letters).get_params(), str(folder))
    assert punkt_is_installed()
    assert sentences(TEXT, learn_from="Not. Read. At. All.")[0] == "Dr. Smith isn't in."
    with pytest.raises(UserError, match="no language 'klingon'"):
        sentences(TEXT, language="klingon")


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_a_blank_text_is_a_clear_error(no_punkt, blank):
    for split in (sentences, words, words_of):
        with pytest.raises(UserError, match="is empty"):
            split(blank)
