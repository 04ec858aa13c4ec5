"""Text arrives in shards as it was: cleaned as said, lossless, counted, or refused with one line."""

import pytest
from conftest import write_text

import tokenize_corpus
from data import Tokenizer, TokenShard
from files import run
from tokenize_corpus import CLEANERS, clean, encode, train_tokenizer, training_pieces

EXAMPLES = [
    ("aochildes", "hm hm .\nwho is it ?\n", "hm hm.\nwho is it?\n"),
    ("bnc_spoken", "Well  it   is.\n\nYes.\n", "Well it is.\nYes.\n"),
    ("cbt", "the queen 's head , I do n't ; ` Yes\n", "the queen's head, I don't; `Yes\n"),
    ("cbt", "she said : ' I know ! '\n", "she said: ' I know! '\n"),
    ("open_subtitles", "Sync, corrected by elderman\nHello.\n", "Hello.\n"),
    ("open_subtitles", "<font>www.addic7ed.com</font>\nWait.\n", "Wait.\n"),
    ("open_subtitles", "We are in sync by now.\n", "We are in sync by now.\n"),
    ("qed", "THlS IS WHAT l SAlD. GO ON!\n", "This is what I said. Go on!\n"),
    ("qed", "And l think l'm  right\n", "And I think I'm right\n"),
    ("qed", "DNA is a word.\nAIDS.\n", "DNA is a word.\nAIDS.\n"),
    ("simple_wikipedia", "\n = = = April = = = \n\nIt is a month.\n", "It is a month.\n"),
    ("wikipedia", "One.\n= History =\n\n\nTwo.\n", "One.\nTwo.\n"),
]


@pytest.mark.parametrize("name, before, after", EXAMPLES)
def test_each_sub_corpus_is_cleaned_its_own_way(name, before, after):
    assert clean(name, before) == after
    assert clean(name, after) == after


def test_every_cleaner_has_an_example():
    assert {name for name, _, _ in EXAMPLES} == set(CLEANERS)


def test_unknown_sub_corpora_are_left_as_they_are():
    text = "hm hm .\n\n= A =\n  two\r\n"
    assert clean("stories", text) == text and clean("gutenberg", text) == text


# ---- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer([write_text(3000, seed=1)], 320))


NASTY = [
    "", " ", "\n", "\n\n\n", "no final newline", " a  b   c ", "tab\there\r\nand there\r\n",
    "emoji \U0001f9d1\u200d\U0001f680", "e\u0301 n\u0303", "line\u2028separator\x85\x0b\x0c", "nul \0 nul",
    "½ ﬁ \xa0 nbsp", "عربي ו עברית", "x" * 30_000, "<s> </s> <pad> <unk> <0x0A>", "\ufeffBOM",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_encoding_is_lossless(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_encoding_by_lines_equals_encoding_at_once(tokenizer):
    text = write_text(500, seed=2) + "\n\n \n last"
    assert encode(tokenizer, text).tolist() == tokenizer.encode(text)


def test_the_special_ids_are_the_papers(tokenizer):
    pieces = [tokenizer.processor.id_to_piece(i) for i in range(4)]
    assert pieces == ["<pad>", "<s>", "</s>", "<unk>"]
    assert tokenizer.vocabulary_size == 320


def test_same_text_same_tokenizer(tokenizer):
    assert train_tokenizer([write_text(3000, seed=1)], 320) == tokenizer.model_bytes


def test_long_lines_are_cut_and_not_dropped():
    line = "déjà vu " * 2000
    pieces = list(training_pieces([line + "\nshort", "x" * 9000]))
    assert "".join(pieces) == line + "short" + "x" * 9000
    assert max(len(piece.encode()) for piece in pieces) <= 4000
    # A word that occurs in long lines alone is learned all the same.
    text = "\n".join("zebra quagga " * 500 for _ in range(4))
    model = Tokenizer(train_tokenizer([text], 285))
    assert len(model.encode(" zebra quagga")) <= 4


# ---- the program


def write_folder(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


@pytest.fixture
def corpus(tmp_path):
    """Arguments for a small corpus in the BabyLM layout, and the folder of its output."""
    train = write_folder(
        tmp_path / "train", qed__train=write_text(1500, 2), aochildes__train="hm .\n" * 50
    )
    dev = write_folder(tmp_path / "dev", qed__dev=write_text(300, 3))
    out = tmp_path / "out"
    return ["--train", train, "--dev", dev, "--out", str(out), "--vocab-size", "300"], out


def test_a_folder_becomes_shards_and_a_tokenizer(corpus, capsys):
    arguments, out = corpus
    assert run(lambda: tokenize_corpus.main(arguments)) == 0
    assert sorted(p.name for p in out.iterdir()) == ["dev.bin", "tokenizer.model", "train.bin"]
    tokenizer, shard = Tokenizer.load(out / "tokenizer.model"), TokenShard(out / "train.bin")
    assert shard.tokenizer == tokenizer.identity == TokenShard(out / "dev.bin").tokenizer
    assert [f.name for f in shard.files] == ["aochildes", "qed"]
    expected = "hm.\n" * 50 + write_text(1500, 2)
    assert tokenizer.decode(shard.tokens) == expected
    assert (shard.words, shard.bytes) == (len(expected.split()), len(expected.encode()))
    first = shard.files[0]
    assert (first.start, first.words, first.bytes) == (0, 50, 200)
    printed = capsys.readouterr().out
    assert "tokens/word" in printed and "train together" in printed


def test_no_clean_leaves_the_text_alone(corpus):
    arguments, out = corpus
    tokenize_corpus.main([*arguments, "--no-clean"])
    tokenizer, shard = Tokenizer.load(out / "tokenizer.model"), TokenShard(out / "train.bin")
    assert tokenizer.decode(shard.tokens).startswith("hm .\nhm .\n")


def test_an_existing_tokenizer_encodes_new_text(corpus, tmp_path):
    arguments, out = corpus
    tokenize_corpus.main(arguments)
    new = write_folder(tmp_path / "new", letters__txt="a cat and a dog\n")
    model = out / "tokenizer.model"
    tokenize_corpus.main(["--dev", new, "--tokenizer", str(model), "--out", str(tmp_path / "more")])
    shard = TokenShard(tmp_path / "more/dev.bin")
    assert shard.tokenizer == Tokenizer.load(model).identity
    assert Tokenizer.load(model).decode(shard.tokens) == "a cat and a dog\n"
    assert not (tmp_path / "more/train.bin").exists()


def test_training_text_alone_makes_the_tokenizer(corpus, tmp_path):
    arguments, out = corpus
    tokenize_corpus.main(arguments)
    before = (out / "tokenizer.model").read_bytes()
    write_folder(tmp_path / "dev", qed__dev="altogether different words " * 200)
    tokenize_corpus.main(arguments)
    assert (out / "tokenizer.model").read_bytes() == before


def test_the_space_symbol_is_counted(corpus, tmp_path, capsys):
    arguments, _ = corpus
    write_folder(tmp_path / "train", qed__train="a \u2581 b \u2581\n" + write_text(1500, 2))
    tokenize_corpus.main(arguments)
    assert "2 characters U+2581" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, message",
    [
        ({"bad__train": b"fine\n\xff\xfe"}, "bad.train is not UTF-8 at byte 5"),
        ({"empty__train": b""}, "empty.train is empty"),
        ({"blank__train": b" \n\n"}, "blank.train is empty"),
        ({"qed__txt": b"twice"}, "two files called qed"),
    ],
)
def test_bad_text_is_named_and_nothing_is_overwritten(corpus, tmp_path, capsys, files, message):
    arguments, out = corpus
    tokenize_corpus.main(arguments)
    before = {p: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    write_folder(tmp_path / "train", **files)
    assert run(lambda: tokenize_corpus.main(arguments)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert before == {p: p.read_bytes() for p in out.iterdir()}


def test_missing_folders_are_named(corpus, tmp_path, capsys):
    arguments, out = corpus
    assert run(lambda: tokenize_corpus.main([*arguments, "--train", str(tmp_path / "none")])) == 1
    assert "none is no folder" in capsys.readouterr().err
    (tmp_path / "vacant").mkdir()
    assert run(lambda: tokenize_corpus.main([*arguments, "--dev", str(tmp_path / "vacant")])) == 1
    assert "holds no text" in capsys.readouterr().err
    assert not out.exists()


def test_a_vocabulary_that_cannot_be_filled_is_answered_with_the_largest_that_can(corpus, capsys):
    arguments, out = corpus
    assert run(lambda: tokenize_corpus.main([*arguments[:-1], "16000"])) == 1
    error = capsys.readouterr().err
    assert "is the largest that fits" in error and not out.exists()
    largest = error.split("--vocab-size ")[1].split()[0]
    assert run(lambda: tokenize_corpus.main([*arguments[:-1], largest])) == 0
    assert run(lambda: tokenize_corpus.main([*arguments[:-1], "200"])) == 1
    assert "too few" in capsys.readouterr().err


def test_without_train_a_tokenizer_is_needed(tmp_path):
    with pytest.raises(SystemExit) as stop:
        tokenize_corpus.main(["--dev", str(tmp_path)])
    assert stop.value.code == 2
