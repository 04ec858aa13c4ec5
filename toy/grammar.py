"""Phrases and sentences of the toy language, drawn at random.

Whatever a phrase or a sentence is made for decides which words may meet in it: those that are held
out meet in minimal pairs alone, the others in text alone (`toy.lexicon.held_out`).
"""

import random
from dataclasses import dataclass, replace

from toy.lexicon import (
    ACTS,
    BOYS,
    CATEGORIES,
    DEMONSTRATIVES,
    GENDERS,
    GIRLS,
    HANDLING,
    MEETING,
    NEAR,
    PEOPLE_ONLY,
    REFLEXIVES,
    held_out,
    past,
    plural,
    with_s,
)


@dataclass(frozen=True)
class Phrase:
    """A noun phrase."""

    words: str
    lemmas: tuple  # of its nouns: of the head, then of those between the head and what follows
    many: bool
    pronoun: str
    category: str = "person"


class Grammar:
    """Draws phrases and sentences for pairs, or else for text, from one stream of random numbers.

    The seed and the name of the stream determine all that is drawn.
    """

    def __init__(self, seed, stream, for_pairs=False):
        self.seed, self.for_pairs = seed, for_pairs
        self.random = random.Random(f"{seed} {stream}")

    def chance(self, probability):
        return self.random.random() < probability

    def word(self, words):
        """A word of a list, the earlier the likelier (Zipf's law)."""
        weights = [1 / (rank + 3) for rank in range(len(words))]
        return self.random.choices(words, weights)[0]

    def name(self, other_than=None):
        """Someone's name, which is not that of the phrase `other_than`."""
        girl = self.chance(0.5)
        name = self.word(GIRLS if girl else BOYS)
        if other_than and name == other_than.words:
            return self.name(other_than)
        return Phrase(name, (name,), False, "she" if girl else "he")

    def noun(self, category, many=None, determiner=None, adjective=0.3, head=None):
        """A common noun of a category with a determiner, and an adjective with that probability.

        What is None is drawn.
        """
        nouns, adjectives = CATEGORIES[category]
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
        pronoun = "they" if many else pronoun if category == "person" else "it"
        return Phrase(" ".join([determiner, *words]), (head,), many, pronoun, category)

    def being(self, **options):
        return self.noun("person" if self.chance(0.5) else "animal", **options)

    def verb(self, verbs, subject, *objects):
        """A verb that may meet the subject and the objects here, or None if there is none.

        Where pairs are made, it is held out with each of their nouns; else with none of them.
        """
        lemmas = [lemma for phrase in (subject, *objects) for lemma in phrase.lemmas]
        allowed = [
            verb
            for verb in verbs
            if all(held_out(lemma, verb) == self.for_pairs for lemma in lemmas)
            and (subject.category == "person" or verb not in PEOPLE_ONLY)
        ]
        return self.word(allowed) if allowed else None

    def finite(self, verb, subject, tense):
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
        category = "place" if self.for_pairs else self.random.choice(("thing", "place"))
        other = self.noun(category, many, "the", adjective)
        words = f"{subject.words} {self.word(NEAR)} {other.words}"
        return replace(subject, words=words, lemmas=subject.lemmas + other.lemmas)

    def related(self, subject, many=None, tense="present"):
        """The subject with a clause behind it, "the dog that the cats see".

        None if no verb may meet the nouns that were drawn.
        """
        other = self.being(many=many, determiner="the", adjective=0.1)
        verb = self.verb(MEETING, other, subject)
        if verb is None:
            return None
        words = f"{subject.words} that {other.words} {self.finite(verb, other, tense)}"
        return replace(subject, words=words, lemmas=subject.lemmas + other.lemmas)

    def predicate(self, subject, tense):
        """What the subject does: an act, or something to a thing, to someone else or to itself."""
        which = self.random.random()
        verb = words = None
        if which < 0.4:
            verb = self.verb(ACTS, subject)
            words = self.place() if self.chance(0.4) else ""
        elif which < 0.48 and subject.pronoun != "it":
            verb, words = self.verb(MEETING, subject), REFLEXIVES[subject.pronoun]
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
        """Subject and predicate, perhaps with a phrase or a clause between them."""
        which = self.random.random()
        if which < 0.14:
            subject = self.beside(subject)
        elif which < 0.24:
            subject = self.related(subject, tense=tense) or subject
        return f"{subject.words} {self.predicate(subject, tense)}"


def sentence(words, mark="."):
    """The words with a capital in front and a mark behind."""
    return words[0].upper() + words[1:] + mark
