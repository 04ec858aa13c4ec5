"""Text is read block by block from files of each kind, and a fault in a file is one line that names it."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import time
from pathlib import Path

import pytest

from corpus import cleaning, text_files
from corpus.cleaning import clean, clean_blocks
from corpus.text_files import (
    read_text,
    sub_corpora,
    sub_corpus,
    text_blocks,
    warn_of_ignored_files,
)
from experiments.sampling import halves, sample_corpus, sample_lines, write_dev_halves
from training.io import UserError

TEXT = "The first line.\r\nna\u00efve \u2028 line\n\n\U0001f999 and the last"


def lines_of_json(*documents):
    return "".join(json.dumps({"text": text, "more": 1}) + "\n" for text in documents)


@pytest.fixture
def folder(tmp_path):
    """Six files of the same text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT.encode())
    (folder / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "c.jsonl").write_text(lines_of_json(TEXT))
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(lines_of_json(TEXT).encode()))
    (folder / "e.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    (folder / "F.TXT.BZ2").write_bytes(bz2.compress(TEXT.encode()))
    return folder


def as_it_is(path):
    return list(text_blocks(path, as_is=True))


# ---- files of each kind


def test_every_kind_of_file_gives_its_text(folder, capsys):
    texts = {name: "".join(as_it_is(path)) for name, path in sub_corpora(folder).items()}
    assert texts == {name: TEXT + "\n" * (name in "cd") for name in ("F", "a", "b", "c", "d", "e")}
    assert {read_text(path).rstrip("\n") for path in sub_corpora(folder).values()} == {TEXT.replace("\r", "")}
    assert "not read" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_blocks_are_whole_lines_and_their_sum_the_text(folder, monkeypatch, size):
    monkeypatch.setattr(text_files, "READ_BYTES", size)
    for path in sub_corpora(folder).values():
        blocks = as_it_is(path)
        assert "".join(blocks).rstrip("\n") == TEXT
        assert all(block.endswith("\n") for block in blocks[:-1])
        assert size > 7 or path.suffix != ".txt" or len(blocks) > 2


def test_each_line_of_jsonl_is_a_text_that_ends_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + lines_of_json("one", "", "two\nlines\n") + "\n  \n")
    assert read_text(path) == "one\ntwo\nlines\n"


NO_TEXT = ["no json", "[1]", "3", '{"txt": "a"}', '{"text": 3}', '{"text": null}', '{"text": "\\ud800"}']


@pytest.mark.parametrize("line", [*NO_TEXT, "[" * 99999])
def test_a_line_without_text_is_named(tmp_path, monkeypatch, line):
    monkeypatch.setattr(text_files, "READ_BYTES", 30)
    path = tmp_path / "x.jsonl"
    path.write_text(lines_of_json("one", "two", "three") + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 5: [^\n]*\"text\"[^\n]*$"):
        read_text(path)


@pytest.mark.parametrize("suffix, compress", [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("spoil", [lambda c: c[:-9], lambda c: b"text", lambda c: c[:20] + c[10:]])
def test_a_damaged_archive_is_one_line(tmp_path, suffix, compress, spoil):
    path = tmp_path / f"x.txt.{suffix}"
    path.write_bytes(spoil(compress.compress(TEXT.encode() * 100)))
    with pytest.raises(UserError, match=rf"x\.txt\.{suffix} is damaged[^\n]*$"):
        read_text(path)


def test_what_is_no_utf_8_is_told_by_its_place_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "READ_BYTES", 16)
    path = tmp_path / "x.txt"
    path.write_bytes(b"a line\n" * 100 + "caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 703"):
        read_text(path)


@pytest.mark.parametrize("raw", ["one\r\ntwo\r\n", "one\rtwo\r", "one\r\r\ntwo\r\r\n"])
def test_carriage_returns_end_lines_however_they_stand_and_this_is_said(tmp_path, capsys, raw):
    path = tmp_path / "x.txt"
    path.write_bytes(raw.encode())
    assert read_text(path) == "one\ntwo\n"
    assert "x.txt: its carriage returns" in capsys.readouterr().err
    for options in ({"as_is": True}, {"keep_cr": True}):
        assert "".join(text_blocks(path, **options)) == raw
    assert not capsys.readouterr().err


def test_a_byte_order_mark_is_left_out_and_this_is_said(tmp_path, capsys):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbftext\n")
    assert read_text(path) == "text\n" and "byte-order mark is left out" in capsys.readouterr().err
    assert as_it_is(path) == ["\ufefftext\n"] and not capsys.readouterr().err


# ---- folders


@pytest.mark.parametrize(
    "names, expected",
    [
        (["aochildes.train", "childes.dev", "childes.train.txt", "childes.TXT.gz"], "aochildes"),
        (["simple_wikipedia.dev", "simple_wiki.train.txt.gz", "simple_wiki.test"], "simple_wikipedia"),
        (["simple.wiki.train.gz", "simple.wiki.jsonl.xz"], "simple.wiki"),
    ],
)
def test_a_sub_corpus_has_one_name_in_all_years_and_kinds_of_file(names, expected):
    assert {sub_corpus(name) for name in names} == {expected}


def test_all_that_is_not_read_is_named_once(folder, capsys):
    (folder / "more").mkdir()
    (folder / "more" / "qed.dev").write_text("text")
    for name in ("README.md", "x.json", "y.txt.gz.gz", ".z.txt"):
        (folder / name).write_text("text")
    os.mkfifo(folder / "pipe.dev")
    assert set(sub_corpora(folder)) == set("Fabcde")
    warn_of_ignored_files(folder)
    warning = capsys.readouterr().err
    assert ".z.txt, README.md, more/, pipe.dev, x.json, y.txt.gz.gz (" in warning and warning.count("\n") == 1


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "g.txt").symlink_to("nothing"), r"g\.txt is a link to a file that does not exist"),
        (lambda f: (Path(os.fsdecode(os.fsencode(f) + b"/\xff.txt"))).touch(), "its name is not UTF-8"),
        (lambda f: (f / "a.jsonl").touch(), r"holds both a\.jsonl and a\.txt, which are one sub-corpus"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_wherever_the_folder_is_read(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        sub_corpora(folder)
    with pytest.raises(UserError, match=message):
        sample_corpus(folder, tmp_path / "sample", 600)
    with pytest.raises(UserError, match=message):
        write_dev_halves(folder, (tmp_path / "first", tmp_path / "second"))


def test_a_sample_of_any_kind_of_file_is_plain_text(folder, tmp_path):
    sample_corpus(folder, tmp_path / "sample", 600)
    names = {f"{name}.txt" for name in "Fabcde"}
    assert {path.name for path in (tmp_path / "sample").iterdir()} == names
    targets = tmp_path / "first", tmp_path / "second"
    write_dev_halves(folder, targets, 200, folder)
    for target in targets:
        assert {path.name for path in target.iterdir()} == names


PROSE = [f"Sentence {i} has seven words, or so." for i in range(3000)]


@pytest.mark.parametrize("separators", ["\n", " ", " " * 99 + "\n"], ids=["lines", "one line", "documents"])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_a_sample_and_halves_have_the_words_asked_for_however_long_lines_are(separators, fraction):
    text = "".join(sentence + separators[i % len(separators)] for i, sentence in enumerate(PROSE))
    total = len(text.split())
    sample = sample_lines(text, fraction)
    assert 0.8 * fraction * total <= len(sample.split()) <= 1.1 * fraction * total
    assert set(re.split(r"(?<=[.]) *\n?", sample)) <= {*PROSE, ""}  # no sentence is cut
    first, second = halves(text)
    assert first.split() + second.split() == text.split()
    assert abs(len(first.split()) - len(second.split())) < 0.02 * total
    assert len(sample_lines("word " * 10_000, 0.1).split()) == 1000  # nothing separates sentences


def test_what_is_sampled_and_what_is_left_out_is_said(tmp_path, capsys):
    for name, text in (
        ("train/a.txt", "\n".join(PROSE)),
        ("dev/a.txt", "\n".join(PROSE)),
        ("dev/b.txt", "b b\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    sample_corpus(tmp_path / "train", tmp_path / "sample", 2000)
    write_dev_halves(tmp_path / "dev", (tmp_path / "A", tmp_path / "B"), 700, tmp_path / "train")
    out, err = capsys.readouterr()
    assert "sampled 1,750 of the 21,000 words" in out and "sampled 700, 700 words" in out
    assert "b.txt is left out" in err
    chinese = "\u5c0f\u732b\u559c\u6b22\u3002"
    assert halves(chinese * 20) == (chinese * 10, chinese * 10)
    (tmp_path / "train" / "a.txt").write_text(chinese * 99)
    with pytest.raises(UserError, match="blanks do not separate its words"):
        sample_corpus(tmp_path / "train", tmp_path / "sample", 50)


# ---- cleaning a text that is read in blocks


@pytest.mark.parametrize("how", cleaning.CLEANERS)
def test_cleaning_in_blocks_is_cleaning_the_whole(how):
    treated = ["\n", "\n\n", "\r\n", "\x0c", "\u2028", " ", "\u00a0", "\t", "a", "A", "BC", "l", "lT'S", "1"]
    treated += [".", "?", " !", "'s", "(x)", "= = = ", " = = = T = = =\n", "= = A = =\n", "subtitle"]
    for seed in range(300):
        generator = random.Random(seed)
        lines = ["".join(generator.choices(treated, k=9)) + "\n" for _ in range(4)]
        text, cut = "".join(lines), generator.randint(0, 4)
        blocks = ["".join(lines[:cut]), "".join(lines[cut:])]
        for name in (*cleaning.CLEANERS[how], "unknown"):
            assert "".join(clean_blocks(name, blocks, how)) == clean(name, text, how), (name, text)


def test_a_long_text_is_not_held_to_be_cleaned():
    for name in (*cleaning.SUB_CORPORA, "unknown"):
        blocks = iter(["A line.\n\n = = = Heading = = =\n\nAnother line.\n"] * 100)
        next(clean_blocks(name, blocks))
        assert len(list(blocks)) >= 98, name


@pytest.mark.parametrize("unit", ["! ", "(", "= = = ", "A ! ", ". l ! ", " .", "'", "\n"])
def test_a_cleaner_takes_time_in_proportion_to_the_text(unit):
    """A quadratic one takes several seconds for 100,000 characters on a line."""
    text = "AB CD " + unit * (100_000 // len(unit))
    for how, cleaners in cleaning.CLEANERS.items():
        for name in cleaners:
            started = time.process_time()
            clean(name, text, how)
            assert time.process_time() - started < 1, (how, name)
