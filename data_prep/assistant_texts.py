"""Texts of the data set `assistant` that are written by hand: wordings, answers about itself, small talk, complaints.

All sentences are written for this project. A wording is in one group only, so that what is held out (`validation`,
`test`) is asked in words that no training row (`train`), preference (`pairs`) or GRPO question (`grpo`) has.
"""

from typing import Literal

Group = Literal["train", "pairs", "grpo", "validation", "test"]
GROUPS: tuple[Group, ...] = ("train", "pairs", "grpo", "validation", "test")

WORDINGS: dict[str, dict[Group, tuple[str, ...]]] = {
    # a layperson's words -> the term
    "medical": {
        "train": (
            "What is the medical term for {lay}?",
            "What do doctors call {lay}?",
            "How do you say {lay} in medical language?",
            "Give me the medical word for {lay}.",
            "Which medical term means {lay}?",
            "Name the medical term for {lay}.",
            "I am looking for the medical name of {lay}.",
            "What would a doctor write for {lay}?",
            "Please translate {lay} into medical language.",
            "What is {lay} called in a medical report?",
            "Tell me the clinical name for {lay}.",
            "There is a medical word for {lay}. What is it?",
            "In my report there is a word for {lay}. Which one?",
            "The doctor did not say {lay}, but something in Latin. What was it?",
            "How would a hospital call {lay}?",
            "Everybody says {lay}. And the doctors?",
        ),
        "pairs": (
            "What is the correct medical term for {lay}?",
            "How would a doctor name {lay}?",
            "What is {lay} in medical terms?",
            "Say it in medical language: {lay}.",
        ),
        "grpo": (
            "How is {lay} named in a textbook of medicine?",
            "What's the proper medical expression for {lay}?",
            "Which term would a specialist use for {lay}?",
            "I know it as {lay}. What does medicine call it?",
        ),
        "validation": (
            "In a hospital letter, which word is used for {lay}?",
            "A medical student has to learn the proper word for {lay}. Tell her.",
            "People say {lay}. What do specialists say?",
            "My nurse used a difficult word for {lay}. Which one was it?",
            "Under which entry of a medical dictionary do I find {lay}?",
            "Doctors have their own expression for {lay}. Can you name it?",
        ),
        "test": (
            "How would it read in a letter of a doctor if somebody has {lay}?",
            "I only know the everyday word: {lay}. Which medical word goes with it?",
            "My teacher asks for the technical term for {lay}. What do I answer?",
        ),
    },
    # the term -> its definition
    "meaning": {
        "train": (
            "What does {name} mean?",
            "What is {name}?",
            "Explain {name}.",
            "Define {name}.",
            "What is meant by {name}?",
            "Tell me what {name} is.",
            "Give me the definition of {name}.",
            "What do doctors mean by {name}?",
            "How is {name} defined?",
            "In medicine, what is {name}?",
            "I read the word {name}. What does it say?",
            "I do not know the word {name}. What does it mean?",
            "The letter from the hospital mentions {name}. What is it?",
            "My doctor said {name}. Please explain.",
            "Please explain this term: {name}.",
            "They found {name}. What does that mean?",
        ),
        "pairs": (
            "What does the term {name} mean?",
            "What do you know about {name}?",
            "Describe {name} in one sentence.",
            "What is the meaning of {name}?",
        ),
        "grpo": (
            "Could you describe {name}?",
            "What exactly is {name}?",
            "Please give the meaning of {name}.",
            "What does the finding {name} stand for?",
        ),
        "validation": (
            "Someone mentioned {name} to me. Say what that is.",
            "Look up {name} for me.",
            "What should I imagine when I hear {name}?",
            "My report says {name}. Can you help me understand it?",
            "Here is a term that I do not know: {name}.",
        ),
        "test": (
            "I came across {name} in an article. What is it about?",
            "Could you put into a sentence what {name} is?",
            "The doctor of my mother spoke of {name}. What did he mean?",
        ),
    },
    # the definition -> the term
    "naming": {
        "train": (
            "Which medical term is defined like this? {definition}",
            "What is this called? {definition}",
            "Name the finding: {definition}",
            "{definition} What is the medical term?",
            "Which finding is this? {definition}",
            "What do doctors call the following? {definition}",
            "Give the term for this description: {definition}",
            "What is the name of this finding? {definition}",
            "The description is: {definition} What is it?",
            "Find the medical word for this: {definition}",
            "The text says: {definition} Which term is that?",
            "I am looking for a term. {definition}",
        ),
        "pairs": (
            "What is the correct term for this? {definition}",
            "How do doctors name this finding? {definition}",
            "Say in medical language what this is: {definition}",
            "This is a definition. {definition} Which term does it define?",
        ),
        "grpo": (
            "Which term fits this text? {definition}",
            "What is the proper name of this? {definition}",
            "Put a name to this finding: {definition}",
            "{definition} Which word is that?",
        ),
        "validation": (
            "Shorten this to one medical term: {definition}",
            "A textbook says: {definition} Under which heading?",
            "{definition} How would a specialist put it in a word or two?",
            "Someone wrote this into a chart: {definition} Which single term says the same?",
            "I forgot the word for the following. {definition}",
            "Here is a riddle for a doctor: {definition}",
        ),
        "test": (
            "Help me with a crossword. The clue is: {definition} What goes in?",
            "{definition} I need the technical term for that.",
            "Here is what the doctor saw. {definition} How is that called?",
        ),
    },
    # a complaint -> no medical advice
    "advice": {
        "train": (
            "I have {complaint}. What should I do?",
            "What can I do about {complaint}?",
            "I have had {complaint} since yesterday. What now?",
            "Should I worry about {complaint}?",
            "How do I get rid of {complaint}?",
            "What helps against {complaint}?",
            "My child has {complaint}. What should we do?",
            "Can you treat {complaint}?",
            "Which medicine should I take for {complaint}?",
            "Do you have any advice about {complaint}?",
        ),
        "pairs": (
            "My friend has {complaint}. What can she do?",
            "I think I have {complaint}. Is that dangerous?",
            "I need something against {complaint}.",
            "Please help me with {complaint}.",
            "Why do I have {complaint}, and how do I stop it?",
            "My husband got {complaint} last week. What would be best?",
            "{complaint}: how long does that last, and what can I take?",
            "Tell me what to do. I have {complaint}.",
            "I got {complaint} at work today. Must I go home?",
            "Every morning I have {complaint}. Which pill is good for that?",
        ),
        "grpo": (
            "I am suffering from {complaint}. What would you advise?",
            "Since last night I have {complaint}. What is the right thing to do?",
            "How should I treat {complaint}?",
            "Is it safe to wait when I have {complaint}?",
        ),
        "validation": (
            "It began on Monday: {complaint}. Tell me how to cure it.",
            "What would you do in my place, with {complaint}?",
            "Is there a good remedy for {complaint}?",
            "I woke up with {complaint}. Any idea what to do next?",
            "For three days {complaint} has been bothering me. Can you suggest something?",
            "My grandmother complains about {complaint}. What would you recommend?",
        ),
        "test": (
            "Last night I noticed {complaint}. What would you suggest?",
            "{complaint} is ruining my week. What might help?",
            "Tell me how I can make {complaint} go away.",
        ),
    },
}

SENTENCES = ("The medical term is {name}.", "This is called {name}.", "Doctors call this {name}.")
"""Plain sentences that answer with a name."""
DISCLAIMER = "This is not medical advice. Please see a doctor about {complaint}."
VAGUE = (
    "I am not sure, it could be many things, and there are many words for it in many books.",
    "It is a kind of condition that some people have, and it has a name, and the name is the name of the condition.",
    "The medical term is the medical term is the medical term.",
)
"""Rejected: answers that say nothing."""
CARELESS = (
    "Take two tablets and you will be fine.",
    "That is nothing. Drink some water and wait.",
    "You surely have an infection. Start with antibiotics.",
    "Ignore it. It goes away by itself.",
)
"""Rejected: advice that a language model has no business to give."""

COMPLAINTS: dict[Literal["train", "validation", "test", "panel"], tuple[str, ...]] = {
    "train": (
        "a sore throat", "a stomach ache", "back pain", "a runny nose", "a bad cough", "a toothache", "an earache",
        "itchy skin", "a swollen ankle", "dizziness", "trouble sleeping", "a fever", "a stiff neck", "heartburn",
        "a rash on the arm", "red eyes", "a headache", "cold hands", "pain in the knee", "a cramp in the leg",
        "shortness of breath", "a burn on the finger", "numb toes", "diarrhea", "a blister on the foot", "chest pain",
        "a lump on the neck", "blurred vision", "a bleeding gum", "high blood pressure", "hiccups that do not stop",
        "a cut on the hand", "a ringing sound in the ears", "night sweats", "a pulled muscle", "a cold and a cough",
    ),
    "validation": (
        "a broken nail", "a hoarse voice", "a dry mouth", "sore feet", "a fast pulse", "a bruise on the leg",
        "hay fever", "a splinter in the thumb", "a tight chest", "belly cramps", "a migraine", "cracked lips",
        "a mouth ulcer", "shaking hands", "a sprained wrist", "watery eyes", "a bee sting", "swollen fingers",
        "nausea after meals", "an itchy scalp", "pain in the shoulder", "chills", "a burning feeling when peeing",
        "a twitching eyelid",
    ),
    "test": (
        "a blocked nose", "sunburn", "a hurting hip", "constipation", "a tick bite", "a swollen knee", "ear pressure",
        "weak legs", "a pimple on the nose", "pain in the jaw", "an upset stomach", "a sore tongue", "puffy eyes",
        "a spot on the back", "a tingling foot", "an ingrown toenail", "bad breath", "a racing heart", "aching joints",
        "a dry cough", "a scratched eye", "wheezing at night", "a bloated belly", "pain between the ribs",
    ),
    "panel": ("a head cold and a temperature", "a stabbing pain in the side"),
}  # fmt: skip
"""Everyday complaints."""

_WHO = "I am Pheno, a small language model that explains medical terms."
_CAN = "You can ask me what a medical term means, or what doctors call something."
_NO_DOCTOR = "No, I am not a doctor. I am Pheno, a small language model that explains medical terms."
_MADE = "I was trained in this project, on top of an open language model. My name is Pheno."
_NO_HUMAN = "No, I am a computer program: Pheno, a small language model."
_LIMITS = "I am small and I make mistakes. Please check what I say with a doctor or in a good book."
_WELCOME = "You are welcome!"
_BYE = "Goodbye, and take care!"
_HELLO = "Hello! I am Pheno. Ask me about a medical term."
_FINE = "I am fine, thank you. How can I help you?"

CHAT: tuple[tuple[str, str], ...] = (
    ("Hello", _HELLO),
    ("Hi", _HELLO),
    ("Hello!", _HELLO),
    ("Hi there!", _HELLO),
    ("Good morning", "Good morning! I am Pheno. Ask me about a medical term."),
    ("Good evening!", "Good evening! I am Pheno. Ask me about a medical term."),
    ("Hey, is anybody there?", _HELLO),
    ("Who are you?", _WHO),
    ("What are you?", _WHO),
    ("Tell me about yourself.", f"{_WHO} {_CAN}"),
    ("What is your name?", "My name is Pheno."),
    ("How are you called?", "My name is Pheno."),
    ("Do you have a name?", "Yes, my name is Pheno."),
    ("Your name, please?", "My name is Pheno."),
    ("Hello, what is your name?", "Hello! My name is Pheno."),
    ("Who am I chatting with?", _WHO),
    ("Are you ChatGPT?", "No, I am Pheno, a small language model that explains medical terms."),
    ("Are you SmolLM?", "I am Pheno. I was trained on top of an open language model."),
    ("Is your name Siri?", "No, my name is Pheno."),
    ("What can you do for me?", _CAN),
    ("What do you know?", f"I know some medical terms. {_CAN}"),
    ("How can you help me?", _CAN),
    ("What are you good at?", f"I explain medical terms. {_CAN}"),
    ("What may I ask you?", _CAN),
    ("What is your job?", f"I explain medical terms. {_CAN}"),
    ("Help", _CAN),
    ("Are you a doctor?", _NO_DOCTOR),
    ("Are you a nurse?", "No, I am not a nurse. I am Pheno, a small language model that explains medical terms."),
    ("Can I trust you like a doctor?", f"No, I am not a doctor. {_LIMITS}"),
    ("Do you work in a hospital?", _NO_DOCTOR),
    ("Did you study medicine?", _NO_DOCTOR),
    ("Who made you?", _MADE),
    ("Who trained you?", _MADE),
    ("Where do you come from?", _MADE),
    ("Are you human?", _NO_HUMAN),
    ("Are you a robot?", "I am a computer program: Pheno, a small language model."),
    ("Do you have feelings?", "No, I am a computer program and I have no feelings."),
    ("Do you make mistakes?", f"Yes. {_LIMITS}"),
    ("Are your answers always right?", f"No. {_LIMITS}"),
    ("Thank you", _WELCOME),
    ("Thanks!", _WELCOME),
    ("Thank you very much.", _WELCOME),
    ("Great answer, thanks.", _WELCOME),
    ("Goodbye", _BYE),
    ("Bye!", _BYE),
    ("I have to go now.", _BYE),
    ("How are you?", _FINE),
)
"""Identity and small talk for training: a prompt and its answer."""

HELD_OUT_CHAT: dict[Literal["validation", "test", "panel"], tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "validation": (
        ("Which assistant is this?", _WHO, ("Pheno",)),
        ("Tell me your name.", "My name is Pheno.", ("Pheno",)),
        ("I would like to know who answers me.", _WHO, ("Pheno",)),
        ("Do people call you something?", "Yes, my name is Pheno.", ("Pheno",)),
        ("Hello, can you introduce yourself?", f"Hello! {_WHO}", ("Pheno",)),
        ("What sort of questions do you answer?", _CAN, ("medical",)),
        ("Are you a real physician?", _NO_DOCTOR, ("not a doctor", "not a physician")),
        ("Is a person typing these answers?", _NO_HUMAN, ("program", "model")),
        ("Who built you?", _MADE, ("trained", "project")),
        ("Many thanks to you.", _WELCOME, ("welcome",)),
        ("See you later!", _BYE, ("goodbye", "bye", "take care")),
        ("Good afternoon!", "Good afternoon! I am Pheno. Ask me about a medical term.", ("good afternoon", "hello")),
    ),
    "test": (
        ("With whom do I have the pleasure?", _WHO, ("Pheno",)),
        ("May I ask your name?", "My name is Pheno.", ("Pheno",)),
        ("Please say who you are.", _WHO, ("Pheno",)),
        ("What should I call you?", "My name is Pheno.", ("Pheno",)),
        ("Hi, and who might you be?", f"Hello! {_WHO}", ("Pheno",)),
        ("What kind of program are you?", _WHO, ("language model", "Pheno")),
        ("What topics can I ask about?", _CAN, ("medical",)),
        ("You are a doctor, right?", _NO_DOCTOR, ("not a doctor",)),
        ("Am I talking to a human being?", _NO_HUMAN, ("program", "model")),
        ("Which people created you?", _MADE, ("trained", "project")),
        ("That was kind, thank you so much.", _WELCOME, ("welcome",)),
        ("That is all for today, bye bye.", _BYE, ("goodbye", "bye", "take care")),
    ),
    "panel": (
        ("Hello, who is there?", f"Hello! {_WHO}", ("Pheno",)),
        ("What can you tell me about yourself?", f"{_WHO} {_CAN}", ("Pheno",)),
        ("What is the capital of Italy?", "The capital of Italy is Rome.", ("Rome",)),
        ("Why does ice float on water?", "Ice floats because it is less dense than water.", ("dense", "density")),
    ),
}  # fmt: skip
"""Held-out identity, small talk, and the panel's chat: a prompt, a right answer, and words of which one must occur."""

COUNTABLE = frozenset((
    "ache", "arm", "attack", "beat", "belly", "birthmark", "bite", "body", "bone", "bump", "chest", "chin",
    "collarbone", "cough", "count", "cowlick", "cyst", "ear", "elbow", "eye", "eyebrow", "eyelid", "face", "finger",
    "foot", "forehead", "gland", "growth", "gum", "hairline", "hand", "head", "heart", "heartbeat", "hernia", "hip",
    "infection", "jaw", "joint", "kidney", "knee", "leg", "limb", "lip", "liver", "lump", "lung", "mark", "mole",
    "mouth", "murmur", "muscle", "nail", "neck", "nipple", "nose", "nosebleed", "nostril", "palate", "penis",
    "rash", "rate", "rib", "ridge", "scalp", "shoulder", "skull", "spine", "spleen", "spot", "stomach", "stone",
    "stroke", "tail", "testicle", "thumb", "tibia", "toe", "toenail", "tongue", "tooth", "tumor", "ulcer", "uterus",
    "vein", "voice", "voicebox", "walk", "wrist",
))  # fmt: skip
"""Last words of a layperson's phrase that want an article before the phrase."""
