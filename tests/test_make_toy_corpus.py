"""The toy corpus: reproducible, grammatical as far as it goes, and held out where it says so."""

import json
import re
from itertools import pairwise

import pytest

import make_toy_corpus
from files import run
from make_toy_corpus import PARADIGMS, held_out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    make_toy_corpus.main(["--out", str(out), "--words", "60000"])
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


def test_the_folder_has_the_layout_of_babylm(corpus):
    names = ("dialogues", "encyclopedia", "stories")
    for split in ("train", "dev"):
        files = [p.name for p in sorted((corpus / split).iterdir())]
        assert files == [f"{name}.{split}" for name in names]
    assert {p.stem for p in (corpus / "pairs").iterdir()} == set(PARADIGMS)


def test_there_are_as_many_words_as_asked_for(corpus):
    assert 60_000 <= len(text_of(corpus / "train").split()) < 60_300
    assert 6_000 <= len(text_of(corpus / "dev").split()) < 6_300


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


def test_what_meets_in_a_pair_never_meets_in_the_text(corpus):
    """Judged from the words alone: a noun and the verb that directly follows it."""
    nouns = {make_toy_corpus.plural(n): n for n in make_toy_corpus.PEOPLE + make_toy_corpus.ANIMALS}
    nouns |= {n: n for n in [*nouns.values(), *make_toy_corpus.GIRLS, *make_toy_corpus.BOYS]}
    verbs = {}
    for verb in make_toy_corpus.ACTS + make_toy_corpus.MEETING + make_toy_corpus.HANDLING:
        forms = (verb, make_toy_corpus.with_s(verb), make_toy_corpus.past(verb))
        verbs |= dict.fromkeys(forms, verb)

    def meetings(text):
        words = re.findall(r"\w+", text)
        return {(nouns[a], verbs[b]) for a, b in pairwise(words) if a in nouns and b in verbs}

    in_text = meetings(text_of(corpus / "train") + text_of(corpus / "dev"))
    in_pairs = [
        meetings(pair["sentence_good"])
        for pair in pairs_of(corpus)
        if pair["UID"] in ("subject_verb_agreement", "anaphor_gender_agreement")
    ]
    assert len(in_text) > 500 and all(in_pairs)
    for met in in_pairs:
        assert not met & in_text and all(held_out(*both) for both in met)
    assert not any(held_out(*both) for both in in_text)


def test_every_word_of_the_pairs_can_be_learned_from_the_text(corpus):
    def words(text):
        return set(re.findall(r"[a-z]+", text.lower()))

    known = words(text_of(corpus / "train"))
    for pair in pairs_of(corpus):
        assert words(pair["sentence_good"] + pair["sentence_bad"]) <= known


def test_the_text_agrees_with_itself(corpus):
    text = text_of(corpus / "train").lower()
    single = [n for n in make_toy_corpus.PEOPLE + make_toy_corpus.THINGS]
    many = [make_toy_corpus.plural(n) for n in single]
    assert re.search(rf"\bthese ({'|'.join(many)})\b", text)
    assert not re.search(rf"\b(these|those|many|two) ({'|'.join(single)})\b", text)
    assert not re.search(rf"\b(this|that|every|an?) ({'|'.join(many)})\b", text)
    acts = "|".join(make_toy_corpus.ACTS)
    third = "|".join(map(make_toy_corpus.with_s, make_toy_corpus.ACTS))
    people = make_toy_corpus.PEOPLE
    in_front = r"\n(?:the|a|this|every) "
    assert re.search(rf"{in_front}(?:{'|'.join(people)}) (?:{third})\b", text)
    assert not re.search(rf"{in_front}(?:{'|'.join(people)}) (?:{acts})\b", text)
    assert not re.search(
        rf"\nthe (?:{'|'.join(map(make_toy_corpus.plural, people))}) ({third})\b", text
    )
    assert not re.search(r"\ba [aeio]", text)
    names = "|".join(make_toy_corpus.GIRLS).lower()
    assert not re.search(rf"\n({names}) \w+ himself", text)


def test_too_few_words_are_refused(tmp_path, capsys):
    out = tmp_path / "toy"
    assert run(lambda: make_toy_corpus.main(["--out", str(out), "--words", "10"])) == 1
    assert "--words" in capsys.readouterr().err and not out.exists()
