"""The words of the toy language, their forms, and which of them meet in the pairs alone.

In each list the commoner words come first, for a word's rank decides how often it is drawn.
"""

import zlib


def table_of(text):
    """{word: form} of a text "word:form word:form"."""
    return dict(pair.split(":") for pair in text.split(" "))


GIRLS = "Anna Mia Ella Ruth Lily Nora Clara Ida Vera Olga Maud Greta".split(" ")
BOYS = "Tom Ben Max Paul Leo Karl Hugo Otto Finn Emil Ralf Knut".split(" ")
PEOPLE = (
    "girl boy woman man child farmer doctor teacher baker king queen sailor painter miller guard "
    "neighbour cousin stranger pilot clown"
).split(" ")
GENDERS = {"girl": "she", "woman": "she", "queen": "she", "boy": "he", "man": "he", "king": "he"}
OBJECT_PRONOUNS = {"he": "him", "she": "her", "it": "it", "they": "them"}
REFLEXIVES = {"he": "himself", "she": "herself", "it": "itself", "they": "themselves"}
ANIMALS = (
    "dog cat horse bird mouse goose fox sheep rabbit wolf duck bear frog cow pig owl hen goat lion "
    "turtle calf ox deer hare snake"
).split(" ")
THINGS = (
    "ball book apple stone box cup leaf knife hat key lamp rope loaf coin drum shoe basket letter "
    "candle brush kite spoon shelf bell"
).split(" ")
PLACES = (
    "house garden river road hill forest school market bridge kitchen field tower lake church barn "
    "harbour mill valley"
).split(" ")
PLURALS = table_of(
    "woman:women man:men child:children mouse:mice goose:geese sheep:sheep deer:deer wolf:wolves "
    "calf:calves ox:oxen leaf:leaves knife:knives loaf:loaves shelf:shelves"
)
ADJECTIVES = (
    "small old big young quiet happy black white brown tired clever funny hungry strange lonely "
    "gentle proud clumsy angry brave pale lazy shy odd"
).split(" ")
THING_ADJECTIVES = (
    "small old big new red heavy broken green empty blue pretty dusty yellow round lost golden "
    "plain cheap wooden dirty"
).split(" ")
ACTS = (
    "run sleep wait jump sing rest play laugh hide swim dance fall cry smile sneeze shout wander "
    "stumble whistle tremble yawn kneel"
).split(" ")
HANDLING = "carry find hold want drop take bring lose break throw hide steal paint mend".split(" ")
MEETING = "see like follow watch help call chase know meet feed love visit fear teach".split(" ")
PASTS = table_of(
    "run:ran sleep:slept sing:sang hide:hid swim:swam fall:fell find:found hold:held take:took "
    "bring:brought lose:lost break:broke throw:threw steal:stole see:saw know:knew meet:met feed:fed "
    "teach:taught kneel:knelt drop:dropped go:went give:gave wake:woke leave:left eat:ate have:had"
)
PEOPLE_ONLY = set("sing laugh smile shout whistle paint mend teach visit".split(" "))
DEMONSTRATIVES = ("this", "that", "these", "those")
NEAR = "near behind beside under above".split(" ")
# Each category of nouns: its nouns, and the adjectives that go with them.
CATEGORIES = {
    "person": (PEOPLE, ADJECTIVES),
    "animal": (ANIMALS, ADJECTIVES),
    "thing": (THINGS, THING_ADJECTIVES),
    "place": (PLACES, THING_ADJECTIVES),
}


def with_s(word):
    """The regular form in -s: the plural of a noun, or the third person of a verb."""
    if word.endswith("y") and word[-2] not in "aeou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "o")) else "s")


def plural(noun):
    return PLURALS.get(noun) or with_s(noun)


def past(verb):
    if verb in PASTS:
        return PASTS[verb]
    if verb.endswith("y") and verb[-2] not in "aeou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def held_out(*words):
    """Whether these words, in their base forms, may meet in the minimal pairs alone.

    They are a noun and a verb, or a demonstrative and a noun. Their checksum decides: a fifth of
    all combinations is held out of the text, whatever the seed.
    """
    return zlib.crc32(" ".join(words).encode()) % 5 == 0
