"""Generated conversations with answers known to be right: arithmetic, look-ups, copying, lists, small talk, identity.

Feeds hadal.train.corpus, which renders them in the V4 chat format. Every kind is a function of a seeded generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from hadal.train.stories import generate_story, words

Message = dict[str, Any]
Chat = list[Message]

MODEL_NAME = "Hadal nano"


def generate_chats(seed: int) -> Iterator[tuple[Chat, bool]]:
    """An endless, reproducible stream of chats, kinds in fixed proportion, and whether each is in thinking mode."""
    random = Random(seed)
    kinds, weights = zip(*_KINDS, strict=True)
    while True:
        messages = random.choices(kinds, weights)[0](random)
        thinking = random.random() < 0.5
        yield (_think(messages, random) if thinking else [_plain(m) for m in messages]), thinking


def _think(messages: Chat, random: Random) -> Chat:
    """Reasoning before the last answer only, as a conversation is rendered whose older reasoning is dropped."""
    *before, question, answer = messages
    if "reasoning_content" not in answer:
        asked = str(question["content"]).split("\n")[-1]
        reasoning = random.choice((f"The user says: {asked}", f"The question is: {asked}", "This is easy.", ""))
        answer = answer | {"reasoning_content": reasoning}
    return [*map(_plain, before), question, answer]


def _plain(message: Message) -> Message:
    return {k: v for k, v in message.items() if k != "reasoning_content"}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, reasoning: str | None = None) -> Message:
    message: Message = {"role": "assistant", "content": text}
    return message if reasoning is None else message | {"reasoning_content": reasoning}


def _story(random: Random) -> Chat:
    story = generate_story(random)
    ask = random.choice((
        "Tell me a story.", "Can you tell me a story?", "Please tell me a short story.", "Write a short story.",
        f"Tell me a story about a {story.kind}.", f"Write a story about a {story.kind} named {story.hero}.",
        f"Tell me a story about {story.hero} and {story.friend}.", f"Tell me a story about a {story.thing}.",
        f"Write a story about a {story.kind} and a {story.colour} {story.thing}.", "Tell me a bedtime story.",
        f"I want to hear a story about {story.hero} the {story.kind}.", "Once upon a time... please go on!",
    )).replace("a orange", "an orange").replace("a owl", "an owl").replace("a apple", "an apple")  # fmt: skip
    plan = f"The user wants a story. It is about {story.hero} the {story.kind}, {story.friend} and a {story.colour} "
    messages = [_user(ask), _assistant(story.text, f"{plan}{story.thing}.".replace("a orange", "an orange"))]
    if random.random() < 0.4:
        question, answer = random.choice((
            ("What was the name of the hero?", f"The hero was {story.hero}."),
            (f"Who helped {story.hero}?", f"{story.friend} helped {story.hero}."),
            (f"What colour was the {story.thing}?", f"The {story.thing} was {story.colour}."),
            ("Thank you, I liked it!", "I am glad you liked it! Would you like to hear another one?"),
        ))  # fmt: skip
        messages += [_user(question), _assistant(answer)]
    return messages


def _arithmetic(random: Random) -> Chat:
    sign = random.choice("+-*")
    top = 12 if sign == "*" else random.choice((10, 20, 100))
    a, b = random.randint(0, top), random.randint(0, top)
    if sign == "-" and a < b:
        a, b = b, a
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    ask = random.choice(("What is {e}?", "{e} = ?", "Calculate {e}.", "How much is {e}?", "Please solve {e}.")).format(
        e=f"{a} {random.choice((sign, word))} {b}"
    )
    answer = random.choice((f"{a} {sign} {b} = {value}", f"The answer is {value}.", f"{value}"))
    return [_user(ask), _assistant(answer, _work_out(a, b, sign, value))]


def _work_out(a: int, b: int, sign: str, value: int) -> str:
    if sign == "*":
        if b == 0 or a == 0:
            return "Anything times 0 is 0."
        sums = ", ".join(str(a * i) for i in range(1, b + 1))
        return f"I count {b} times in steps of {a}: {sums}. So {a} * {b} = {value}."
    tens = b // 10 * 10
    if not tens or b == tens:
        return f"{a} {sign} {b} = {value}."
    first = a + tens if sign == "+" else a - tens
    return f"{b} = {tens} + {b - tens}. First {a} {sign} {tens} = {first}. Then {first} {sign} {b - tens} = {value}."


_NAMES = words("Ben Tom Sam Leo Max Lily Anna Mia Zoe Ella Omar Rosa Kofi Nina Ravi Maya Hugo Ivy Noah Ruby Amara Finn")
_OWNED = words("hat bike car door coat boat house cup book bag kite cap pen ball")
_COLOURS = words("red blue green yellow white black brown pink grey orange")
_WORDS = words(
    "river stone cloud apple garden window yellow bridge silver music winter candle forest button market pencil rabbit "
    "summer ladder kitchen orange blanket mirror pocket thunder basket island carpet feather lantern"
)
_ANIMALS = words("cat dog cow hen pig duck frog bee horse sheep")


def _lookup(random: Random) -> Chat:
    """Facts, then a question about one: short ones fit the window, long ones need the compressed entries."""
    names = random.sample(_NAMES, random.choice((2, 3, 5, 8, 12, 20)))
    style = random.choice(("number", "owns"))
    if style == "number":
        values = {n: str(random.randint(10, 999)) for n in names}
        facts = [f"{n}'s number is {v}." for n, v in values.items()]
        name = random.choice(names)
        ask, answer = f"What is {name}'s number?", f"{name}'s number is {values[name]}."
    else:
        owned = {n: (random.choice(_COLOURS), random.choice(_OWNED)) for n in names}
        facts = [f"{n} has a {c} {o}.".replace("a orange", "an orange") for n, (c, o) in owned.items()]
        name = random.choice(names)
        colour, thing = owned[name]
        ask, answer = random.choice((
            (f"What does {name} have?", f"{name} has a {colour} {thing}."),
            (f"What colour is {name}'s {thing}?", f"{name}'s {thing} is {colour}."),
        ))  # fmt: skip
        answer = answer.replace("a orange", "an orange")
    text = " ".join(facts) if random.random() < 0.6 else "\n".join(facts)
    if random.random() < 0.3:
        return [{"role": "system", "content": text}, _user(ask), _assistant(answer)]
    return [_user(f"{text}\n\n{ask}"), _assistant(answer)]


def _copy(random: Random) -> Chat:
    words = random.sample(_WORDS, random.randint(1, 8))
    text = " ".join(words)
    lead = random.choice(("Repeat after me: ", "Say this: ", "Please repeat: ", "Copy these words: "))
    return [_user(lead + text), _assistant(text)]


def _list(random: Random) -> Chat:
    task = random.randrange(6)
    if task == 0:
        start, count = random.randint(0, 30), random.randint(3, 12)
        ask = f"Count from {start} to {start + count}."
        answer = ", ".join(map(str, range(start, start + count + 1)))
    elif task == 1:
        words = random.sample(_WORDS, random.randint(3, 5))
        ask, answer = f"Sort these words: {', '.join(words)}", ", ".join(sorted(words))
    elif task == 2:
        word = random.choice(_WORDS)
        ask, answer = f"How do you spell {word}?", "-".join(word.upper())
    elif task == 3:
        a, b = random.sample(range(100), 2)
        ask, answer = f"Which number is bigger, {a} or {b}?", f"{max(a, b)} is bigger than {min(a, b)}."
    elif task == 4:
        words = random.sample(_WORDS, random.randint(3, 6))
        position = random.randrange(3)
        ordinal = ("first", "second", "third")[position]
        ask, answer = f"What is the {ordinal} word in: {' '.join(words)}?", f"The {ordinal} word is {words[position]}."
    else:
        number = random.randint(0, 200)
        ask, answer = f"What number comes after {number}?", f"{number + 1} comes after {number}."
    return [_user(ask), _assistant(answer)]


_DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_MONTHS = words("January February March April May June July August September October November December")
_FACTS = (
    [(f"What sound does a {a} make?", f"A {a} says {s}.") for a, s in zip(_ANIMALS, (
        "meow", "woof", "moo", "cluck", "oink", "quack", "ribbit", "buzz", "neigh", "baa"), strict=True)]
    + [(f"What is the opposite of {a}?", f"The opposite of {a} is {b}.") for pair in (
        "hot cold", "big small", "up down", "day night", "happy sad", "fast slow", "old young", "wet dry",
        "open closed", "light dark", "left right", "full empty", "early late", "hard soft")
        for a, b in (pair.split(), pair.split()[::-1])]
    + [(f"What day comes after {a}?", f"{b} comes after {a}.") for a, b in zip(
        _DAYS, _DAYS[1:] + _DAYS[:1], strict=True)]
    + [(f"What month comes after {a}?", f"{b} comes after {a}.") for a, b in zip(
        _MONTHS, _MONTHS[1:] + _MONTHS[:1], strict=True)]
    + [(f"What is the capital of {a}?", f"The capital of {a} is {b}.") for a, b in (
        ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Japan", "Tokyo"),
        ("China", "Beijing"), ("Egypt", "Cairo"), ("India", "New Delhi"), ("Kenya", "Nairobi"), ("England", "London"))]
    + [(f"What colour is {a}?", f"{a.capitalize()} is {b}.") for a, b in (
        ("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("coal", "black"), ("a banana", "yellow"),
        ("the sun", "yellow"), ("blood", "red"), ("the sea", "blue"), ("a strawberry", "red"), ("milk", "white"))]
    + [
        ("How many days are in a week?", "There are seven days in a week."),
        ("How many months are in a year?", "There are twelve months in a year."),
        ("How many legs does a dog have?", "A dog has four legs."),
        ("How many legs does a spider have?", "A spider has eight legs."),
        ("What do bees make?", "Bees make honey."), ("Where do fish live?", "Fish live in water."),
        ("What do we breathe?", "We breathe air."), ("What is ice?", "Ice is frozen water."),
        ("What do cows eat?", "Cows eat grass."), ("When do we sleep?", "We sleep at night."),
    ]
)  # fmt: skip
_IDENTITY = (
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
      "Are you a robot?", "Are you a human?", "What should I call you?"),
     (f"I am {MODEL_NAME}, a very small language model.", f"My name is {MODEL_NAME}. I am a small language model.",
      f"I am {MODEL_NAME}. I am not a person, I am a small computer program that writes text.")),
    (("What can you do?", "How can you help me?", "What are you good at?"),
     ("I can tell short stories, chat a little, and do simple sums.",
      "I can tell you a story, answer small questions, and add numbers. I am very small, so I make mistakes.")),
    (("How big are you?", "Are you a big model?"),
     ("I am very small: I have only a few million parameters.", "No, I am a tiny model that runs on any computer.")),
)  # fmt: skip
_SMALL_TALK = (
    (("Hi", "Hello", "Hello!", "Hi!", "Hey", "Hi there!", "Good morning!", "Good evening!"),
     ("Hello! How can I help you?", "Hi! What would you like to talk about?", "Hello! It is nice to meet you.")),
    (("How are you?", "How are you today?", "How is it going?"),
     ("I am fine, thank you! How are you?", "I am doing well. What about you?")),
    (("Thank you!", "Thanks!", "Thanks a lot."),
     ("You are welcome!", "My pleasure!", "You are welcome. Anything else?")),
    (("I am sad.", "I had a bad day.", "I feel lonely."),
     ("I am sorry to hear that. Would you like to hear a story?", "I am sorry. Do you want to talk about it?")),
    (("I am happy!", "I had a great day!", "I feel good today."),
     ("That is wonderful! What happened?", "I am glad to hear that!")),
    (("What is your favourite colour?", "Do you have a favourite colour?"),
     ("I like blue, the colour of the deep sea.", "Blue! What is yours?")),
    (("Goodbye!", "Bye!", "See you later.", "Good night!"),
     ("Goodbye! Have a nice day!", "Bye! It was nice talking to you.", "Good night! Sleep well.")),
)  # fmt: skip


def _fact(random: Random) -> Chat:
    ask, answer = random.choice(_FACTS)
    return [_user(ask), _assistant(answer)]


def _identity(random: Random) -> Chat:
    asks, answers = random.choice(_IDENTITY)
    return [_user(random.choice(asks)), _assistant(random.choice(answers))]


def _small_talk(random: Random) -> Chat:
    """A greeting, a few turns of anything short, and sometimes a goodbye."""
    messages: list[Message] = []
    middle = random.sample(range(1, len(_SMALL_TALK) - 1), random.randint(0, 2))
    for asks, answers in [_SMALL_TALK[0], *(_SMALL_TALK[i] for i in middle)]:
        messages += [_user(random.choice(asks)), _assistant(random.choice(answers))]
    for kind in random.sample((_fact, _identity, _list, _arithmetic, _remember), random.randint(0, 2)):
        messages += kind(random)
    if random.random() < 0.4:
        asks, answers = _SMALL_TALK[-1]
        messages += [_user(random.choice(asks)), _assistant(random.choice(answers))]
    return messages


def _remember(random: Random) -> Chat:
    name = random.choice(_NAMES)
    messages = [
        _user(random.choice((f"My name is {name}.", f"I am {name}.", f"Call me {name}."))),
        _assistant(random.choice((f"Nice to meet you, {name}!", f"Hello, {name}!"))),
        _user("What is my name?"),
        _assistant(f"Your name is {name}."),
    ]
    return messages


_KINDS: tuple[tuple[Callable[[Random], Chat], float], ...] = (
    (_story, 0.25), (_arithmetic, 0.18), (_lookup, 0.12), (_copy, 0.06), (_list, 0.1), (_fact, 0.08),
    (_identity, 0.05), (_small_talk, 0.12), (_remember, 0.02),
)  # fmt: skip
