"""The readers of HPO's two files, on small files of their shape, whole and damaged."""

import pytest

from data_prep.ontology import Ontology, read_hpoa, read_obo
from workflows.errors import UserError

OBO = """format-version: 1.2
data-version: hp/releases/2025-01-16

[Term]
id: HP:1
name: All

[Term]
id: HP:2
name: Limb
def: "A \\"limb\\" is long." [PMID:1, "x"]
synonym: "Extremity" EXACT layperson []
synonym: "Body part" BROAD []
is_a: HP:1 ! All

[Term]
id: HP:3
name: Arm
is_a: HP:2 ! Limb

[Term]
id: HP:4
name: Leg
is_a: HP:2 {source="x"} ! Limb

[Term]
id: HP:5
name: Head
is_a: HP:1 ! All

[Term]
id: HP:6
name: Nose
is_a: HP:5 ! Head

[Term]
id: HP:7
name: Gone
is_obsolete: true

[Typedef]
id: has_part
name: has part
"""
HPOA = """#description: "x"
#version: 2025-01-16
database_id\tdisease_name\tqualifier\thpo_id\tfrequency\taspect
OMIM:1\tA disease\t\tHP:3\t3/4\tP
OMIM:1\tA disease\tNOT\tHP:4\t0/4\tP
OMIM:1\tA disease\t\tHP:4\tHP:0040282\tP
OMIM:1\tA disease\t\tHP:6\t\tP
OMIM:1\tA disease\t\tHP:5\t12.5%\tP
OMIM:1\tA disease\t\tHP:9\t\tI
"""


def test_terms_are_read_whole():
    version, terms = read_obo(OBO.splitlines(), "hp.obo")
    assert version == "hp/releases/2025-01-16"
    assert sorted(terms) == ["HP:1", "HP:2", "HP:3", "HP:4", "HP:5", "HP:6"]
    limb = terms["HP:2"]
    assert (limb.name, limb.definition) == ("Limb", 'A "limb" is long.')
    assert (limb.exact, limb.related, limb.parents) == (("Extremity",), ("Body part",), ("HP:1",))
    assert limb.layperson == ("Extremity",) and terms["HP:3"].layperson == ()
    assert terms["HP:4"].parents == ("HP:2",) and terms["HP:3"].definition == ""


def test_a_laypersons_synonym_keeps_its_scope():
    obo = OBO.replace('"Body part" BROAD []', '"Body part" BROAD layperson [PMID:1]')
    limb = read_obo(obo.splitlines(), "hp.obo")[1]["HP:2"]
    assert (limb.exact, limb.related, limb.layperson) == (("Extremity",), ("Body part",), ("Extremity", "Body part"))


def test_kin_are_siblings_then_cousins_without_the_own_line():
    ontology = Ontology(read_obo(OBO.splitlines(), "hp.obo")[1], "HP:1")
    assert list(ontology.terms) == ["HP:2", "HP:3", "HP:4", "HP:5", "HP:6"]
    assert list(ontology.kin("HP:3")) == [{"HP:4"}, {"HP:6"}, {"HP:5"}]
    assert list(ontology.kin("HP:2")) == [{"HP:5"}, {"HP:6"}]
    assert ontology.ancestors("HP:3") == {"HP:3", "HP:2", "HP:1"}
    assert ontology.descendants("HP:5") == {"HP:5", "HP:6"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("data-version: hp/releases/2025-01-16\n", "", "not an ontology in OBO format"),
        ("name: Arm\n", "", "line 16: a term without id or name"),
        ("name: Arm\n", "name Arm\n", "line 18: not `name: value`"),
        ('def: "A ', "def: A ", "term at line 8: a text without quotes"),
        ("id: HP:5", "id: HP:55", "HP:6 is a kind of HP:5, which is not there"),
    ],
)
def test_a_damaged_ontology_is_refused(old: str, new: str, words: str):
    with pytest.raises(UserError, match=words):
        read_obo(OBO.replace(old, new).splitlines(), "hp.obo")


def test_an_empty_ontology_is_refused():
    with pytest.raises(UserError, match=r"hp.obo is not an ontology"):
        read_obo([], "hp.obo")


def test_annotations_are_present_signs_with_their_frequency():
    version, annotations = read_hpoa(HPOA.splitlines(), "phenotype.hpoa")
    assert version == "2025-01-16"
    found = [(a.term, a.share, a.patients) for a in annotations]
    assert found == [("HP:3", 0.75, 4), ("HP:4", 0.545, None), ("HP:6", None, None), ("HP:5", 0.125, None)]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\taspect\n", "\n", "line 3: no column aspect"),
        ("\t3/4\tP", "\t3/4", "line 4: 5 columns, expected 6"),
        ("3/4", "often", "line 4: unknown frequency 'often'"),
    ],
)
def test_damaged_annotations_are_refused(old: str, new: str, words: str):
    with pytest.raises(UserError, match=words):
        read_hpoa(HPOA.replace(old, new).splitlines(), "phenotype.hpoa")


def test_empty_annotations_are_refused():
    with pytest.raises(UserError, match="holds no disease annotations"):
        read_hpoa(["#version: 1"], "phenotype.hpoa")
