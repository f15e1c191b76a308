"""IOB2: files and tags, there and back, and what breaks the scheme."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.iob import Dictionary, Entity, entities_of, read_iob, tags_of
from workflows.errors import UserError


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from(["A", "B-x"])), max_size=6))
def test_tags_and_entities_say_the_same(pieces):
    place, entities = 0, []
    for gap, length, kind in pieces:
        entities.append(Entity(kind, place + gap, place + gap + length))
        place += gap + length
    assert entities_of(tags_of(entities, place + 2)) == entities


def test_files_of_tabs_or_spaces_with_further_columns_are_read(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\r\n\n\nno\tB-X\nbreak\tI-X")
    assert read_iob(file) == [(["EU", "rejects"], ["B-ORG", "O"]), (["no", "break"], ["B-X", "I-X"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\tI-X\n", r"line 2: 'I-X' must follow B-X or I-X, not 'O'"),
        ("a\tB-Y\nb\tI-X\n", "line 2: 'I-X' must follow B-X or I-X, not 'B-Y'"),
        ("a\tB-X\n\nb\tI-X\n", "line 3: 'I-X' must follow"),  # a new sentence
        ("a\tO\nb\tE-X\n", "line 2: 'E-X' is no tag of IOB2"),
        ("a\tB-\n", "line 1: 'B-' is no tag"),
        ("a\tO\nword\n", "line 2: 'word' is not a word and its tag"),
        ("", "holds no sentence"),
        ("\n\n", "holds no sentence"),
    ],
)
def test_what_breaks_the_scheme_is_named_by_file_and_line(tmp_path, text, message):
    file = tmp_path / "broken.tsv"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_iob(file)
    assert str(file) in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        read_iob(tmp_path / "none.tsv")


def test_the_longest_name_is_taken():
    names = Dictionary({("gastric",): "A", ("gastric", "ulcer"): "B", ("ulcer",): "A", ("ulcer", "of", "it"): "C"})
    assert names.find(["Gastric", "ulcer", "or", "ULCER"]) == [Entity("B", 0, 2), Entity("A", 3, 4)]
    assert Dictionary({}).find(["a"]) == []
