"""Paradigms of minimal pairs: two sentences that differ in one word, of which one is acceptable.

Each function draws a pair, the acceptable sentence first. It returns None where no verb is held out
for the nouns that it drew: then one calls it again.
"""

from toy.lexicon import ACTS, GENDERS, HANDLING, MEETING, REFLEXIVES, held_out, plural, with_s


def agreement(grammar, between=""):
    """A subject and a verb that agree in number.

    Between them may stand a "phrase" or a "clause", whose noun has the other number.
    """
    many = grammar.chance(0.5)
    subject = grammar.being(many=many, determiner="the", adjective=0.0 if between else 0.3)
    if between:
        modified = grammar.beside if between == "phrase" else grammar.related
        subject = modified(subject, not many)
    verb = subject and grammar.verb(ACTS, subject)
    if not verb:
        return None
    good, bad = (verb, with_s(verb)) if many else (with_s(verb), verb)
    return f"{subject.words} {good}.", f"{subject.words} {bad}."


def question(grammar):
    """A question whose auxiliary agrees with the subject in number."""
    many = grammar.chance(0.5)
    subject = grammar.being(many=many, determiner="the")
    verb = grammar.verb(ACTS, subject)
    good, bad = ("do", "does") if many else ("does", "do")
    return verb and tuple(f"{do} {subject.words} {verb}?" for do in (good, bad))


def anaphor(grammar, number):
    """A reflexive pronoun that agrees with a noun in number, or else with a name in gender.

    Where the number matters, the verb is in the past, for its form does not tell it.
    """
    head = grammar.random.choice(sorted(GENDERS))
    subject = grammar.noun("person", determiner="the", head=head) if number else grammar.name()
    verb = grammar.verb(MEETING, subject)
    if verb is None:
        return None
    one, good = REFLEXIVES[GENDERS[head]], REFLEXIVES[subject.pronoun]
    bad = ({one, "themselves"} if number else {"himself", "herself"}) - {good}
    verb, place = grammar.finite(verb, subject, "past" if number else "present"), grammar.place()
    return tuple(f"{subject.words} {verb} {word} {place}." for word in (good, *bad))


def determiner(grammar, adjective):
    """A demonstrative and its noun, which never meet in the text; an adjective may be between."""
    many, subject = grammar.chance(0.5), grammar.name()
    chosen = grammar.random.choice(("these", "those") if many else ("this", "that"))
    thing = grammar.noun("thing", many, chosen, adjective=float(adjective))
    verb = grammar.verb(HANDLING, subject, thing)
    if verb is None or not held_out(chosen, *thing.lemmas):
        return None
    words = f"{subject.words} {with_s(verb)} {thing.words}"
    wrong = thing.lemmas[0] if many else plural(*thing.lemmas)
    return f"{words}.", f"{words.rsplit(' ', 1)[0]} {wrong}."


# Each paradigm: its linguistics_term as in BLiMP, and the function that draws a pair.
PARADIGMS = {
    "subject_verb_agreement": ("subject_verb_agreement", agreement),
    "agreement_across_a_phrase": ("subject_verb_agreement", lambda g: agreement(g, "phrase")),
    "agreement_across_a_clause": ("subject_verb_agreement", lambda g: agreement(g, "clause")),
    "agreement_in_questions": ("subject_verb_agreement", question),
    "anaphor_gender_agreement": ("anaphor_agreement", lambda g: anaphor(g, number=False)),
    "anaphor_number_agreement": ("anaphor_agreement", lambda g: anaphor(g, number=True)),
    "determiner_noun_agreement": ("determiner_noun_agreement", lambda g: determiner(g, False)),
    "determiner_adjective_noun": ("determiner_noun_agreement", lambda g: determiner(g, True)),
}
