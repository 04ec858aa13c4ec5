"""Recipes: those that come with the project can be run, and a wrong one says what is wrong."""

import dataclasses
import json
import math

import pytest

from experiments.recipes import Cost, card_minutes, costs, read_experiment, recipe_names
from training.io import UserError

MODELS = {
    "teacher": {"model": "llama-tiny", "epochs": 3},
    "control": {"model": "llama-tiny-student", "weight_decay": 0.5},
    "student": {"like": "control", "teachers": ["teacher"], "alpha": 0.25},
}


def written(tmp_path, **changes):
    table = {"models": MODELS, "control": "control", "student": "student", **changes}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipes_of_the_project_are_complete(name):
    recipe = read_experiment(name)
    assert recipe.about and recipe.student in recipe.specs
    assert all(cost.flops > 0 for cost in costs(recipe, 1_000_000, 500_000).values())


def test_a_model_takes_from_another_what_it_does_not_say_itself(tmp_path):
    recipe = read_experiment(written(tmp_path, options={"log_every": 7}))
    student = recipe.specs["student"]
    assert student.options == {"log_every": 7, "weight_decay": 0.5, "alpha": 0.25}
    config = student.config
    assert (config.alpha, config.weight_decay, config.epochs) == (0.25, 0.5, 14)
    arguments = " ".join(recipe.specs["control"].arguments())
    assert arguments == "--model llama-tiny-student --log-every 7 --weight-decay 0.5"


def test_the_papers_steps_are_those_of_the_original():
    """Trainer of transformers: whole batches an epoch. 107,392 chunks is the rebuilt corpus."""
    entries = read_experiment("paper").specs
    steps = [entries[name].whole_steps(107_392 * 128 + 1) for name in entries]
    assert steps == [2514, 3356, 20136, 20136]
    assert entries["gpt2-teacher"].arguments(2514)[-2:] == ["--steps", "2514"]


def test_switches_and_lists_become_flags(tmp_path):
    models = MODELS | {"control": {"model": "llama-tiny", "compile": False, "random_offset": True}}
    models["student"] = {"model": "llama-tiny", "teachers": ["teacher"], "teacher_weights": [2]}
    recipe = read_experiment(written(tmp_path, models=models))
    assert recipe.specs["control"].arguments()[2:] == ["--no-compile", "--random-offset"]
    assert recipe.specs["student"].config.teacher_weights == [2.0]


def test_a_factor_is_varied_one_model_a_value(tmp_path):
    recipe = read_experiment(written(tmp_path), ["student.alpha=0,1", "student.kl-reduction=token"])
    assert recipe.specs["student.alpha=1"].config.alpha == 1
    assert recipe.specs["student.alpha=1"].config.weight_decay == 0.5
    assert recipe.specs["student.kl-reduction=token"].config.kl_reduction == "token"
    assert len(recipe.specs) == 6


def test_an_entry_can_take_back_what_another_gives_it(tmp_path):
    models = MODELS | {
        "control": {"model": "llama-tiny-student", "epochs": 4, "random_offset": True},
        "short": {"like": "control", "epochs": None, "steps": 9, "random_offset": False},
    }
    config = read_experiment(written(tmp_path, models=models)).specs["short"].config
    assert (config.epochs, config.steps, config.random_offset) == (None, 9, False)


def test_ensembles_of_other_weights_are_others(tmp_path):
    two = {"model": "llama-tiny", "teachers": ["teacher", "control"]}
    models = MODELS | {
        "even": two,
        "same": two | {"teacher_weights": [2, 2]},
        "uneven": two | {"teacher_weights": [3, 1]},
    }
    result = read_experiment(written(tmp_path, models=models)).ensembles()
    assert sorted(result) == ["teacher&control", "teacher&control&3&1"]
    assert result["teacher&control&3&1"][1] == [3, 1]


def test_a_list_is_varied_in_json(tmp_path):
    vary = ['student.teachers=[["teacher"],["teacher","control"]]']
    vary += ["control.no_decay=norms,norms+embeddings"]
    entries = read_experiment(written(tmp_path), vary).specs
    assert entries['student.teachers=["teacher", "control"]'].teachers == ("teacher", "control")
    assert entries["control.no_decay=norms+embeddings"].config.no_decay == "norms+embeddings"


def test_some_models_bring_their_teachers_along(tmp_path):
    assert list(read_experiment(written(tmp_path)).only(["student"]).specs) == ["teacher", "student"]


def test_the_costs_are_the_arithmetic(tmp_path):
    models = MODELS | {"teacher": {"model": "llama-tiny", "steps": 10, "batch_size": 4}}
    recipe = read_experiment(written(tmp_path, models=models, vocabulary_size=1000))
    result = costs(recipe, 12_801, 8000)  # 100 chunks of 128
    assert result["teacher"].parameters == 524_448
    assert result["teacher"].tokens == 10 * 4 * 128 and result["teacher"].epochs == 0.4
    embedding, last_norm = 1000 * 96, 96
    met = 524_448 - embedding - last_norm
    assert result["teacher"].flops == 6 * met * 5120
    student = result["student"]
    met_by_student = 222_528 - 1000 * 64 - 64
    assert student.flops == (6 * met_by_student + 2 * met) * student.tokens
    models["student"] = models["student"] | {"cache_teachers": "host"}
    recipe = read_experiment(written(tmp_path, models=models, vocabulary_size=1000))
    cached = costs(recipe, 12_801, 8000)["student"]
    head = 1000 * 96
    expected = (6 * met_by_student + 2 * head) * student.tokens + 2 * (met - head) * 12_801
    assert cached.flops == expected


def test_minutes_on_a_card_are_the_arithmetic():
    """60 x 40 % of 989e12 operations a minute; scoring is 2 for each parameter and token."""
    recipe = read_experiment("paper")
    by_model = {name: Cost(10**8, 6, 0, 60 * 0.4 * 989e12) for name in recipe.specs}
    minutes = card_minutes(recipe, by_model, 10**6)
    scoring = minutes.pop("scoring")
    assert minutes == pytest.approx(dict.fromkeys(recipe.specs, 1.0))
    assert scoring == pytest.approx(6 * 2 * 10**8 * 10**6 / 50e12 / 60)  # four models, an ensemble of two
    in_bf16 = dataclasses.replace(recipe, precision="bf16")
    assert card_minutes(in_bf16, by_model, 10**6)["scoring"] < scoring / 7


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models": []}, "models cannot be|JSON object"),
        ({"words": "many"}, "words cannot be 'many'"),
        ({"words": -1}, "words cannot be -1"),
        ({"models": MODELS | {"control": {"like": ["x"]}}}, "cannot be like"),
        ({"wrods": 5}, "a recipe has no 'wrods'"),
        ({"student": "nobody"}, "must be the name of a model"),
        ({"student": "control"}, "the student has no teachers"),
        ({"scored": "previous.pt"}, "choose from best.pt"),
        ({"corpus": "mine"}, "corpus"),
        ({"models": MODELS | {"control": {"model": "llama-tiny", "alpha": 1}}}, "control: .*alpha"),
        ({"models": MODELS | {"control": {"model": "lama"}}}, "control: no preset is called lama"),
        ({"models": MODELS | {"control": {"model": "llama-tiny", "epochs": "x"}}}, "control:"),
        ({"models": MODELS | {"control": {"model": "llama-tiny", "seed": 1}}}, "cannot set seed"),
        ({"models": MODELS | {"control": {"like": "control"}}}, "cannot be like control"),
        ({"models": MODELS | {"control": 5}}, "a model is an object"),
        ({"models": MODELS | {"control": {"model": "llama-tiny", "epoch": 5}}}, "control:.*epoch"),
        ({"models": MODELS | {"../x": {"model": "llama-tiny"}}}, "names a folder"),
        ({"models": {"student": MODELS["student"], **MODELS}}, "must be models above it"),
        ({"models": MODELS | {"-g": {"model": "llama-tiny"}}}, "cannot be the name"),
        ({"models": MODELS | {"a\0": {"model": "llama-tiny"}}}, "cannot be the name"),
        ({"models": MODELS | {"control": {"model": ["llama-tiny"]}}}, "must be a preset"),
        ({"models": MODELS | {"x": {"model": "llama-tiny", "teachers": [1]}}}, "teachers a list of names"),
        ({"models": MODELS | {"x": {"model": "llama-tiny", "teachers": ["teacher"] * 2}}}, "each once"),
        ({"models": MODELS | {"x": {"model": "llama-tiny", "seed_offset": 10**39}}}, "seed_offset a number"),
        ({"models": MODELS | {"x": {"model": "llama-tiny", "shard": True}}}, "cannot set shard"),
        ({"options": {"model": "gpt2-tiny"}}, "give it to single models"),
        ({"options": {"save_at_words": ["1M", "--out", "x"]}}, "save_at_words cannot be"),
        ({"options": {"shape": "a\0"}}, "shape cannot be"),
        ({"control_gain": -5.0}, "control_gain cannot be"),
        ({"control_gain": math.inf}, "control_gain cannot be"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_experiment(written(tmp_path, **changes))


def test_a_file_that_is_none_and_a_variation_of_nothing_are_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_experiment(tmp_path / "x.json")
    with pytest.raises(UserError, match="choose ablations, best, best-58m, beyond, demo"):
        read_experiment("dmeo")
    with pytest.raises(UserError, match="--vary nobody"):
        read_experiment(written(tmp_path), ["nobody.alpha=1"])
    with pytest.raises(UserError, match="no model of recipe mine is called nobody"):
        read_experiment(written(tmp_path)).only(["nobody"])


def test_what_would_be_replaced_or_split_in_silence_is_refused(tmp_path):
    path = written(tmp_path)
    for vary, message in (
        (["control.epochs=6,6"], "6 is there twice"),
        (["control.epochs=6", "control.epochs=6"], "control.epochs=6 is there twice"),
        (["control.shape=hidden_size=64,num_hidden_layers=1"], "a shape has commas itself"),
    ):
        with pytest.raises(UserError, match=message):
            read_experiment(path, vary)
    path.write_text(path.read_text().replace('"models": {', '"models": {"control": {"model": "gpt2-tiny"}, '))
    with pytest.raises(UserError, match="'control' is there twice"):
        read_experiment(path)


def test_a_recipe_takes_from_another_what_it_does_not_say_itself(tmp_path):
    first = written(tmp_path, words=5000, options={"log_every": 7, "save_every": 9})
    second = tmp_path / "second.json"
    student = {"like": "control", "teachers": ["other"]}
    models = {"teacher": None, "other": MODELS["teacher"], "student": None, "taught": student}
    table = {"like": str(first), "options": {"log_every": 8}, "models": models}
    second.write_text(json.dumps(table | {"student": "taught"}))
    recipe = read_experiment(second)
    assert (recipe.name, recipe.words, recipe.student) == ("second", 5000, "taught")
    assert list(recipe.specs) == ["control", "other", "taught"]
    options = {"log_every": 8, "save_every": 9, "weight_decay": 0.5}
    assert recipe.specs["taught"].options == options
    first.write_text("{")
    with pytest.raises(UserError, match=r"second.json: like .*mine.json: it is not JSON"):
        read_experiment(second)
    second.write_text(json.dumps(table | {"like": str(second)}))
    with pytest.raises(UserError, match="cannot be like"):
        read_experiment(second)
