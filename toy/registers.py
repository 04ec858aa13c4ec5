"""Three registers of text: stories, dialogues, and an encyclopedia."""

from toy.grammar import Grammar, Phrase, sentence
from toy.lexicon import ACTS, CATEGORIES, HANDLING, MEETING, OBJECT_PRONOUNS, past, plural

# What happens in a story, event by event: subject, verb, rest. HERO and FRIEND are people with
# names. They, the CREATURE, the THING and the PLACE stay the same throughout a story: whoever
# remembers its beginning knows them at its end.
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
]


def plot(grammar, cast, place):
    """One of PLOTS as [(subject, verb, rest)], or None if words meet in it that are held out."""
    events = []
    for event in grammar.random.choice(PLOTS):
        subject, verb, *rest = event.split(" ")
        if not grammar.verb([verb], cast[subject], *(cast[word] for word in rest if word in cast)):
            return None
        events.append((subject, verb, [place if word == "PLACE" else word for word in rest]))
    return events


def told(grammar, event, cast, before, tense):
    """An event in words, often with pronouns for those whom the event before it was about."""
    who, verb, rest = event
    subject = cast[who]
    words = [subject.pronoun if before[:1] == (who,) and grammar.chance(0.7) else subject.words]
    words.append(grammar.finite(verb, subject, tense))
    for word in rest:
        known = before and word in before[2] and grammar.chance(0.5)
        other = cast.get(word)
        words.append((OBJECT_PRONOUNS[other.pronoun] if known else other.words) if other else word)
    return " ".join(words)


def story(grammar):
    """The lines of a story: its characters are introduced, then a plot is told, with asides."""
    tense = "past" if grammar.chance(0.5) else "present"
    hero, thing, place = grammar.name(), grammar.noun("thing"), grammar.place()
    cast = {"HERO": hero, "FRIEND": grammar.name(hero), "CREATURE": grammar.being(determiner="the")}
    cast["THING"] = grammar.noun("thing", thing.many, "the", 0.0, *thing.lemmas)
    events = plot(grammar, cast, place)
    if events is None:
        return story(grammar)
    lines = [
        f"{hero.words} {grammar.finite('live', hero, tense)} {grammar.place()}",
        f"{hero.words} {grammar.finite('have', hero, tense)} {thing.words}",
        f"{cast['CREATURE'].words} {grammar.finite('be', cast['CREATURE'], tense)} {place}",
    ]
    before = ()
    for event in events:
        lines.append(told(grammar, event, cast, before, tense))
        before = event
        if grammar.chance(0.25):
            lines[-1] += continuation(grammar, cast, tense)
            before = ()
        if grammar.chance(0.4):
            lines.append(aside(grammar, cast["FRIEND"], tense))
            before = ()
    return [sentence(line) for line in lines]


def continuation(grammar, cast, tense):
    """A second clause of a sentence, about one of the cast, with the word that joins it."""
    other = cast[grammar.random.choice(("HERO", "FRIEND", "CREATURE"))]
    joint = grammar.random.choice(("because", "and", "but", "when"))
    return f" {joint} {grammar.clause(other, tense)}"


def aside(grammar, speaker, tense):
    """A clause about someone who is not in the story; sometimes the speaker says it."""
    says = f"{speaker.words} {grammar.finite('say', speaker, tense)} that "
    words = grammar.clause(grammar.being(), tense)
    return (says if grammar.chance(0.2) else "") + words


def exchange(grammar):
    """Yields a question about a being or a thing and its answer, and perhaps a second of each."""
    determiner = grammar.random.choice(("the", "this", "that"))
    category = grammar.random.choice(("person", "animal", "thing"))
    several = {"the": "the", "this": "these", "that": "those"}[determiner]
    many = grammar.chance(0.4)
    subject = grammar.noun(category, many, several if many else determiner)
    it, them = subject.pronoun, OBJECT_PRONOUNS[subject.pronoun]
    be = grammar.finite("be", subject, "present")
    do, place = "do" if many else "does", grammar.place()
    if category == "thing" or grammar.chance(0.3):
        yield sentence(f"where {be} {subject.words}", "?")
        yield sentence(f"{it} {be} {place}")
        finder = grammar.name()
        verb = grammar.verb(HANDLING if category == "thing" else MEETING, finder, subject)
        if verb and grammar.chance(0.5):
            yield sentence(f"who {past(verb)} {them}", "?")
            yield sentence(f"{finder.words} {past(verb)} {them} {place}")
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
    """The lines of an encyclopedia's entry about one noun.

    What is true of a noun depends on the noun and the seed alone. Each entry tells some of it.
    """
    category = grammar.random.choice(("animal", "animal", "person", "thing", "place"))
    head = grammar.word(CATEGORIES[category][0])
    one = grammar.noun(category, False, "a", 0.0, head)
    many = Phrase(plural(head), (head,), True, "they", category)
    world = Grammar(grammar.seed, f"facts {head}")
    facts = [("be", world.word(CATEGORIES[category][1])) for _ in range(2)]
    if category in ("animal", "person"):
        facts += [("live", world.place()), (world.verb(ACTS, one), world.place())]
        facts += [(world.verb(ACTS, one), "")]
    lines = [f"{one.words} is {'an' if category == 'animal' else 'a'} {category}"]
    for verb, rest in grammar.random.sample(facts, grammar.random.randint(1, len(facts))):
        subject = grammar.random.choice((one, many))
        lines.append(f"{subject.words} {grammar.finite(verb, subject, 'present')} {rest}".strip())
    if category in ("animal", "person"):
        subject = grammar.beside(many) if grammar.chance(0.4) else many
        lines.append(f"{subject.words} {grammar.predicate(subject, 'present')}")
    else:
        user = grammar.noun("person", determiner="the")
        verb = grammar.verb(HANDLING if category == "thing" else MEETING, user, many)
        if verb:
            lines.append(f"{user.words} {grammar.finite(verb, user, 'present')} {many.words}")
    return [sentence(line) for line in lines]


# Each register: the function that composes one text, and the register's share of the words.
REGISTERS = {"stories": (story, 0.6), "dialogues": (dialogue, 0.2), "encyclopedia": (entry, 0.2)}
