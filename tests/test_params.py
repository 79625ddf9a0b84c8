"""Flags and recipes of the trainer."""

import argparse
import dataclasses

import pytest

from lazyclip.base.errors import UserError
from lazyclip.base.resources import config_root
from training.params import FOREIGN, FOREIGN_VALUES, TrainArgs, make_parser, parse, read_recipe

# The flags of `training.main`. People type these and scripts hold them: a change here is one of the
# public interface and stands in the changelog.
FLAG_TEXT = """
--accum-freq --allow-pipe --audit --augment --batch-size --beta1 --beta2 --classes --config
--dataset-resampled
--dataset-type --device --dry-run --filter --keep --lanes --loader --manifest --max-nonfinite
--resume --save-every-minutes --torchcompile --train-data-upsampling-factors --watchdog-minutes
--epochs --eps --force-image-size --force-quick-gelu --fsdp --gather-with-grad
--global-batch --gpu --gpus --layer-decay --layer-decay-text --lr-image --lr-text --mfu
--grad-checkpointing --no-fsdp
--grad-clip-norm --help --last-eps --last-k --last-kernel --last-pooling --last-score --last-sigma
--local-loss --lock-image --lock-image-unlocked-groups --lock-text --log-every-n-steps --logs --lr
--max-bad-fraction --model --name --no-augment --precision --pretrained --probe-every --report-to
--max-top1-drop
--save-every --seed --templates --threads --train-data --train-num-samples --val-data
--val-num-samples --warmup --wd --window --window-memory --workers
"""

# Those of them that open_clip 3.3's trainer has too, with its spelling.
ALSO_TEXT = """
--accum-freq --batch-size --beta1 --beta2 --dataset-resampled --dataset-type --device --epochs
--eps --resume --torchcompile --train-data-upsampling-factors
--force-image-size
--force-quick-gelu --gather-with-grad --grad-checkpointing --grad-clip-norm --local-loss
--lock-image --lock-image-unlocked-groups --lock-text --log-every-n-steps --logs --lr --model
--name --precision --pretrained --report-to --seed --train-data --train-num-samples --val-data
--val-num-samples --warmup --wd --workers
"""

FLAGS, ALSO_OPEN_CLIPS = FLAG_TEXT.split(), ALSO_TEXT.split()
FIELDS = dataclasses.fields(TrainArgs)
# A value that differs from the default, as typed and as read, for each kind of field.
GIVEN = {"tuple": ("a>1", ("a>1",)), "int": ("7", 7), "float": ("0.25", 0.25),
         "str": ("word", "word")}  # fmt: skip


def actions() -> dict[str, argparse.Action]:
    return {o: a for a in make_parser()._actions for o in a.option_strings if o.startswith("--")}


def flag_of(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def error_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(list(argv))
    return str(caught.value)


def recipe(tmp_path, text: str, name: str = "r.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def theirs() -> set[str]:
    """All flags of open_clip's trainer, from its own parser."""
    seen: list[argparse.ArgumentParser] = []

    def stop(parser, *args, **kwargs):
        seen.append(parser)
        raise InterruptedError

    module = pytest.importorskip("open_clip_train.params")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(InterruptedError):
            module.parse_args([])
    return {o for a in seen[0]._actions for o in a.option_strings if o.startswith("--")}


def test_the_list_of_flags_is_frozen():
    assert sorted(actions()) == sorted(FLAGS)


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
def test_every_setting_has_a_flag_with_help(field):
    action = actions()[flag_of(field)]
    assert action.dest == field.name
    assert action.help
    assert len(action.help) > 5


@pytest.mark.parametrize("field", [f for f in FIELDS if f.name != "config"], ids=lambda f: f.name)
def test_every_flag_arrives_in_its_own_field_alone(field):
    if isinstance(field.default, bool):
        argv, value = [("--no-augment" if field.default else flag_of(field))], not field.default
    else:
        kind = next(k for k in GIVEN if k in str(field.type))
        text, value = GIVEN[kind]
        if "choices" in field.metadata:
            text = value = field.metadata["choices"][-1]
        argv = [flag_of(field), text]
    args = parse(argv).args
    changed = {k: v for k, v in dataclasses.asdict(args).items() if v != getattr(TrainArgs(), k)}
    assert changed == {field.name: value}
    assert type(changed[field.name]) is type(value)


def test_the_defaults_are_those_of_the_interface():
    args = parse([]).args
    assert args.model == "LaSt-ViT-B-16"
    assert (args.beta1, args.beta2, args.eps) == (0.9, 0.98, 1e-6)
    assert (args.batch_size, args.epochs, args.lr, args.wd) == (64, 32, 5e-4, 0.2)
    assert (args.log_every_n_steps, args.workers, args.seed, args.logs) == (10, 4, 0, "./logs")
    assert args.precision is args.warmup is args.grad_clip_norm is args.name is None


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in FLAGS)
    assert "(default: 0.98)" in shown


def test_flags_that_open_clip_has_keep_its_spelling(theirs):
    assert sorted(ALSO_OPEN_CLIPS) == sorted(theirs & set(FLAGS) - {"--help"})


def test_every_flag_of_open_clip_is_ours_or_answered_by_name(theirs):
    assert theirs - set(FLAGS) == {f"--{name}" for name in FOREIGN}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_a_flag_of_open_clip_that_is_lacking_is_answered_by_name(name):
    assert f"--{name}" not in actions()
    for argv in ([f"--{name}"], [f"--{name}", "1"], [f"--{name}=1"]):
        text = error_of("--train-data", "x.tar", *argv)
        assert text == f"--{name} is open_clip's: {FOREIGN[name]}"


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_what_the_answer_tells_to_type_exists(name):
    named = [w.strip(",;.()") for w in FOREIGN[name].split() if w.startswith("--")]
    assert set(named) <= set(FLAGS)


def test_an_unknown_flag_names_the_nearest():
    text = error_of("--batch-sice", "3")
    assert "unknown flag --batch-sice" in text
    assert "nearest: --batch-size" in text


def test_flags_are_not_abbreviated():
    assert "unknown flag --batch" in error_of("--batch", "3")


def test_words_of_an_unquoted_pattern_are_explained():
    text = error_of("--train-data", "0.tar", "1.tar", "2.tar")
    assert "'1.tar' belongs to no flag" in text
    assert "quote" in text


def test_a_value_of_the_wrong_kind_names_the_flag_and_gives_an_example():
    text = error_of("--batch-size", "many")
    assert "--batch-size" in text
    assert "many" in text
    assert "an example: python -m training.main" in text


def test_recipes_stand_over_defaults_and_flags_over_recipes(tmp_path):
    file = recipe(tmp_path, "lr: 0.001\nwd: 0.05\nepochs: 7\nlock-text: true\n")
    parsed = parse(["--config", file, "--wd", "0.1", "--epochs", "7", "--seed", "2"])
    args = parsed.args
    assert (args.lr, args.wd, args.epochs, args.seed, args.lock_text) == (1e-3, 0.1, 7, 2, True)
    assert args.batch_size == TrainArgs().batch_size
    assert parsed.overrode == ("wd",)


def test_a_flag_given_with_its_default_still_wins_over_the_recipe(tmp_path):
    file = recipe(tmp_path, "seed: 5\naugment: false\n")
    parsed = parse(["--config", file, "--seed", "0", "--augment"])
    assert (parsed.args.seed, parsed.args.augment) == (0, True)
    assert parsed.overrode == ("seed", "augment")


def test_a_recipe_may_have_one_base_beside_it(tmp_path):
    recipe(tmp_path, "lr: 0.001\nwd: 0.05\n", "below.yaml")
    file = recipe(tmp_path, "wd: 0.02\nbase: below.yaml\n")
    assert read_recipe(file) == {"lr": 1e-3, "wd": 0.02}


def test_a_base_of_a_base_is_refused(tmp_path):
    recipe(tmp_path, "lr: 0.001\n", "a.yaml")
    recipe(tmp_path, "base: a.yaml\n", "b.yaml")
    file = recipe(tmp_path, "base: b.yaml\n")
    with pytest.raises(UserError, match="one level only"):
        read_recipe(file)


def test_an_unknown_key_names_the_file_and_the_nearest_key(tmp_path):
    file = recipe(tmp_path, "batch_sise: 3\n")
    text = error_of("--config", file)
    assert text.startswith(f"{file}: unknown key 'batch_sise'; nearest: batch_size")


@pytest.mark.parametrize("key", ["config", "dry_run", "gpus", "gpu", "mfu"])
def test_a_recipe_cannot_hold_what_belongs_to_one_call(tmp_path, key):
    assert f"unknown key '{key}'" in error_of("--config", recipe(tmp_path, f"{key}: x\n"))


def test_yaml_floats_without_a_dot_are_numbers(tmp_path):
    args = parse(["--config", recipe(tmp_path, "lr: 5e-4\neps: 1e-6\nwd: 1\n")]).args
    assert (args.lr, args.eps, args.wd) == (5e-4, 1e-6, 1.0)
    assert isinstance(args.wd, float)


@pytest.mark.parametrize(
    "line", ["epochs: 1.5", "epochs: many", "lr: fast", "lock_image: 1", "name: 3", "lr: true"]
)
def test_a_value_of_the_wrong_type_names_key_and_type(tmp_path, line):
    file = recipe(tmp_path, line + "\n")
    text = error_of("--config", file)
    assert text.startswith(f"{file}: {line.split(':')[0]} is ")
    assert "expected" in text


def test_choices_hold_in_recipes_too(tmp_path):
    text = error_of("--config", recipe(tmp_path, "precision: fp16\n"))
    assert "use amp_bf16 or fp32" in text


def test_pooling_settings_of_a_recipe_are_read_like_the_flags(tmp_path):
    args = parse(["--config", recipe(tmp_path, "last_k: 0.25\nlast_pooling: mean\n")]).args
    assert (args.last_k, args.last_pooling) == ("0.25", "mean")


def test_an_unknown_recipe_is_named():
    assert "no-such-recipe" in error_of("--config", "no-such-recipe")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch-size", "0"), ("--epochs", "0"), ("--workers", "-1"), ("--save-every", "0"),
        ("--log-every-n-steps", "0"), ("--probe-every", "0"), ("--warmup", "-1"), ("--lr", "-1"),
        ("--lr", "nan"), ("--wd", "-0.1"), ("--eps", "-1"), ("--beta1", "1"), ("--beta2", "-0.5"),
        ("--grad-clip-norm", "-1"), ("--max-bad-fraction", "-0.1"), ("--max-bad-fraction", "1.5"),
        ("--max-bad-fraction", "nan"), ("--train-num-samples", "0"), ("--val-num-samples", "0"),
        ("--threads", "0"), ("--keep", "-1"), ("--lanes", "0"), ("--window", "0"),
        ("--window-memory", "-1"), ("--accum-freq", "0"),
        ("--save-every-minutes", "-1"), ("--watchdog-minutes", "-1"), ("--max-nonfinite", "0"),
        ("--loader", "fast"), ("--audit", "all"), ("--force-image-size", "0"),
        ("--lock-image-unlocked-groups", "-1"),
        ("--gpus", "0"), ("--gpu", "v100"), ("--global-batch", "0"), ("--lr-image", "-1"),
        ("--lr-text", "nan"), ("--layer-decay", "1.1"), ("--layer-decay-text", "-0.5"),
        ("--max-top1-drop", "0"), ("--max-top1-drop", "5"), ("--max-top1-drop", "nan"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_with_the_flag(flag, value):
    assert error_of(flag, value).startswith(flag)


def test_conditions_add_up_and_a_recipe_may_list_them(tmp_path):
    assert parse(["--filter", "a>=1", "--filter", "b<2"]).args.filter == ("a>=1", "b<2")
    file = recipe(tmp_path, "filter:\n- a>=1\n- b<2\n")
    assert parse(["--config", file]).args.filter == ("a>=1", "b<2")
    assert "expected a list of texts" in error_of("--config", recipe(tmp_path, "filter: 3\n"))


def test_an_audit_writes_digests_unless_asked_for_ids():
    assert [parse(words).args.audit for words in ([], ["--audit"], ["--audit", "ids"])] == [
        None, "digest", "ids",
    ]  # fmt: skip


def test_locking_both_towers_is_refused():
    assert "nothing to train" in error_of("--lock-image", "--lock-text")


@pytest.mark.parametrize(
    "file", sorted((config_root() / "recipes").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_shipped_recipe_parses(file):
    args = parse(["--config", file.stem]).args
    assert args != TrainArgs(config=file.stem)
    first = file.read_text().splitlines()[0]
    assert first.startswith("#")


@pytest.mark.parametrize(("key", "value"), sorted(FOREIGN_VALUES))
def test_values_of_open_clip_that_are_not_taken_are_answered_by_name(key, value):
    flag = f"--{key.replace('_', '-')}"
    text = error_of(flag, value)
    assert text == f"{flag} {value} is open_clip's: {FOREIGN_VALUES[key, value]}"


def test_the_curves_may_be_named_in_a_list_and_each_name_is_looked_at():
    assert parse(["--report-to", "tensorboard,none"]).args.report_to == "tensorboard,none"
    assert "wandb is open_clip's" in error_of("--report-to", "tensorboard,wandb")
    assert "--report-to tensorbord is not known" in error_of("--report-to", "tensorbord")
