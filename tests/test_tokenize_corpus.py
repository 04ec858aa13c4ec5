"""From text to shards: what cleaning changes, what encoding must not, and what is refused."""

import random
import re
import time

import numpy as np
import pytest

import tokenize_corpus
from conftest import make_tokenizer
from corpus import cleaning
from corpus.cleaning import clean
from data import TokenShard
from tokenize_corpus import encode, line_blocks, main, train_tokenizer, training_pieces
from tokenizer import Tokenizer
from training.io import UserError, run_program

NASTY = [
    "",
    "\n",
    " \n \n",
    "  runs   of    spaces  ",
    "tab\tand\r\ncarriage return\r",
    "line\u2028separator, next\x85line, \x0b\x0c",
    "e\u0301 and é, ﬁ and ½ and \u00a0",
    "👩‍👩‍👧 🇨🇭 漢字 ไทย",
    "nul\0inside",
    "\ufeffmark first",
    "<s></s><pad><unk><0x0A>",
    "x" * 20_000,
    "no end of line",
]
LANGUAGES = {
    "names": ["Mira", "Lotte", "Kasel", "Benno", "Noralo"],
    "Chinese": ["小猫喜欢看书。", "老师看见红苹果。", "那个大书"],
    "Japanese": ["猫が本を読みます。", "りんごは赤いです。", "カタカナ"],
    "Thai": ["แมวชอบอ่านหนังสือ", "ครูเห็นแอปเปิลสีแดง"],
    "Dutch": ["De kat 's middags", "één ijsje, ja!", "zo'n coöperatie"],
}


def words(count, seed):
    """Lines of made-up words."""
    generator = random.Random(seed)
    syllables = ["ba", "de", "li", "mo", "ru", "sa", "ti", "po"]
    made = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(count)]
    return "".join(" ".join(made[i : i + 8]) + ".\n" for i in range(0, count, 8))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.read(train_tokenizer([words(4000, seed=0)], 500))


@pytest.fixture
def corpus(tmp_path):
    """A folder with train/ and dev/, two sub-corpora each."""
    for seed, split in enumerate(("train", "dev")):
        (tmp_path / split).mkdir()
        for name in ("stories", "aochildes"):
            text = words(3000, seed).replace(".\n", " .\n") + "žluťoučký kůň\n"
            (tmp_path / split / f"{name}.{split}").write_bytes(text.encode())
    return tmp_path


def arguments(corpus, *more):
    folders = ["--train", corpus / "train", "--dev", corpus / "dev", "--out", corpus / "out"]
    return [str(a) for a in (*folders, "--vocab-size", 500, *more)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- cleaning


@pytest.mark.parametrize(
    "how, name, before, after",
    [
        ("light", "aochildes", "what's that ?\nsay mama .\n", "what's that?\nsay mama.\n"),
        ("light", "bnc_spoken", "Oh !  It is   .5 , see ?\n", "Oh! It is .5, see?\n"),
        ("light", "cbt", "the queen 's head , she 'll\n' Ah ! '\n", "the queen's head, she'll\n' Ah! '\n"),
        ("light", "open_subtitles", "Hi.\nSubtitles by Ann\nSynced by B.\nBye.\n", "Hi.\nBye.\n"),
        ("light", "qed", "WHAT DO l SEE? lT'S HERE .\n", "What do I see? It's here.\n"),
        ("light", "qed", "l'm sure ln x is small.\nlt is.\n", "I'm sure ln x is small.\nIt is.\n"),
        ("light", "qed", "NASA.\nDNA is long.\n", "NASA.\nDNA is long.\n"),  # an acronym is no shout
        ("light", "simple_wikipedia", " = = = April = = = \n\nA month.\n \n", "April\nA month.\n"),
        ("light", "wikipedia", "= = History = =\n\nIt = x.\n", "History\nIt = x.\n"),
        ("paper", "aochildes", "what's that ?\nabout .5 .\n", "what's that?\nabout.5.\n"),
        ("paper", "bnc_spoken", "Oh !\n\nIt  is .\n", "Oh!It is.\n"),
        ("paper", "cbt", "the queen \u2019s head , she 'll\n", "the queen\u2019s head, she'll\n"),
        ("paper", "open_subtitles", f"Hi.\nThe SUBTITLES {90 * 'o'}\nBye.\n", "Hi.\nBye.\n"),
        ("paper", "qed", "WHAT l SEE? lT'S Bob. \nNasa is BIG\n", "What i see? It's bob.\nNasa is BIG"),
        ("paper", "qed", "(.)\n(laughs)\n\nOK\n", "(.)\n(laughs)\n\nOk"),  # it divides by zero there
        ("paper", "simple_wikipedia", "= = = A = = =\n\nA month.\n\n", "= = = A = = =A month."),
        ("paper", "wikipedia", "\n= = = A b = = =\nIt is. \n\n x\n", "A bIt is.x"),
    ],
)
def test_each_cleaner_does_what_it_says(how, name, before, after):
    assert clean(name, before, how) == after


@pytest.mark.parametrize("name", ["children_stories", "gutenberg", "switchboard", "unknown"])
def test_text_that_needs_no_cleaning_is_left_as_it_is(name):
    text = "  = = = A = = =\n\nSubtitles by l , 's !\r\n"
    assert clean(name, text) == clean(name, text, "paper") == text


@pytest.mark.parametrize("name", cleaning.SUB_CORPORA)
def test_clean_text_stays_as_it_is_when_cleaned_again(name):
    text = "= = A = =\n\nSubtitles by B\nTHE l AND lT  'S , OK ?\nthe queen 's  head .\n"
    assert clean(name, clean(name, text)) == clean(name, text)


def test_dialogue_that_runs_into_a_credit_is_kept():
    line = "Subtitles by Ann " + "and then she said that it was over " * 3 + "\n"
    assert clean("open_subtitles", line) == line


# ---- the tokenizer


@pytest.mark.parametrize("text", NASTY)
def test_every_text_comes_back_exactly(tokenizer, text):
    ids, exact = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text and exact
    assert not set(ids.tolist()) & {0, 1, 2, 3}


def test_every_text_comes_back_even_if_the_tokenizer_has_learnt_from_it():
    taught = Tokenizer.read(train_tokenizer([words(500, seed=1), *NASTY], 400))
    assert encode(taught, "\n".join(NASTY))[1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_blanks_come_back_in_every_language(tmp_path, language, capsys):
    generator = random.Random(0)
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        lines = ["".join(generator.choices(LANGUAGES[language], k=3)) for _ in range(400)]
        (tmp_path / split / "a.txt").write_text("\n".join([*lines, f"{split} 小 猫"]), encoding="utf-8")
    main([*arguments(tmp_path)[:-1], "330"])
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.model")
    for text in ("a b", " x", "小 猫", "แมว ครู", *LANGUAGES[language]):
        assert encode(tokenizer, text)[1] and tokenizer.decode(tokenizer.encode(text)) == text
    has_words = language in ("names", "Dutch")
    shard = TokenShard(tmp_path / "out" / "train.bin")
    assert (shard.words > 0) == (shard.files[0].words > 0) == has_words
    printed = capsys.readouterr()
    assert ("blanks do not separate the words" in printed.out) != has_words
    assert "does not give" not in printed.err


def test_blocks_have_the_ids_of_the_whole(tokenizer):
    text = words(3000, seed=2) + "\n\n \u2028\n" + "ba" * 5000
    blocks = list(line_blocks(text, 1000))
    assert len(blocks) > 10
    assert "".join(blocks) == text
    assert encode(tokenizer, text)[0].tolist() == tokenizer.encode(text)


def test_pieces_are_those_of_the_paper_and_the_same_each_time():
    text = words(500, seed=1) + "1984 " * 200
    model = train_tokenizer([text], 400)
    assert model == train_tokenizer([text], 400)
    tokenizer = Tokenizer.read(model)
    assert [tokenizer.processor.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert len(tokenizer.encode("1984")) == 4  # digits are split


@pytest.mark.parametrize("line", ["word " * 3000, "x" * 9001, "é" * 9001, "a" + "漢" * 9001, " "])
def test_training_lines_are_short_enough_and_complete(line):
    pieces = list(training_pieces(f"{line}\nnext"))
    assert "".join(pieces) == line + "next"
    assert max(len(piece.encode()) for piece in pieces) <= 4000


def test_a_long_line_is_learnt_and_cut_in_time_proportional_to_its_length():
    # SentencePiece would have skipped the line, and with it the whole text
    assert train_tokenizer([words(4000, seed=0).replace("\n", " ")], 500)
    started = time.process_time()
    assert sum(map(len, training_pieces("word " * 4_000_000))) == 20_000_000
    assert time.process_time() - started < 5


@pytest.mark.parametrize("size", [16000, 261, 100])
def test_the_vocabulary_size_that_the_error_names_fits(size):
    text = words(200, seed=4)
    with pytest.raises(UserError, match=r"--vocab-size \d+$") as error:
        train_tokenizer([text], size)
    named = int(str(error.value).split()[-1])
    assert Tokenizer.read(train_tokenizer([text], named)).vocabulary_size == named


def test_text_without_words_teaches_nothing():
    with pytest.raises(UserError, match="nothing to learn"):
        train_tokenizer(["\n\n"], 500)


def test_a_tokenizer_learns_from_a_sample_of_a_large_text_always_the_same(corpus, monkeypatch):
    models = []
    for size in (10**6, 10**4, 10**4):
        monkeypatch.setattr(tokenize_corpus, "TRAINING_BYTES", size)
        main(arguments(corpus))
        models.append((corpus / "out" / "tokenizer.model").read_bytes())
    assert models[0] != models[1] == models[2]


# ---- the program


@pytest.mark.parametrize("how, version", [("light", "1"), ("paper", "paper-1"), ("none", "none")])
def test_shards_hold_the_cleaned_text_file_by_file(corpus, capsys, how, version):
    with open(corpus / "dev" / "stories.dev", "ab") as file:
        file.write(b"as Windows has it\r\n")
    main(arguments(corpus, "--keep-cr", "--clean", how))
    tokenizer = Tokenizer.load(corpus / "out" / "tokenizer.model")
    assert tokenizer.vocabulary_size == 500
    for split in ("train", "dev"):
        shard = TokenShard(corpus / "out" / f"{split}.bin")
        assert shard.tokenizer == tokenizer.identity
        assert [file.name for file in shard.files] == ["aochildes", "stories"]
        for file in shard.files:
            raw = (corpus / split / f"{file.name}.{split}").read_bytes().decode()
            text = tokenizer.decode(shard.tokens[file.start : file.stop])
            assert text == clean(file.name, raw, how)
            assert (file.words, file.bytes) == (len(text.split()), len(text.encode()))
    assert f"{len(shard.tokens):,}" in capsys.readouterr().out
    assert f'"cleaning": "{version}"'.encode() in (corpus / "out" / "dev.bin").read_bytes()


def test_an_existing_tokenizer_encodes_new_text(corpus, tokenizer):
    model = corpus / "given.model"
    model.write_bytes(tokenizer.model_bytes)
    main(["--dev", f"{corpus}/dev", "--tokenizer", str(model), "--out", f"{corpus}/new"])
    assert sorted(p.name for p in (corpus / "new").iterdir()) == ["dev.bin", "tokenizer.model"]
    assert (corpus / "new" / "tokenizer.model").read_bytes() == tokenizer.model_bytes
    shard = TokenShard(corpus / "new" / "dev.bin")
    text = clean("aochildes", (corpus / "dev" / "aochildes.dev").read_bytes().decode())
    assert np.array_equal(shard.tokens[: shard.files[0].stop], tokenizer.encode(text))


def test_a_tokenizer_that_loses_text_is_announced(corpus, capsys):
    model = corpus / "lossy.model"
    model.write_bytes(make_tokenizer().model_bytes)  # newlines become spaces, runs of spaces one
    main(["--dev", f"{corpus}/dev", "--tokenizer", str(model), "--out", f"{corpus}/new"])
    assert "does not give the dev text back exactly: 2 of 2 blocks" in capsys.readouterr().err


def test_a_text_in_many_blocks_keeps_its_order(corpus, monkeypatch):
    main(arguments(corpus))
    expected = contents(corpus / "out")
    monkeypatch.setattr(tokenize_corpus, "BLOCK_CHARACTERS", 500)
    main(arguments(corpus))
    assert contents(corpus / "out") == expected


def test_characters_that_cannot_be_kept_are_counted(corpus, capsys):
    with open(corpus / "dev" / "stories.dev", "a", encoding="utf-8") as file:
        file.write("a\u2581b\u2581")
    main(arguments(corpus))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "stories.dev: 2 characters U+2581" in warning


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("dev", None, r"dev is not a folder"),
        ("dev/*", None, r"dev holds no text"),
        ("dev/stories.dev", b"", r"stories\.dev is empty"),
        ("dev/wikipedia.dev", b"\n\n", r"nothing is left of .*wikipedia\.dev"),
        ("dev/stories.dev", "abc é".encode("latin-1"), r"stories\.dev is not UTF-8 at byte 4"),
        ("dev/stories.dev", "text\n".encode("utf-16"), r"iconv -f utf-16"),
        ("train/stories.dev", b"a dev text\n", r"holds both stories\.dev and stories\.train"),
        (
            "dev/same.dev",
            (words(3000, 0).replace(".\n", " .\n") + "žluťoučký kůň\n").encode(),
            "same text in",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(corpus, capsys, name, content, message):
    for path in [corpus / name] if content is not None else list(corpus.glob(name)):
        if content is not None:
            path.write_bytes(content)
        else:
            path.rename(corpus / path.name.replace("dev", "elsewhere"))
    assert run_program(lambda: main(arguments(corpus))) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert not (corpus / "out").is_dir()


@pytest.mark.parametrize(
    "options, message",
    [([], "--train is missing"), (["--tokenizer", "a.model"], "--vocab-size and --kind have no effect")],
)
def test_options_that_do_not_go_together_are_wrong_usage(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--dev", "dev", "--vocab-size", "300", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---- sub-corpora of each year


def test_the_names_of_each_year_have_the_same_cleaners_and_shards(corpus):
    texts = {"simple_wikipedia": "= = A = =\n\nText .\n", "open_subtitles": "Subtitles by B\nHi .\n"}
    spellings = {"aochildes": "childes", "simple_wikipedia": "simple_wiki"}
    for split in ("train", "dev"):
        (corpus / split / f"stories.{split}").unlink()
        for name, text in texts.items():
            (corpus / split / f"{name}.{split}").write_text(text * 9 + split)
    main(arguments(corpus))
    expected = contents(corpus / "out")
    for path in (*(corpus / "train").iterdir(), *(corpus / "dev").iterdir()):
        name = spellings.get(path.stem, path.stem)
        path.rename(path.with_name(f"{name}.train.txt" if path.suffix == ".train" else f"{name}.dev"))
    main(arguments(corpus))
    assert contents(corpus / "out") == expected


def test_a_sub_corpus_without_cleaning_rules_is_named(corpus, capsys):
    main(arguments(corpus))
    assert "no cleaning rules for stories: text as it is" in capsys.readouterr().err
    main(arguments(corpus, "--no-clean"))
    assert "no cleaning rules" not in capsys.readouterr().err


# ---- what is in --out


@pytest.mark.parametrize("error", [UserError("cannot write: No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_a_stop_leaves_what_was_there(corpus, monkeypatch, error):
    main(arguments(corpus))
    before, write_shard = contents(corpus / "out"), tokenize_corpus.write_shard

    def fail_at_dev(file, *details):
        if "dev.bin" in file.name:
            raise error
        return write_shard(file, *details)

    monkeypatch.setattr(tokenize_corpus, "write_shard", fail_at_dev)
    assert run_program(lambda: main(arguments(corpus, "--no-clean"))) in (1, 130)
    assert contents(corpus / "out") == before


def test_files_that_it_does_not_write_are_left_alone(corpus):
    """Earlier versions wrote into new.tmp, and emptied it: of a link, where it points."""
    files = [corpus / "out" / "train-00001.bin", corpus / "elsewhere" / "train.bin"]
    for path in files:
        path.parent.mkdir()
        path.write_text("years of work")
    (corpus / "out" / "new.tmp").symlink_to(corpus / "elsewhere")
    main(arguments(corpus))
    assert all(path.read_text() == "years of work" for path in files)


def test_dev_text_alone_is_refused_beside_the_train_shard_of_another_tokenizer(corpus, tokenizer, capsys):
    main(arguments(corpus))
    before = contents(corpus / "out")
    alone = ["--dev", f"{corpus}/dev", "--out", f"{corpus}/out", "--no-clean", "--tokenizer"]
    model = corpus / "other.model"
    model.write_bytes(tokenizer.model_bytes)
    assert run_program(lambda: main([*alone, str(model)])) == 1
    assert "train.bin was made with another tokenizer" in capsys.readouterr().err
    assert contents(corpus / "out") == before
    main([*alone, f"{corpus}/out/tokenizer.model"])
    after = contents(corpus / "out")
    assert before.pop("dev.bin") != after.pop("dev.bin") and before == after
