"""Everyday prompts without answers, for replay: a model answers them itself before it is trained on something else.

`teach` writes a model's own answers; mixed into fine-tuning (`lora --replay`) they keep what the model could do, and
their log-probability afterwards says how much of it was lost. All prompts are written for this project. Most ask for a
short answer, since an answer that does not end is of no use. None asks about medicine.
"""

from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.rows import Row
from data_prep.splits import Item, conversation_key, random_splits
from workflows.errors import UserError

HELD_OUT = 25
"""Default number of prompts in validation and in the test."""

PROMPTS: dict[str, tuple[str, ...]] = {
    "fact": (
        "What is the capital of Portugal?",
        "What is the capital of Japan?",
        "Which city is the capital of Canada?",
        "What is the largest ocean on Earth?",
        "Which planet is closest to the Sun?",
        "How many days are there in a leap year?",
        "How many legs does a spider have?",
        "What color do you get when you mix blue and yellow?",
        "Who wrote Romeo and Juliet?",
        "What is the freezing point of water in degrees Celsius?",
        "Which gas do plants take in from the air?",
        "What is the tallest animal in the world?",
        "In which country is the city of Mumbai?",
        "What language is spoken in Brazil?",
        "What is the chemical symbol for gold?",
        "How many minutes are in an hour?",
        "Which month comes after June?",
        "What do bees make?",
        "What is the opposite of cold?",
        "Which continent is Egypt in?",
        "What is the currency of Japan?",
        "Who painted the Mona Lisa?",
        "What is the longest river in South America?",
        "How many sides does a hexagon have?",
        "What is a baby dog called?",
        "Which metal is liquid at room temperature?",
        "What is the name of our galaxy?",
        "On which side of the road do people drive in England?",
    ),
    "explain": (
        "Explain in one sentence why leaves are green.",
        "In one sentence, what is gravity?",
        "Explain in one sentence what a computer program is.",
        "What is a rainbow? Answer in one sentence.",
        "In one or two sentences, why do we have seasons?",
        "Explain in two sentences how a bicycle moves.",
        "What does a library do? One sentence, please.",
        "In one sentence, what is the internet?",
        "Explain briefly why the sea is salty.",
        "What is an island? Answer in one short sentence.",
        "In one sentence, why do birds fly south in winter?",
        "Explain in one sentence what a volcano is.",
        "What is the difference between a lake and a river? One sentence.",
        "In two sentences, what is democracy?",
        "Explain in one sentence what money is for.",
        "Briefly, how does a candle burn?",
        "In one sentence, what is photosynthesis?",
        "What is a map? Keep it to one sentence.",
        "In one sentence, what causes thunder?",
        "Explain briefly what recycling is.",
        "What is a novel? Answer in one sentence.",
        "In one sentence, explain what an electric battery does.",
        "Why does the Moon shine? One sentence, please.",
        "In one sentence, what is a friend?",
        "Explain in one sentence how ice cream is made.",
        "What is a mirror? One sentence.",
    ),
    "list": (
        "Name three fruits.",
        "Name three colors.",
        "List four animals that live in the sea.",
        "Give me three words that rhyme with cat.",
        "Name two things that you find in a kitchen.",
        "List the four seasons.",
        "Name three sports that are played with a ball.",
        "List three things to pack for a day at the beach.",
        "Name three musical instruments.",
        "Give me two tips for saving water, one line each.",
        "List five numbers between one and twenty.",
        "Name three countries in Europe.",
        "Give me three ideas for a birthday present.",
        "List three ways to greet somebody.",
        "Name two famous scientists.",
        "Give me three short tips for studying.",
        "List three ingredients of a pizza.",
        "Name four days of the week.",
        "Give three examples of vegetables.",
        "List three jobs that people do outdoors.",
        "Name three things that fly.",
        "Give me two reasons to read books, one line each.",
    ),
    "rewrite": (
        "Rewrite this sentence politely: Give me the book.",
        "Correct this sentence: She go to school every day.",
        "Put this sentence into the past tense: I walk to the park.",
        "Make this sentence shorter: It is the case that I am of the opinion that we should leave.",
        "Write this as a question: You like tea.",
        "Replace the word big by a synonym: They live in a big house.",
        "Turn this into one sentence: The dog barked. It was hungry.",
        "Correct the spelling: I recieved your leter.",
        "Rewrite in a friendly tone: You are late again.",
        "Put these words in alphabetical order: pear, apple, cherry.",
        "Change this sentence to the plural: The child has a toy.",
        "Write the sentence in capital letters: see you soon.",
        "Summarize in five words: The weather was so bad that the picnic was moved to next week.",
        "Complete the sentence: The early bird",
        "Rewrite this as advice: Smoking harms you.",
        "Say this in a more formal way: Thanks a lot for the help!",
        "Make this sentence negative: I can swim.",
        "Put this sentence into the future tense: We eat at home.",
        "Finish this sentence in a few words: When it rains, I",
        "Turn this sentence into the passive voice: The cat caught the mouse.",
    ),
    "write": (
        "Write one sentence about the sea.",
        "Write a short greeting for a birthday card.",
        "Write one sentence about a cat in a garden.",
        "Write a one-line thank-you note to a teacher.",
        "Write a two-line poem about the moon.",
        "Write a short message: I will be ten minutes late.",
        "Write one sentence that begins with the word yesterday.",
        "Write a title for a story about a lost key.",
        "Write a slogan for a bakery.",
        "Describe the smell of coffee in one sentence.",
        "Describe a winter morning in one sentence.",
        "Write one question that I could ask a new neighbor.",
        "Write a short invitation to a dinner on Friday.",
        "Write a sentence with the words tree, wind and night.",
        "Invent a name for a friendly robot.",
        "Write the first sentence of a mystery story.",
        "Write a very short goodbye message to a colleague.",
        "Tell me a very short joke.",
        "Write a one-sentence review of a good restaurant.",
        "Write one kind sentence to somebody who is sad.",
    ),
    "reason": (
        "What is 7 plus 5?",
        "What is 9 times 3?",
        "What is half of 80?",
        "If I have three apples and eat one, how many are left?",
        "Which number comes next: 2, 4, 6, 8?",
        "Is 17 an even number?",
        "Which is heavier, a feather or a stone?",
        "What is 100 minus 36?",
        "Tom is older than Ann. Who is younger?",
        "How many letters does the word house have?",
        "Which is larger, 0.5 or 0.25?",
        "A train leaves at 3 and arrives at 5. How many hours does it travel?",
        "Does a fish need water? Answer with yes or no and one reason.",
        "Which word does not belong: dog, cat, table, horse?",
        "Is it possible to see stars at noon? Answer briefly.",
        "What is the sum of the first three odd numbers?",
        "If today is Tuesday, what day is tomorrow?",
        "How many wheels do two cars have?",
        "What is 12 divided by 4?",
        "Which comes first in a book, the title or the last chapter?",
    ),
    "code": (
        "Write a line of Python that prints hello.",
        "Write a Python expression for the sum of a and b.",
        "How do I make an empty list in Python?",
        "What does len do in Python? One sentence.",
        "Write a Python function that doubles a number.",
        "Write a short Python loop that prints the numbers from 1 to 3.",
        "How do you write a comment in Python?",
        "What is a variable in programming? One sentence.",
        "Write an HTML tag for a heading that says Welcome.",
        "Which SQL keyword reads rows from a table?",
        "What does the command ls do in Linux? One sentence.",
        "How do I make a text upper-case in Python?",
        "Write a Python condition that checks if x is greater than 10.",
        "In one sentence, what is a bug in a program?",
    ),
    "talk": (
        "What is a good name for a dog?",
        "Can you recommend a hobby? One sentence, please.",
        "What could I cook tonight? Give me one short idea.",
        "I am bored. Suggest one thing to do.",
        "Which season do people like best, and why? One sentence.",
        "What makes a good teacher? Answer in one sentence.",
        "How do I start a conversation with a stranger? One tip.",
        "What should I wear when it snows?",
        "Is it better to travel by train or by car? Answer briefly.",
        "Give me one reason to get up early.",
        "How can I remember names better? One tip, please.",
        "What is a nice way to say no?",
        "I passed my exam today!",
        "My cat sleeps all day. Is that normal? Answer briefly.",
        "What is the best time of the day for a walk?",
        "How do I keep flowers fresh? One sentence.",
        "Give me one idea for a rainy Sunday.",
        "What can a family do without a television? One idea.",
        "How do you make a paper plane? Answer in two sentences.",
        "What do you do when the bus is late? One sentence.",
    ),
    "translate": (
        "How do you say good morning in French?",
        "How do you say thank you in Spanish?",
        "What does the German word Haus mean in English?",
        "Translate into Spanish: I have a dog.",
        "What does bonjour mean?",
        "How do you say water in Italian?",
        "Translate into French: Where is the station?",
        "What does the Spanish word amigo mean in English?",
        "What is the English word for the Latin word luna?",
        "What does the abbreviation ASAP mean?",
    ),
}
"""Prompts by their kind."""


def prepare(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make the data set.

    Args:
        raw_dir: Not used; the prompts are part of this project.
        validation_size: Number of prompts held out for validation; default 25.
        test_size: Number of prompts held out for the test; default 25.
        seed: Seed of the split.

    Raises:
        UserError: If a folder of raw files is named.
    """
    if raw_dir is not None:
        raise UserError("--raw_dir does not go with --data general: its prompts are part of this project.")
    rows: list[Row] = [
        {"prompt": [{"role": "user", "content": text}], "kind": kind}
        for kind, texts in PROMPTS.items()
        for text in texts
    ]
    items = [Item(frozenset({conversation_key(row["prompt"])}), (row,)) for row in rows]
    validation, test = (HELD_OUT if size is None else size for size in (validation_size, test_size))
    return DataSet(
        name="general",
        shape="prompts",
        splits=random_splits(items, validation, test, seed),
        source=Source(
            title="Everyday prompts, without answers",
            origin="data_prep/general.py",
            revision=f"{len(rows)} prompts",
            licence="this project's",
            attribution="Written for this project.",
        ),
        split_rule="at random by seed; equal prompts stay together",
        dropped={},
        notes={"prompts to be answered by `teach`": len(rows)},
    )
