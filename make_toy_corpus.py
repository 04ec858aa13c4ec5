"""A small invented corpus: OUT/train, OUT/dev in the BabyLM layout, and OUT/pairs to test on.

    python make_toy_corpus.py --out data/toy-text --words 200000

A probabilistic grammar of English with a lexicon of a few hundred words writes short stories,
dialogues and an encyclopedia, and minimal pairs of agreement, anaphora and determiners. Pairs are
held out by construction: whether a noun may meet a verb in the text or in the pairs alone is
settled once for every two words. Same seed, same bytes.
"""

import argparse
import json
import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from files import UserError, run, write_text

LEAST_WORDS = 1000
PAIRS_PER_PARADIGM = 200

# ---- lexicon: the commoner words first, for a word's rank decides how often it is drawn

GIRLS = "Anna Mia Ella Ruth Lily Nora Clara Ida Vera Olga Maud Greta".split(" ")
BOYS = "Tom Ben Max Paul Leo Karl Hugo Otto Finn Emil Ralf Knut".split(" ")
PEOPLE = (
    "girl boy woman man child farmer doctor teacher baker king queen sailor painter miller guard "
    "neighbour cousin stranger pilot clown"
).split(" ")
GENDERS = {"girl": "she", "woman": "she", "queen": "she", "boy": "he", "man": "he", "king": "he"}
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
PLURALS = {
    "woman": "women", "man": "men", "child": "children", "mouse": "mice", "goose": "geese",
    "sheep": "sheep", "deer": "deer", "wolf": "wolves", "calf": "calves", "ox": "oxen",
    "leaf": "leaves", "knife": "knives", "loaf": "loaves", "shelf": "shelves",
}  # fmt: skip
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
PASTS = {
    "run": "ran", "sleep": "slept", "sing": "sang", "hide": "hid", "swim": "swam", "fall": "fell",
    "find": "found", "hold": "held", "take": "took", "bring": "brought", "lose": "lost",
    "break": "broke", "throw": "threw", "steal": "stole", "see": "saw", "know": "knew",
    "meet": "met", "feed": "fed", "teach": "taught", "kneel": "knelt", "drop": "dropped",
}  # fmt: skip
NEAR = "near behind beside under above".split(" ")
KINDS = {
    "person": (PEOPLE, ADJECTIVES), "animal": (ANIMALS, ADJECTIVES),
    "thing": (THINGS, THING_ADJECTIVES), "place": (PLACES, THING_ADJECTIVES),
}  # fmt: skip


def ends_in_sibilant(word):
    return word.endswith(("s", "x", "ch", "sh"))


def with_s(word):
    """The regular -s form: of a noun its plural, of a verb its third person."""
    if word.endswith("y") and word[-2] not in "aeou":
        return word[:-1] + "ies"
    return word + ("es" if ends_in_sibilant(word) else "s")


def plural(noun):
    return PLURALS.get(noun) or with_s(noun)


def past(verb):
    if verb in PASTS:
        return PASTS[verb]
    if verb.endswith("y") and verb[-2] not in "aeou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def held_out(noun, verb):
    """Whether these two lemmas meet in the minimal pairs alone, never in text: a fifth of all."""
    return zlib.crc32(f"{noun} {verb}".encode()) % 5 == 0


# ---- grammar


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: its words, the lemma that heads it, its number, and the pronoun it takes."""

    words: str
    head: str
    many: bool
    pronoun: str

    @property
    def reflexive(self):
        return {"he": "himself", "she": "herself", "it": "itself", "they": "themselves"}[
            self.pronoun
        ]


class Grammar:
    """Draws phrases and sentences, `for_pairs` of held-out combinations, else of the others."""

    def __init__(self, seed, for_pairs=False):
        self.random, self.for_pairs = random.Random(seed), for_pairs

    def chance(self, probability):
        return self.random.random() < probability

    def word(self, words):
        """A word of a list, the earlier the likelier (Zipf's law)."""
        weights = [1 / (rank + 3) for rank in range(len(words))]
        return self.random.choices(words, weights)[0]

    def name(self):
        girl = self.chance(0.5)
        name = self.word(GIRLS if girl else BOYS)
        return Phrase(name, name, False, "she" if girl else "he")

    def noun(self, kind, many=None, determiner=None, adjective=0.3, head=None):
        """A common noun of a kind with determiner and perhaps an adjective."""
        nouns, adjectives = KINDS[kind]
        head = head or self.word(nouns)
        many = self.chance(0.4) if many is None else many
        if determiner is None:
            several = ("the", "the", "these", "those", "some", "two", "three", "many")
            single = ("the", "the", "a", "a", "this", "that", "every")
            determiner = self.random.choice(several if many else single)
        words = [self.word(adjectives)] if self.chance(adjective) else []
        words.append(plural(head) if many else head)
        if determiner == "a" and words[0][0] in "aeio":
            determiner = "an"
        pronoun = GENDERS.get(head) or self.random.choice(("he", "she"))
        pronoun = "they" if many else pronoun if kind == "person" else "it"
        return Phrase(" ".join([determiner, *words]), head, many, pronoun)

    def being(self, **options):
        """A person or an animal."""
        return self.noun("person" if self.chance(0.5) else "animal", **options)

    def verb(self, verbs, *nouns):
        """A verb that may meet all of the nouns here: held out where pairs are made, else not."""
        allowed = [v for v in verbs if all(held_out(n, v) == self.for_pairs for n in nouns)]
        return self.word(allowed) if allowed else None

    def finite(self, verb, subject, tense):
        """The form of a verb after a subject."""
        if tense == "past":
            return past(verb)
        return verb if subject.many else with_s(verb)

    def place(self):
        preposition = self.random.choice(("in", "at", *NEAR))
        return f"{preposition} {self.noun('place', many=False, determiner='the').words}"

    def modified(self, subject):
        """The subject, perhaps with a phrase or clause between it and its verb."""
        if self.chance(0.12):
            attractor = self.noun(self.random.choice(("thing", "place")), determiner="the")
            return f"{subject.words} {self.word(NEAR)} {attractor.words}"
        if self.chance(0.08):
            other = self.being(determiner="the")
            verb = self.verb(MEETING, other.head, subject.head)
            if verb:
                return f"{subject.words} that {other.words} {self.finite(verb, other, 'present')}"
        return subject.words

    def predicate(self, subject, tense):
        """A verb phrase for a subject: an act, a thing handled, someone met, or oneself."""
        which = self.random.random()
        if which < 0.4:
            words = self.finite(self.verb(ACTS, subject.head), subject, tense)
            return f"{words} {self.place()}" if self.chance(0.4) else words
        if which < 0.48 and subject.pronoun != "it":
            verb = self.verb(MEETING, subject.head)
            return f"{self.finite(verb, subject, tense)} {subject.reflexive}"
        thing = which < 0.75
        found = self.noun("thing") if thing else self.being() if self.chance(0.7) else self.name()
        verb = self.verb(HANDLING if thing else MEETING, subject.head, found.head)
        if verb is None:
            return self.predicate(subject, tense)
        return f"{self.finite(verb, subject, tense)} {found.words}"

    def clause(self, subject, tense, as_pronoun=False):
        words = subject.pronoun if as_pronoun else self.modified(subject)
        return f"{words} {self.predicate(subject, tense)}"


def sentence(words, mark="."):
    return words[0].upper() + words[1:] + mark


# ---- three registers


def story(grammar):
    """The lines of a story: one hero, a friend and a creature who come back, one tense."""
    tense = "past" if grammar.chance(0.35) else "present"
    hero, friend = grammar.name(), grammar.name()
    creature = grammar.being(determiner="the", adjective=0.0)
    first = "lived" if tense == "past" else "lives"
    verb = grammar.verb(HANDLING + MEETING, hero.head, creature.head) or "like"
    verb = grammar.finite(verb, hero, tense) if not held_out(hero.head, verb) else "has"
    a = grammar.noun("animal", many=False, determiner="a")
    lines = [f"{hero.words} {first} {grammar.place()}", f"{hero.words} {verb} {creature.words}"]
    lines.append(f"there {'was' if tense == 'past' else 'is'} {a.words} {grammar.place()}")
    cast = [hero, friend, creature]
    for _ in range(grammar.random.randint(3, 8)):
        subject = grammar.random.choice(cast)
        same = lines and lines[-1].startswith(subject.words)
        words = grammar.clause(subject, tense, as_pronoun=bool(same) and grammar.chance(0.7))
        if grammar.chance(0.2):
            other = grammar.random.choice(cast)
            joint = grammar.random.choice(("because", "and", "but", "when"))
            words = f"{words} {joint} {grammar.clause(other, tense)}"
        elif grammar.chance(0.1):
            says = "said" if tense == "past" else "says"
            words = f"{friend.words} {says} that {words}"
        lines.append(words)
    return [sentence(line) for line in lines]


def dialogue(grammar):
    """The turns of two speakers who ask and answer about the same things."""
    speakers = [grammar.name().words, grammar.name().words]
    turns = []
    for _ in range(grammar.random.randint(2, 5)):
        subject = grammar.being(determiner=grammar.random.choice(("the", "the", "this", "that")))
        if subject.many:
            subject = grammar.noun("animal", many=True, determiner="these", head=None)
        verb = grammar.verb(ACTS, subject.head)
        do, be = ("do", "are") if subject.many else ("does", "is")
        place = grammar.place()
        if grammar.chance(0.5):
            turns.append(sentence(f"{do} {subject.words} {verb} {place}", "?"))
            answer = f"yes, {subject.pronoun} {do}"
        else:
            turns.append(sentence(f"where {be} {subject.words}", "?"))
            answer = f"{subject.words} {be} {place}"
        turns.append(sentence(answer))
    return [f"{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)]


def entry(grammar):
    """The lines of an encyclopedia about one kind of being or thing."""
    kind = grammar.random.choice(("animal", "animal", "person", "thing"))
    head = grammar.word(KINDS[kind][0])
    one = grammar.noun(kind, many=False, determiner="a", adjective=0.0, head=head)
    lines = [f"{one.words} is {'an' if kind == 'animal' else 'a'} {kind}"]
    those = Phrase(plural(head), head, True, "they")
    for _ in range(grammar.random.randint(2, 5)):
        adjective = grammar.word(KINDS[kind][1])
        if kind == "thing":
            user = grammar.noun("person", determiner="the")
            verb = grammar.verb(HANDLING, user.head, head)
            lines.append(f"{those.words} are {adjective}")
            if verb:
                lines.append(f"{user.words} {grammar.finite(verb, user, 'present')} {those.words}")
        elif grammar.chance(0.3):
            lines.append(f"most {those.words} are {adjective}")
        else:
            subject = those if grammar.chance(0.5) else one
            lines.append(f"{subject.words} {grammar.predicate(subject, 'present')}")
    return [sentence(line) for line in lines]


REGISTERS = {"stories": (story, 0.6), "dialogues": (dialogue, 0.2), "encyclopedia": (entry, 0.2)}


def write_split(folder, split, words, seed):
    """Writes each register's share of `words` words as FOLDER/NAME.SPLIT."""
    for name, (compose, share) in REGISTERS.items():
        grammar = Grammar(f"{seed} {split} {name}")
        lines, count = [], 0
        while count < share * words:
            text = compose(grammar)
            count += sum(len(line.split()) for line in text)
            lines += [*text, ""] if name == "stories" else text
        write_text(folder / f"{name}.{split}", "\n".join(lines) + "\n")


# ---- minimal pairs: a paradigm gives the acceptable sentence and the other one


def agreement(grammar, between=""):
    """Subject and verb, with what stands between them: nothing, "near" a noun, or a clause."""
    many = grammar.chance(0.5)
    subject = grammar.being(many=many, determiner="the")
    words = subject.words
    if between == "near":  # the attractor has the other number
        words += f" {grammar.word(NEAR)} {grammar.noun('place', not many, 'the', 0.0).words}"
    if between == "that":
        other = grammar.being(many=not many, determiner="the", adjective=0.0)
        verb = grammar.verb(MEETING, other.head, subject.head)
        if verb is None:
            return agreement(grammar, between)
        words += f" that {other.words} {grammar.finite(verb, other, 'present')}"
    verb = grammar.verb(ACTS, subject.head)
    if verb is None:
        return agreement(grammar, between)
    good, bad = (verb, with_s(verb)) if many else (with_s(verb), verb)
    return f"{words} {good}.", f"{words} {bad}."


def question(grammar):
    many = grammar.chance(0.5)
    subject = grammar.being(many=many, determiner="the")
    verb = grammar.verb(ACTS, subject.head)
    if verb is None:
        return question(grammar)
    good, bad = ("do", "does") if many else ("does", "do")
    return tuple(f"{do} {subject.words} {verb}?" for do in (good, bad))


def anaphor(grammar, number):
    """A reflexive that agrees in number, or with a name in gender."""
    subject = grammar.noun("person", many=True, determiner="the") if number else grammar.name()
    verb = grammar.verb(MEETING, subject.head)
    if verb is None:
        return anaphor(grammar, number)
    one = grammar.random.choice(("himself", "herself"))
    wrong = {"themselves": one, "himself": "herself", "herself": "himself"}
    words, place = f"{subject.words} {grammar.finite(verb, subject, 'present')}", grammar.place()
    return tuple(f"{words} {r} {place}." for r in (subject.reflexive, wrong[subject.reflexive]))


def determiner(grammar, adjective):
    """A demonstrative and its noun, perhaps with an adjective between them."""
    many, subject = grammar.chance(0.5), grammar.name()
    chosen = grammar.random.choice(("these", "those") if many else ("this", "that"))
    found = grammar.noun("thing", many, chosen, adjective=float(adjective))
    verb = grammar.verb(HANDLING, subject.head, found.head)
    if verb is None:
        return determiner(grammar, adjective)
    words = f"{subject.words} {with_s(verb)} {found.words}"
    wrong = found.head if many else plural(found.head)
    return f"{words}.", f"{words.rsplit(' ', 1)[0]} {wrong}."


PARADIGMS = {
    "subject_verb_agreement": ("subject_verb_agreement", agreement),
    "agreement_across_a_phrase": ("subject_verb_agreement", lambda g: agreement(g, "near")),
    "agreement_across_a_clause": ("subject_verb_agreement", lambda g: agreement(g, "that")),
    "agreement_in_questions": ("subject_verb_agreement", question),
    "anaphor_gender_agreement": ("anaphor_agreement", lambda g: anaphor(g, number=False)),
    "anaphor_number_agreement": ("anaphor_agreement", lambda g: anaphor(g, number=True)),
    "determiner_noun_agreement": ("determiner_noun_agreement", lambda g: determiner(g, False)),
    "determiner_adjective_noun": ("determiner_noun_agreement", lambda g: determiner(g, True)),
}


def write_pairs(folder, seed):
    """Writes each paradigm's pairs, no sentence twice, in the layout of BLiMP's files."""
    for name, (term, compose) in PARADIGMS.items():
        grammar = Grammar(f"{seed} pairs {name}", for_pairs=True)
        pairs = {}
        while len(pairs) < PAIRS_PER_PARADIGM:
            good, bad = (sentence(words, mark="") for words in compose(grammar))
            if good != bad:  # sheep and deer have one form for both numbers
                pairs[good] = bad
        lines = [
            json.dumps(
                {
                    "sentence_good": good, "sentence_bad": bad, "field": "toy",
                    "linguistics_term": term, "UID": name, "pair_id": i,
                }
            )
            for i, (good, bad) in enumerate(pairs.items())
        ]  # fmt: skip
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument(
        "--words", type=int, default=200_000, metavar="N",
        help="of training text; dev has a tenth of it, and 2000 at least (default: 200000)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.words < LEAST_WORDS:
        raise UserError(f"--words {args.words}: at least {LEAST_WORDS}")
    out = Path(args.out)
    write_split(out / "train", "train", args.words, args.seed)
    write_split(out / "dev", "dev", max(args.words // 10, 2000), args.seed)
    write_pairs(out / "pairs", args.seed)
    print(f"written: {args.words:,} words of {', '.join(REGISTERS)}, and pairs, in {out}")


if __name__ == "__main__":
    sys.exit(run(main))
