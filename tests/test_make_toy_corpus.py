"""The toy corpus: reproducible, grammatical as far as it goes, and held out where it says so."""

import json
import re
from collections import Counter
from itertools import pairwise

import pytest

import make_toy_corpus
from toy import lexicon
from toy.lexicon import CATEGORIES, held_out
from toy.paradigms import PARADIGMS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    make_toy_corpus.main(["--out", str(out)])
    return out


def read(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.*"))}


def text_of(folder):
    return "".join(p.read_text() for p in sorted(folder.iterdir()))


def pairs_of(corpus):
    for path in sorted((corpus / "pairs").iterdir()):
        for line in path.read_text().splitlines():
            yield json.loads(line)


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arguments = ["--out", str(tmp_path / name), "--words", "2000", "--seed", seed]
        make_toy_corpus.main(arguments)
    assert read(tmp_path / "a") == read(tmp_path / "b") != read(tmp_path / "c")


def test_the_folder_has_the_layout_of_babylm_and_as_many_words_as_asked_for(corpus):
    for split, words in (("train", 200_000), ("dev", 20_000)):
        files = [p.name for p in sorted((corpus / split).iterdir())]
        assert files == [f"{name}.{split}" for name in ("dialogues", "encyclopedia", "stories")]
        assert words <= len(text_of(corpus / split).split()) < words + 300
    assert {p.stem for p in (corpus / "pairs").iterdir()} == set(PARADIGMS)


def test_the_two_sentences_of_a_pair_differ_in_one_word(corpus):
    pairs = list(pairs_of(corpus))
    assert len(pairs) == 200 * len(PARADIGMS)
    assert len({p["sentence_good"] for p in pairs}) == len(pairs)
    for pair in pairs:
        good, bad = pair["sentence_good"].split(), pair["sentence_bad"].split()
        assert len(good) == len(bad) and sum(a != b for a, b in zip(good, bad)) == 1


def test_no_sentence_of_a_pair_is_in_the_text(corpus):
    text = text_of(corpus / "train") + text_of(corpus / "dev")
    sentences = set(re.split(r"(?<=[.?])\s", text))
    for pair in pairs_of(corpus):
        assert pair["sentence_good"] not in sentences and pair["sentence_bad"] not in sentences


NOUNS = {
    form: noun
    for words in (lexicon.GIRLS, lexicon.BOYS, *(nouns for nouns, _ in CATEGORIES.values()))
    for noun in words
    for form in (noun, lexicon.plural(noun))
}
VERBS = {
    form: verb
    for verb in lexicon.ACTS + lexicon.MEETING + lexicon.HANDLING
    for form in (verb, lexicon.with_s(verb), lexicon.past(verb))
}


def meetings(text):
    """Noun and verb side by side, verb and object, demonstrative and noun: from words alone."""
    met = set()
    words = [w if w in NOUNS else w.lower() for w in re.findall(r"\w+|[.?:]", text)]
    for a, b in pairwise(words):
        if a in NOUNS and b in VERBS:
            met.add((NOUNS[a], VERBS[b]))
    determiners = "the|an?|this|that|these|those|every|some|two|three|many"
    adjectives = "|".join(lexicon.ADJECTIVES + lexicon.THING_ADJECTIVES)
    phrase = rf"(?=(?:\b(\w+) )?\b({determiners}) (?:(?:{adjectives}) )?(\w+))"
    for verb, determiner, noun in re.findall(phrase, " ".join(words)):
        if noun in NOUNS and verb in VERBS:
            met.add((NOUNS[noun], VERBS[verb]))
        if noun in NOUNS and determiner in lexicon.DEMONSTRATIVES:
            met.add((determiner, NOUNS[noun]))
    return met


def test_what_meets_in_a_pair_never_meets_in_the_text(corpus):
    in_text = meetings(text_of(corpus / "train") + text_of(corpus / "dev"))
    assert len(in_text) > 1000 and not any(held_out(*both) for both in in_text)
    for pair in pairs_of(corpus):
        good = pair["sentence_good"]
        met = meetings(good)
        if pair["linguistics_term"] == "subject_verb_agreement":  # also across what is between
            words = re.findall(r"\w+", good)
            met.add((NOUNS[next(w for w in words if w in NOUNS)], VERBS[words[-1]]))
        if pair["linguistics_term"] == "determiner_noun_agreement":
            assert any(a in lexicon.DEMONSTRATIVES for a, _ in met)
        assert met and not met & in_text and all(held_out(*both) for both in met)


def test_neighbouring_words_do_not_tell_which_sentence_is_good(corpus):
    """A model of word pairs, counted on the text, is close to guessing in every paradigm."""
    words = re.findall(r"\w+|[.?]", text_of(corpus / "train").lower())
    once, twice = Counter(words), Counter(pairwise(words))
    right = Counter()
    for pair in pairs_of(corpus):
        score = {}
        for key in ("sentence_good", "sentence_bad"):
            score[key] = 1.0
            for a, b in pairwise([".", *re.findall(r"\w+|[.?]", pair[key].lower())]):
                score[key] *= (twice[a, b] + 0.1) / (once[a] + 50)
        good, bad = score.values()
        right[pair["UID"]] += (good > bad) + 0.5 * (good == bad)
    assert all(0.3 < n / 200 < 0.7 for n in right.values()), right


def test_every_word_of_the_pairs_can_be_learned_from_the_text(corpus):
    counts = Counter(re.findall(r"[a-z]+", text_of(corpus / "train").lower()))
    for pair in pairs_of(corpus):
        both = pair["sentence_good"] + " " + pair["sentence_bad"]
        assert min(counts[word] for word in re.findall(r"[a-z]+", both.lower())) >= 5


def test_a_story_keeps_its_hero_and_two_speakers_alternate(corpus):
    for text in (corpus / "train" / "stories.train").read_text().strip().split("\n\n"):
        hero, rest = text.split(" ", 1)
        assert hero in lexicon.GIRLS + lexicon.BOYS and hero in rest
    for text in (corpus / "train" / "dialogues.train").read_text().strip().split("\n\n"):
        speakers = [turn.split(":")[0] for turn in text.split("\n")]
        assert len(set(speakers)) == 2 and all(a != b for a, b in pairwise(speakers))


def test_the_text_agrees_with_itself(corpus):
    text = text_of(corpus / "train").lower()
    single = [n for n in lexicon.PEOPLE + lexicon.THINGS]
    many = [lexicon.plural(n) for n in single]
    assert re.search(rf"\bthese ({'|'.join(many)})\b", text)
    assert not re.search(rf"\b(these|those|many|two) ({'|'.join(single)})\b", text)
    assert not re.search(rf"\b(this|that|every|an?) ({'|'.join(many)})\b", text)
    acts = "|".join(lexicon.ACTS)
    third = "|".join(map(lexicon.with_s, lexicon.ACTS))
    people = lexicon.PEOPLE
    in_front = r"\n(?:the|a|this|every) "
    assert re.search(rf"{in_front}(?:{'|'.join(people)}) (?:{third})\b", text)
    assert not re.search(rf"{in_front}(?:{'|'.join(people)}) (?:{acts})\b", text)
    assert not re.search(rf"\nthe (?:{'|'.join(map(lexicon.plural, people))}) ({third})\b", text)
    assert not re.search(r"\ba [aeio]", text)
    names = "|".join(lexicon.GIRLS).lower()
    assert not re.search(rf"\n({names}) \w+ himself", text)
