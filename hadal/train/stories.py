"""Generated short stories in plain words: a seeded grammar of openings, wishes, troubles, helpers and endings.

Feeds hadal.train.synthetic. A model of a few million parameters learns to keep a hero, an object and a place apart
from many small stories that differ in exactly those, far sooner than from old novels.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


def words(text: str) -> list[str]:
    """A word list written as one line."""
    return text.split()


_PEOPLE = {
    "he": words("Ben Tom Sam Leo Max Tim Finn Jack Omar Ravi Kofi Hugo Noah Adam Luis"),
    "she": words("Lily Anna Mia Zoe Ella Rosa Nina Amara Lucy Ruby Maya Sara Ivy Emma Aisha"),
}
_ANIMALS = words("cat dog rabbit fox bear mouse duck frog hen owl pony turtle squirrel hedgehog goat")
_TRAITS = words("little brave shy kind curious happy clever gentle funny quiet hungry sleepy careful")
_PLACES = {
    "farm": "the barn", "village": "the well", "forest": "the tall oak", "town": "the old bridge",
    "valley": "the river", "garden": "the stone wall", "island": "the beach", "mountain": "the cave",
    "house by the sea": "the boat", "small red house": "the back door",
}  # fmt: skip
_PREPOSITIONS = {"farm": "on a", "mountain": "on a", "island": "on an"}
_THINGS = words("ball kite hat drum boat lamp cake flower bell book basket shell coin scarf cup toy key apple")
_COLOURS = words("red blue green yellow white golden silver brown purple orange")
_TIMES = ("One day", "One morning", "One sunny day", "One cold evening", "One afternoon", "Early one morning")
_WEATHER = ("The sun was warm", "A soft wind was blowing", "It had rained all night", "Snow lay on the ground",
            "The sky was blue", "The leaves were falling")  # fmt: skip
_OPENINGS = (
    "Once upon a time there was a {trait} {kind} named {hero}. {He} lived {at_home}.",
    "There once was a {trait} {kind} called {hero}, who lived {at_home}.",
    "{hero} was a {trait} {kind}. {He} lived {at_home} with {his} {family}.",
    "{At_home} there lived a {trait} {kind}. {His} name was {hero}.",
    "{hero} the {kind} was very {trait}. Every day {he} played near {spot}.",
)
_TROUBLES = {
    "lost": (
        "{time} {hero} could not find {his} {colour} {thing}. {He} looked under the bed. {He} looked behind the door. "
        "It was not there.",
        "{He} had a {colour} {thing} and loved it very much. {time} the {thing} was gone. {hero} began to cry.",
    ),
    "wish": (
        "{time} {hero} saw a {colour} {thing} near {spot}. {He} wanted it very much, but it was too high to reach.",
        "More than anything, {hero} wished for a {colour} {thing}. {time} {he} saw one, but it was too heavy to carry.",
    ),
    "broken": (
        "{time} {hero} was playing with a {colour} {thing}. It fell down and broke. {hero} was very sad.",
        "{hero} had a {colour} {thing} from {his} {family}. {time} {he} ran too fast, fell over it, and it broke.",
    ),
    "storm": (
        "{time} a big storm came. {hero} was far from home, near {spot}, and {he} was afraid. {He} held {his} {colour} "
        "{thing} tight.",
        "{time} the sky turned dark. The wind took the {colour} {thing} out of {hero}'s hands and blew it to {spot}.",
    ),
}
_HELPERS = (
    'Then {friend} the {friend_kind} came along. "Why are you so sad?" asked {friend}. {hero} told {friend} about '
    'the {thing}. "{offer}" said {friend}.',
    'Just then {he} met {friend}, a {friend_trait} {friend_kind}. "Can you help me, please?" asked {hero}. '
    '"{offer}" said {friend}.',
    '"Do not worry," said a voice. It was {friend} the {friend_kind}. "{offer}" {hero} felt a little better.',
    "{hero} walked and walked until {he} came to {spot}. There sat {friend}, a {friend_trait} {friend_kind}. "
    '"{offer}" said {friend} with a smile.',
)
_OFFERS = ("I will help you!", "Let us try together!", "Two friends are better than one!", "Of course I will help!",
           "Come with me, I know what to do!", "Do not be afraid, I am here!")  # fmt: skip
_FIXES = {
    "lost": (
        "They looked and looked. At last {friend} saw something {colour} near {spot}. It was the {thing}!",
        "Together they went to {spot}, and there was the {colour} {thing}, under some leaves.",
    ),
    "wish": (
        "{hero} stood on {friend}'s back and stretched as far as {he} could. Now {he} could touch the {thing}!",
        "They pulled and they pushed, one, two, three, and soon the {colour} {thing} was in {hero}'s hands.",
    ),
    "broken": (
        "They worked all day with string and glue. In the evening the {colour} {thing} was as good as new.",
        "{friend} held the pieces and {hero} put them together, one by one, until the {thing} was whole again.",
    ),
    "storm": (
        "They hid near {spot} until the rain stopped. When the sun came out, the {thing} was wet, but it was safe.",
        "They ran hand in hand through the wind. Soon they were home, warm and dry, with the {colour} {thing}.",
    ),
}
_THANKS = (
    '"Thank you!" said {hero}. "You are a good friend."',
    "{hero} laughed and gave {friend} a big hug.",
    '"I could not do it without you," said {hero}, and {friend} smiled.',
    "{hero} was so happy that {he} danced around {friend}.",
)
_ENDINGS = (
    "From that day on, {hero} and {friend} were best friends.",
    "They shared some bread and honey and watched the stars.",
    "That night {hero} slept well and dreamed of the {colour} {thing}.",
    "And {hero} never forgot that it is good to ask for help.",
    "After that, {hero} always took good care of the {thing}.",
    "The next day they met again and played until the sun went down.",
)
_FEELINGS = ("{He} was happy and {he} smiled all day.", "{weather}, and the birds were singing.", "{weather}.", "")


@dataclass(frozen=True)
class Story:
    """A generated story with the facts that a request for it may name."""

    title: str
    text: str
    hero: str
    kind: str
    friend: str
    thing: str
    colour: str
    place: str


def generate_story(random: Random) -> Story:
    """One story of about 90 to 125 words; the same generator state gives the same story."""
    he, name = _name(random)
    kind = random.choice(_ANIMALS) if random.random() < 0.6 else {"he": "boy", "she": "girl"}[he]
    friend_kind = random.choice([a for a in _ANIMALS if a != kind])
    friend = random.choice([n for names in _PEOPLE.values() for n in names if n != name])
    place, spot = random.choice(list(_PLACES.items()))
    trouble = random.choice(list(_TROUBLES))
    preposition = _PREPOSITIONS.get(place, "in a")
    slots = {
        "hero": name, "kind": kind, "he": he, "He": he.capitalize(), "trait": random.choice(_TRAITS),
        "his": {"he": "his", "she": "her"}[he], "His": {"he": "His", "she": "Her"}[he], "place": place, "spot": spot,
        "at_home": f"{preposition} {place}", "At_home": f"{preposition} {place}".capitalize(),
        "family": random.choice(("mother", "father", "grandmother", "sister", "brother", "family")),
        "friend": friend, "friend_kind": friend_kind, "friend_trait": random.choice(_TRAITS),
        "thing": random.choice(_THINGS), "colour": random.choice(_COLOURS), "time": random.choice(_TIMES),
        "weather": random.choice(_WEATHER), "offer": random.choice(_OFFERS),
    }  # fmt: skip
    paragraphs = (
        f"{random.choice(_OPENINGS)} {random.choice(_FEELINGS)}",
        random.choice(_TROUBLES[trouble]),
        random.choice(_HELPERS),
        f"{random.choice(_FIXES[trouble])} {random.choice(_THANKS)}",
        random.choice(_ENDINGS),
    )
    text = "\n\n".join(paragraph.format(**slots).strip() for paragraph in paragraphs)
    text = text.replace("a orange", "an orange").replace("a owl", "an owl")
    title = random.choice(("{hero} and the {colour} {thing}", "{hero} and {friend}", "The {colour} {thing}"))
    return Story(title.format(**slots), text, name, kind, friend, slots["thing"], slots["colour"], place)


def _name(random: Random) -> tuple[str, str]:
    he = random.choice(list(_PEOPLE))
    return he, random.choice(_PEOPLE[he])
