"""A small invented corpus: OUT/train, OUT/dev in the BabyLM layout, and OUT/pairs to test on.

    python make_toy_corpus.py --out data/toy-text --words 200000

A probabilistic grammar of English with a lexicon of a few hundred words writes short stories,
dialogues and an encyclopedia, and minimal pairs of agreement, anaphora and determiners. Pairs are
held out by construction: whether a noun may meet a verb, or a demonstrative, in the text or in the
pairs alone is settled once for every two words. Same seed, same bytes.
"""

import argparse
import json
import random
import sys
import zlib
from dataclasses import dataclass, replace
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
    "go": "went", "give": "gave", "wake": "woke", "leave": "left", "eat": "ate", "have": "had",
}  # fmt: skip
PEOPLE_ONLY = set("sing laugh smile shout whistle paint mend teach visit".split(" "))
DEMONSTRATIVES = ("this", "that", "these", "those")
NEAR = "near behind beside under above".split(" ")
KINDS = {
    "person": (PEOPLE, ADJECTIVES), "animal": (ANIMALS, ADJECTIVES),
    "thing": (THINGS, THING_ADJECTIVES), "place": (PLACES, THING_ADJECTIVES),
}  # fmt: skip


def with_s(word):
    """The regular -s form: of a noun its plural, of a verb its third person."""
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
    """Whether these lemmas, noun and verb or "these" and noun, meet in pairs alone: a fifth do."""
    return zlib.crc32(" ".join(words).encode()) % 5 == 0


# ---- grammar


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: its words, its number, its pronoun, and the lemmas of the nouns in it.

    The first lemma heads the phrase; the others stand between the head and what follows.
    """

    words: str
    lemmas: tuple
    many: bool
    pronoun: str
    kind: str = "person"

    @property
    def reflexive(self):
        forms = {"he": "himself", "she": "herself", "it": "itself", "they": "themselves"}
        return forms[self.pronoun]

    @property
    def object_pronoun(self):
        return {"he": "him", "she": "her", "it": "it", "they": "them"}[self.pronoun]


class Grammar:
    """Draws phrases and sentences, `for_pairs` of held-out combinations, else of the others."""

    def __init__(self, seed, stream, for_pairs=False):
        self.random, self.for_pairs = random.Random(f"{seed} {stream}"), for_pairs
        self.seed = seed

    def chance(self, probability):
        return self.random.random() < probability

    def word(self, words):
        """A word of a list, the earlier the likelier (Zipf's law)."""
        weights = [1 / (rank + 3) for rank in range(len(words))]
        return self.random.choices(words, weights)[0]

    def name(self, other_than=None):
        girl = self.chance(0.5)
        name = self.word(GIRLS if girl else BOYS)
        if other_than and name == other_than.words:
            return self.name(other_than)
        return Phrase(name, (name,), False, "she" if girl else "he")

    def noun(self, kind, many=None, determiner=None, adjective=0.3, head=None):
        """A common noun of a kind with determiner and perhaps an adjective."""
        nouns, adjectives = KINDS[kind]
        head = head or self.word(nouns)
        many = self.chance(0.4) if many is None else many
        if determiner is None:
            several = ("the", "the", "these", "those", "some", "two", "three", "many")
            single = ("the", "the", "a", "a", "this", "that", "every")
            determiner = self.random.choice(several if many else single)
        if determiner in DEMONSTRATIVES and held_out(determiner, head) and not self.for_pairs:
            determiner = "the"
        words = [self.word(adjectives)] if self.chance(adjective) else []
        words.append(plural(head) if many else head)
        if determiner == "a" and words[0][0] in "aeio":
            determiner = "an"
        pronoun = GENDERS.get(head) or self.random.choice(("he", "she"))
        pronoun = "they" if many else pronoun if kind == "person" else "it"
        return Phrase(" ".join([determiner, *words]), (head,), many, pronoun, kind)

    def being(self, **options):
        """A person or an animal."""
        return self.noun("person" if self.chance(0.5) else "animal", **options)

    def verb(self, verbs, subject, *objects):
        """A verb that may meet all of these here: held out where pairs are made, else not.

        None where there is no such verb.
        """
        lemmas = [lemma for phrase in (subject, *objects) for lemma in phrase.lemmas]
        allowed = [
            verb
            for verb in verbs
            if all(held_out(lemma, verb) == self.for_pairs for lemma in lemmas)
            and (subject.kind == "person" or verb not in PEOPLE_ONLY)
        ]
        return self.word(allowed) if allowed else None

    def finite(self, verb, subject, tense):
        """The form of a verb after a subject."""
        if verb == "be":
            several, single = ("were", "was") if tense == "past" else ("are", "is")
            return several if subject.many else single
        if tense == "past":
            return past(verb)
        return verb if subject.many else "has" if verb == "have" else with_s(verb)

    def place(self):
        preposition = self.random.choice(("in", "at", *NEAR))
        return f"{preposition} {self.noun('place', many=False, determiner='the').words}"

    def beside(self, subject, many=None, adjective=0.3):
        """The subject with a phrase behind it: "the dog near the houses"."""
        kind = "place" if self.for_pairs else self.random.choice(("thing", "place"))
        other = self.noun(kind, many, "the", adjective)
        words = f"{subject.words} {self.word(NEAR)} {other.words}"
        return replace(subject, words=words, lemmas=subject.lemmas + other.lemmas)

    def related(self, subject, many=None, tense="present"):
        """The subject with a clause behind it, "the dog that the cats see", or None."""
        other = self.being(many=many, determiner="the", adjective=0.1)
        verb = self.verb(MEETING, other, subject)
        if verb is None:
            return None
        words = f"{subject.words} that {other.words} {self.finite(verb, other, tense)}"
        return replace(subject, words=words, lemmas=subject.lemmas + other.lemmas)

    def predicate(self, subject, tense):
        """A verb phrase for a subject: an act, a thing handled, someone met, or oneself."""
        which = self.random.random()
        verb = words = None
        if which < 0.4:
            verb = self.verb(ACTS, subject)
            words = self.place() if self.chance(0.4) else ""
        elif which < 0.48 and subject.pronoun != "it":
            verb, words = self.verb(MEETING, subject), subject.reflexive
        elif which < 0.75:
            thing = self.noun("thing")
            verb, words = self.verb(HANDLING, subject, thing), thing.words
        else:
            met = self.being() if self.chance(0.7) else self.name()
            if met.lemmas[0] not in subject.lemmas:
                verb, words = self.verb(MEETING, subject, met), met.words
        if verb is None:
            return self.predicate(subject, tense)
        return f"{self.finite(verb, subject, tense)} {words}".strip()

    def clause(self, subject, tense):
        """Subject and predicate; between them perhaps a phrase or a clause (an attractor)."""
        which = self.random.random()
        if which < 0.14:
            subject = self.beside(subject)
        elif which < 0.24:
            subject = self.related(subject, tense=tense) or subject
        return f"{subject.words} {self.predicate(subject, tense)}"


def sentence(words, mark="."):
    return words[0].upper() + words[1:] + mark


# ---- three registers


# What happens in a story, in order: subject, verb, rest. HERO and FRIEND have names, CREATURE and
# THING recur, PLACE is one place in the whole story: who remembers the beginning knows the end.
PLOTS = [
    line.split("; ")
    for line in """
HERO lose THING PLACE; HERO look for THING; FRIEND find THING PLACE; FRIEND give THING to HERO
HERO find THING PLACE; FRIEND want THING; HERO give THING to FRIEND; FRIEND thank HERO
CREATURE be hungry; HERO go home; HERO bring a loaf; CREATURE eat the loaf; CREATURE be happy
CREATURE steal THING; HERO chase CREATURE; CREATURE drop THING PLACE; HERO take THING home
HERO break THING; HERO be sad; FRIEND mend THING; HERO thank FRIEND
CREATURE sleep PLACE; HERO drop THING; CREATURE wake; FRIEND laugh
FRIEND hide THING PLACE; HERO look for THING; CREATURE find THING PLACE; FRIEND be angry
HERO visit FRIEND; FRIEND be tired; HERO go home; FRIEND sleep PLACE
HERO fall PLACE; HERO cry; FRIEND help HERO; HERO thank FRIEND
FRIEND call HERO; HERO leave THING PLACE; CREATURE take THING; HERO be angry
""".strip().split("\n")
]  # fmt: skip


def plot(grammar, cast, place):
    """One of PLOTS as [(subject, verb, rest)], or None if a meeting in it is held out."""
    events = []
    for event in grammar.random.choice(PLOTS):
        subject, verb, *rest = event.split(" ")
        if not grammar.verb([verb], cast[subject], *(cast[word] for word in rest if word in cast)):
            return None
        events.append((subject, verb, [place if word == "PLACE" else word for word in rest]))
    return events


def told(grammar, event, cast, before, tense):
    """An event in words, with pronouns for those whom the event before was about."""
    who, verb, rest = event
    subject = cast[who]
    words = [subject.pronoun if before[:1] == (who,) and grammar.chance(0.7) else subject.words]
    words.append(grammar.finite(verb, subject, tense))
    for word in rest:
        known = before and word in before[2] and grammar.chance(0.5)
        other = cast.get(word)
        words.append((other.object_pronoun if known else other.words) if other else word)
    return " ".join(words)


def story(grammar):
    """The lines of a story: a hero, a friend, a creature and a thing, a plot, asides, one tense."""
    tense = "past" if grammar.chance(0.5) else "present"
    hero, thing, place = grammar.name(), grammar.noun("thing"), grammar.place()
    cast = {"HERO": hero, "FRIEND": grammar.name(hero), "CREATURE": grammar.being(determiner="the")}
    cast["THING"] = grammar.noun("thing", thing.many, "the", 0.0, *thing.lemmas)
    events, before = plot(grammar, cast, place), ()
    if events is None:
        return story(grammar)
    lines = [
        f"{hero.words} {grammar.finite('live', hero, tense)} {grammar.place()}",
        f"{hero.words} {grammar.finite('have', hero, tense)} {thing.words}",
        f"{cast['CREATURE'].words} {grammar.finite('be', cast['CREATURE'], tense)} {place}",
    ]
    for event in events:
        lines.append(told(grammar, event, cast, before, tense))
        before = event
        if grammar.chance(0.25):
            other = cast[grammar.random.choice(("HERO", "FRIEND", "CREATURE"))]
            joint = grammar.random.choice(("because", "and", "but", "when"))
            lines[-1] += f" {joint} {grammar.clause(other, tense)}"
            before = ()
        if grammar.chance(0.4):
            says = f"{cast['FRIEND'].words} {grammar.finite('say', cast['FRIEND'], tense)} that "
            aside = grammar.clause(grammar.being(), tense)
            lines.append((says if grammar.chance(0.2) else "") + aside)
            before = ()
    return [sentence(line) for line in lines]


def exchange(grammar):
    """A question and its answer, and perhaps a second of each, about one being or thing."""
    determiner = grammar.random.choice(("the", "this", "that"))
    kind = grammar.random.choice(("person", "animal", "thing"))
    several = {"the": "the", "this": "these", "that": "those"}[determiner]
    many = grammar.chance(0.4)
    subject = grammar.noun(kind, many, several if many else determiner)
    it, be = subject.pronoun, grammar.finite("be", subject, "present")
    do, place = "do" if many else "does", grammar.place()
    if kind == "thing" or grammar.chance(0.3):
        yield sentence(f"where {be} {subject.words}", "?")
        yield sentence(f"{it} {be} {place}")
        finder = grammar.name()
        verb = grammar.verb(HANDLING if kind == "thing" else MEETING, finder, subject)
        if verb and grammar.chance(0.5):
            yield sentence(f"who {past(verb)} {subject.object_pronoun}", "?")
            yield sentence(f"{finder.words} {past(verb)} {subject.object_pronoun} {place}")
        return
    verb, other = grammar.verb(ACTS, subject), grammar.verb(ACTS, subject)
    yield sentence(f"{do} {subject.words} {verb} {place}", "?")
    if verb == other or grammar.chance(0.5):
        yield sentence(f"yes, {it} {do}")
    else:
        yield sentence(f"no, {it} {grammar.finite(other, subject, 'present')} {place}")


def dialogue(grammar):
    """The turns of two speakers, who alternate."""
    first = grammar.name()
    speakers = (first.words, grammar.name(first).words)
    turns = [turn for _ in range(grammar.random.randint(1, 4)) for turn in exchange(grammar)]
    return [f"{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)]


def entry(grammar):
    """The lines of an encyclopedia about one noun. Its facts are the same wherever it is told."""
    kind = grammar.random.choice(("animal", "animal", "person", "thing", "place"))
    head = grammar.word(KINDS[kind][0])
    one = grammar.noun(kind, False, "a", 0.0, head)
    many = Phrase(plural(head), (head,), True, "they", kind)
    world = Grammar(grammar.seed, f"facts {head}")
    facts = [
        ("be", world.word(KINDS[kind][1])),
        ("be", world.word(KINDS[kind][1])),
    ]
    if kind in ("animal", "person"):
        facts += [("live", world.place()), (world.verb(ACTS, one), world.place())]
        facts += [(world.verb(ACTS, one), "")]
    lines = [f"{one.words} is {'an' if kind == 'animal' else 'a'} {kind}"]
    for verb, rest in grammar.random.sample(facts, grammar.random.randint(1, len(facts))):
        subject = grammar.random.choice((one, many))
        lines.append(f"{subject.words} {grammar.finite(verb, subject, 'present')} {rest}".strip())
    if kind in ("animal", "person"):
        subject = grammar.beside(many) if grammar.chance(0.4) else many
        lines.append(f"{subject.words} {grammar.predicate(subject, 'present')}")
    else:
        user = grammar.noun("person", determiner="the")
        verb = grammar.verb(HANDLING if kind == "thing" else MEETING, user, many)
        if verb:
            lines.append(f"{user.words} {grammar.finite(verb, user, 'present')} {many.words}")
    return [sentence(line) for line in lines]


# Each register: what composes one text of it, and its share of the words.
REGISTERS = {"stories": (story, 0.6), "dialogues": (dialogue, 0.2), "encyclopedia": (entry, 0.2)}


def write_split(folder, split, words, seed):
    """Writes each register's share of `words` words as FOLDER/NAME.SPLIT."""
    for name, (compose, share) in REGISTERS.items():
        grammar = Grammar(seed, f"{split} {name}")
        lines, count = [], 0
        while count < share * words:
            text = compose(grammar)
            count += sum(len(line.split()) for line in text)
            lines += [*text, ""]
        write_text(folder / f"{name}.{split}", "\n".join(lines) + "\n")


# ---- minimal pairs: a paradigm gives the acceptable sentence and the other one, or None where no
# ---- verb is held out for the nouns that it drew


def agreement(grammar, between=""):
    """Subject and verb, with what stands between them: nothing, "near" a noun, or a clause."""
    many = grammar.chance(0.5)
    subject = grammar.being(many=many, determiner="the", adjective=0.0 if between else 0.3)
    if between:  # the attractor has the other number
        modified = grammar.beside if between == "near" else grammar.related
        subject = modified(subject, not many)
    verb = subject and grammar.verb(ACTS, subject)
    if not verb:
        return None
    good, bad = (verb, with_s(verb)) if many else (with_s(verb), verb)
    return f"{subject.words} {good}.", f"{subject.words} {bad}."


def question(grammar):
    many = grammar.chance(0.5)
    subject = grammar.being(many=many, determiner="the")
    verb = grammar.verb(ACTS, subject)
    good, bad = ("do", "does") if many else ("does", "do")
    return verb and tuple(f"{do} {subject.words} {verb}?" for do in (good, bad))


def anaphor(grammar, number):
    """A reflexive that agrees in number, or with a name in gender.

    In number the verb is in the past, whose form does not tell the number of the subject.
    """
    head = grammar.random.choice(sorted(GENDERS))
    subject = grammar.noun("person", determiner="the", head=head) if number else grammar.name()
    verb = grammar.verb(MEETING, subject)
    if verb is None:
        return None
    one = {"she": "herself", "he": "himself"}[GENDERS[head]]
    good = subject.reflexive
    bad = ({one, "themselves"} if number else {"himself", "herself"}) - {good}
    verb, place = grammar.finite(verb, subject, "past" if number else "present"), grammar.place()
    return tuple(f"{subject.words} {verb} {word} {place}." for word in (good, *bad))


def determiner(grammar, adjective):
    """A demonstrative and its noun, which never meet in the text, perhaps an adjective between."""
    many, subject = grammar.chance(0.5), grammar.name()
    chosen = grammar.random.choice(("these", "those") if many else ("this", "that"))
    found = grammar.noun("thing", many, chosen, adjective=float(adjective))
    verb = grammar.verb(HANDLING, subject, found)
    if verb is None or not held_out(chosen, *found.lemmas):
        return None
    words = f"{subject.words} {with_s(verb)} {found.words}"
    wrong = found.lemmas[0] if many else plural(*found.lemmas)
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
        grammar = Grammar(seed, f"pairs {name}", for_pairs=True)
        pairs = {}
        while len(pairs) < PAIRS_PER_PARADIGM:
            made = compose(grammar)
            if made and made[0] != made[1]:  # sheep and deer have one form for both numbers
                good, bad = (sentence(words, mark="") for words in made)
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
    ours = {f"{name}.{split}" for name in REGISTERS for split in ("train", "dev")}
    ours |= {f"{name}.jsonl" for name in PARADIGMS} | {"train", "dev", "pairs"}
    others = [p for f in (out, *map(out.joinpath, ("train", "dev", "pairs"))) for p in f.glob("*")]
    others = [path for path in others if path.name not in ours]
    if others:
        raise UserError(f"{others[0]} is there already: choose an empty --out")
    write_split(out / "train", "train", args.words, args.seed)
    write_split(out / "dev", "dev", max(args.words // 10, 2000), args.seed)
    write_pairs(out / "pairs", args.seed)
    print(f"written: {args.words:,} words of {', '.join(REGISTERS)}, and pairs, in {out}")


if __name__ == "__main__":
    sys.exit(run(main))
