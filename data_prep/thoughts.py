"""Answers that think first, in DeepSeek-R1's form: `data/hpo_thoughts`, of the same terms and splits as `data/hpo`.

A thought names what the term is a kind of; the answer after it is the term's name. A few hundred such rows teach a
small model the form, which GRPO then rewards together with the answer (`make lora grpo DATA=hpo_thoughts`).
"""

from dataclasses import replace

from data_prep.ontology import Ontology
from data_prep.rows import Row
from data_prep.splits import Item, Phrases


def with_thoughts(items: list[Item], ontology: Ontology, secrets: Phrases | None = None) -> list[Item]:
    """Give each term of `hpo` a row that thinks, where it is a kind of something that may be named.

    Args:
        items: Terms of one split, as `hpo` makes them: a `name` row each.
        ontology: Their parents.
        secrets: Names that must not be told: those of held-out terms, in training rows.
    """
    found = []
    for item in items:
        parents = [parent.name for parent in ontology.parents(item.rows[0]["id"])]
        told = [name for name in parents if secrets is None or not secrets.found_in(name)]
        found.append(replace(item, thought=_thinking(item, told[0])) if told else item)
    return found


def _thinking(item: Item, kind: str) -> Row:
    (row,) = (row for row in item.rows if row["kind"] == "name")
    question, answer = row["messages"]
    if not kind[1:2].isupper():  # an abbreviation stays one
        kind = kind[0].lower() + kind[1:]
    thought = f"<think>\nThe description is of a kind of {kind}.\n</think>\n{answer['content']}"
    return {**row, "messages": [question, {"role": "assistant", "content": thought}], "kind": "thought"}
