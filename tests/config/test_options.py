"""Every number an option takes has bounds, what has no effect is said, and the help is short."""

import dataclasses
import math
import re
import sys
import warnings

import pytest

from fastbert import cli
from fastbert._version import __version__
from fastbert.check import InputError
from fastbert.config.distill import DistillConfig
from fastbert.config.finetune import FinetuneConfig
from fastbert.config.options import check_options, text_of
from fastbert.config.pretrain import PretrainConfig

CONFIGS = {
    PretrainConfig: {},
    DistillConfig: {"teacher": "t"},
    FinetuneConfig: {"task": "qa", "train": "x", "dev": "x", "model": "m"},
}
NUMBERS = [
    (config, field.name)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if any(kind in str(field.type) for kind in ("int", "float")) and "tuple" not in str(field.type)
    if not field.metadata["shown"]["hidden"]
]


@pytest.mark.parametrize(("config", "name"), NUMBERS, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e9, 1e300], ids=str)
def test_every_number_has_bounds(config, name, value):
    required = dict(CONFIGS[config])
    if name == "dev_share":
        required.pop("dev")
    free = {"null_threshold": (-1e9, 1e300)}.get(name, ())
    has_no_top = name in ("learning_rate", "weight_decay", "max_grad_norm", "nsp_weight",
                          "temperature", "soft_weight", "mlm_weight", "cosine_weight")  # fmt: skip
    if value in free or (value == 1e300 and has_no_top):
        return
    value = int(value) if abs(value) == 1e9 and "bool" not in str(value) else value
    if value == 1e300 and "int" in str(config.__dataclass_fields__[name].type):
        value = 10**30
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: .*, got"):
        config(**required, **{name: value})


def test_gamma_is_a_share_but_of_one_scheme():
    assert PretrainConfig(masking="bigram-kn", gamma=4.0).gamma == 4.0
    with pytest.raises(InputError, match="--gamma: expected above 0 and at most 1, got 1000000000"):
        PretrainConfig(masking="blank", gamma=1e9)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (PretrainConfig, {"gamma": 0.5}, "--gamma 0.5 has no effect with --masking bert"),
        (DistillConfig, {"short_seq_prob": 0.5}, "--short-seq-prob 0.5 has no effect"),
        (PretrainConfig, {"segmenter": "spaces"}, "--segmenter spaces has no effect"),
        (PretrainConfig, {"tokenizer": "t", "vocab_size": 400}, "--vocab-size 400 has no effect"),
        (FinetuneConfig, {"label_separator": "|"}, "--label-separator | has no effect"),
        (FinetuneConfig, {"delimiter": ";"}, "--delimiter ; has no effect with --task qa"),
    ],
)
def test_what_has_no_effect_is_said(config, options, message):
    with pytest.warns(UserWarning, match=re.escape(message)):
        config(**CONFIGS[config], **options)


def test_what_has_an_effect_is_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PretrainConfig(masking="unigram", gamma=0.5)
        PretrainConfig(masking="span", segmenter="spaces")
        PretrainConfig(short_seq_prob=0.5)
        FinetuneConfig(task="choice", train="x", dev="x", model="m", delimiter=";",
                       choice_column=("a",))  # fmt: skip


def test_text_in_an_encoding_that_cannot_hold_it():
    assert text_of("caf\udcc3\udca9", "TEXT") == "café"
    assert text_of("café", "TEXT") == "café"
    with pytest.raises(InputError, match="TEXT: not UTF-8"):
        text_of("caf\udce9", "TEXT")
    config = FinetuneConfig(**CONFIGS[FinetuneConfig] | {"text_column": "t\udcc3\udca9"})
    assert config.text_column == "té"
    check_options(config)


COMMANDS = ["pretrain", "distill", "finetune", "predict", "embed", "export", "serve", "fill-mask",
            "info"]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_at_most_two_screens(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["fastbert", command, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 100
    assert not any("list[" in line for line in lines)  # Python's name for what may be repeated
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    if command in ("pretrain", "distill", "finetune"):
        assert groups == ["Data:", "Model:", "Optimisation:", "Run and output:"]
    elif command != "serve":
        assert groups == ["Options:"]
    assert lines[-1].startswith(f"  Example: fastbert {command}")  # in one line, to be copied


def help_of(command, monkeypatch, capsys):
    """The help's words about each option, by the option's name."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["fastbert", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    _, *options = re.split(r"\n  (?=--)", capsys.readouterr().out)
    return {text.split()[0].partition("/")[0]: " ".join(text.split()) for text in options}


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("finetune", ["--task", "--train", "--model"]),
        ("serve", ["--model"]),
        ("predict", ["--model", "--input", "--out"]),
        ("pretrain", []),
    ],
)
def test_the_help_says_what_is_required_and_so_does_the_command(
    command, required, monkeypatch, capsys
):
    said = help_of(command, monkeypatch, capsys)
    assert [name for name, text in said.items() if "[required]" in text] == required
    assert "--no-truncate" not in " ".join(said.values())  # which would be the default
    monkeypatch.setattr(sys, "argv", ["fastbert", command])
    if required:
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert f"Missing option '{required[0]}'" in capsys.readouterr().err


def test_the_help_of_distill_begins_each_group_with_its_own_options(monkeypatch, capsys):
    names = list(help_of("distill", monkeypatch, capsys))
    assert names[0] == "--corpus"
    assert names.index("--teacher") < names.index("--preset") < names.index("--temperature")


def test_the_command_alone_names_each_command_in_a_sentence_and_its_version(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for argument, first in (("--help", "Usage: "), ("--version", f"fastbert {__version__}")):
        monkeypatch.setattr(sys, "argv", ["fastbert", argument])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr().out
        assert end.value.code == 0
        assert said.startswith(first)
        assert "..." not in said.partition("Commands:")[2]  # as where a sentence is cut off
