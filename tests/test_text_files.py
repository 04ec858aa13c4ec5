"""Text is read block by block, from files of each kind, and what is none is told in one line."""

import gzip
import json
import random

import pytest

from corpus import cleaning, text_files
from corpus.cleaning import clean, clean_blocks, split_lines
from corpus.text_files import list_text_files, read_text, split_name, sub_corpora, text_blocks
from experiments.sampling import sample_corpus, write_dev_halves
from training.io import UserError

TEXT = "The first line.\r\nna\u00efve \u2028 line\n\n\U0001f999 and the last"
PIECES = [  # what the cleaners treat in some way, and where lines begin and end
    "\n",
    "\n\n",
    "\r\n",
    "\x0c",
    "\u2028",
    " ",
    "\u00a0",
    "\t",
    "a",
    "A",
    "BC",
    "l",
    "lT'S",
    "1",
    ".",
    "?",
    " !",
    "'s",
    "(x)",
    "= = = ",
    " = = = T = = =\n",
    "= = A = =\n",
    "subtitle",
]


def lines_of_json(*documents):
    return "".join(json.dumps({"text": text, "more": 1}) + "\n" for text in documents)


@pytest.fixture
def folder(tmp_path):
    """Four files of the same text."""
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "c.jsonl").write_text(lines_of_json(TEXT))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines_of_json(TEXT).encode()))
    return tmp_path


# ---- files of each kind


def test_every_kind_of_file_gives_its_text(folder):
    found = {name: read_text(path, windows=False) for name, path in sub_corpora(folder).items()}
    assert found == {"a": TEXT, "b": TEXT, "c": TEXT + "\n", "d": TEXT + "\n"}
    assert len({read_text(path).rstrip("\n") for path in list_text_files(folder)}) == 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_blocks_are_whole_lines_and_their_sum_the_text(folder, monkeypatch, size):
    monkeypatch.setattr(text_files, "READ_BYTES", size)
    for path in list_text_files(folder):
        blocks = list(text_blocks(path, windows=False))
        assert "".join(blocks).rstrip("\n") == TEXT
        assert all(block.endswith("\n") for block in blocks[:-1])
        assert size > 7 or path.suffix != ".txt" or len(blocks) > 2


def test_each_line_of_jsonl_is_a_text_that_ends_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + lines_of_json("one", "", "two\nlines\n") + "\n  \n")
    assert read_text(path) == "one\ntwo\nlines\n"


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1]",
        "3",
        '{"txt": "a"}',
        '{"text": 3}',
        '{"text": null}',
        '{"text": "\\ud800"}',
        "[" * 100_000,
    ],
)
def test_a_line_without_text_is_named(tmp_path, monkeypatch, line):
    monkeypatch.setattr(text_files, "READ_BYTES", 30)
    path = tmp_path / "x.jsonl"
    path.write_text(lines_of_json("one", "two", "three") + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 5: .*\"text\"") as error:
        read_text(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [lambda c: c[:-9], lambda c: b"text", lambda c: c[:20] + c[10:]])
def test_a_damaged_gz_is_one_line(tmp_path, spoil):
    path = tmp_path / "x.txt.gz"
    path.write_bytes(spoil(gzip.compress(TEXT.encode() * 100)))
    with pytest.raises(UserError, match=r"x\.txt\.gz is damaged") as error:
        read_text(path)
    assert "\n" not in str(error.value)


def test_what_is_no_utf_8_is_told_by_its_place_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "READ_BYTES", 16)
    path = tmp_path / "x.txt"
    path.write_bytes(b"a line\n" * 100 + "caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 703"):
        read_text(path)


def test_one_name_in_two_kinds_of_file_is_refused(folder):
    (folder / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"both a\.jsonl\.gz and a\.txt"):
        sub_corpora(folder)
    assert split_name(folder / "simple.wiki.train.gz") == ("simple.wiki", ".train")


def test_a_sample_of_any_kind_of_file_is_plain_text(folder, tmp_path):
    (folder / "d.jsonl.gz").unlink()
    long = "one two three\n" * 400
    (folder / "c.jsonl").write_text(lines_of_json(long))
    (folder / "b.txt.gz").write_bytes(gzip.compress(long.encode()))
    sample_corpus(folder, tmp_path / "sample", 600)
    assert [path.name for path in list_text_files(tmp_path / "sample")] == ["a.txt", "b.txt", "c.txt"]
    (folder / "a.txt").unlink()
    targets = tmp_path / "first", tmp_path / "second"
    write_dev_halves(folder, targets, 200, folder)
    for target in targets:
        assert {path.name for path in list_text_files(target)} == {"b.txt", "c.txt"}
        assert all(read_text(path).startswith("one two") for path in list_text_files(target))


# ---- cleaning in blocks


@pytest.mark.parametrize("how", cleaning.CLEANERS)
def test_cleaning_in_blocks_is_cleaning_the_whole(how):
    for seed in range(300):
        generator = random.Random(seed)
        text = "".join(generator.choices(PIECES, k=generator.randint(1, 40)))
        lines = split_lines(text)
        cuts = [i for i in range(len(lines)) if generator.random() < 0.5]
        bounds = zip([0, *cuts], [*cuts, len(lines)])
        blocks = ["".join(lines[start:stop]) for start, stop in bounds if stop > start]
        for name in (*cleaning.CLEANERS[how], "unknown"):
            assert "".join(clean_blocks(name, blocks, how)) == clean(name, text, how), (name, text)


def test_a_long_text_is_not_held_to_be_cleaned():
    taken = [0]

    def blocks():
        for _ in range(100):
            taken[0] += 1
            yield "A line.\n\n = = = Heading = = =\n\nAnother line.\n"

    for how, cleaners in cleaning.CLEANERS.items():
        for name in (*cleaners, "unknown"):
            taken[0], pieces = 0, clean_blocks(name, blocks(), how)
            next(pieces)
            assert taken[0] <= 2, (how, name)
