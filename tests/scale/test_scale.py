"""docs/scale.md: its commands are ones that the programs named there take."""

import re
import shlex
import subprocess
import sys

import pytest
import typer.main
from documented import PAGE, SCRIPTS
from visibench import cli
from visibench.evals.answers import lmms_model
from visibench.evals.tasks import lmms_eval

BLOCKS = [re.sub("^    ", "", block, flags=re.M) for block in re.findall(r"(?:^    .+\n)+", PAGE, re.MULTILINE)]
LINES = [line for block in BLOCKS + SCRIPTS for line in re.sub(r" \\\n +", " ", block).splitlines()]
PROGRAM = re.compile(r"\b(?:visibench|lmms-eval|torchrun|ray) [^&|>]+")
COMMANDS = [found[0] for line in LINES if not line.startswith(("#", "pip ")) and (found := PROGRAM.search(line))]


def takes_visibench(words: list[str]) -> None:
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)


def takes_lmms_eval(words: list[str]) -> None:
    from lmms_eval.__main__ import parse_eval_args

    sys.argv = ["lmms-eval", *words]
    _, parsed = parse_eval_args()
    given = lmms_model._arguments(lmms_model.Visibench, parsed.model_args, {"batch_size": parsed.batch_size})
    lmms_model._method(given["method"], given.get("method_args", ""), given["pretrained"])


def takes_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    assert parsed.module
    programs = {"lmms_eval": takes_lmms_eval, "visibench": takes_visibench}
    programs[parsed.training_script](parsed.training_script_args)


def takes_ray(words: list[str]) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    scripts.cli.commands[words[0]].make_context(words[0], words[1:])


PROGRAMS = {
    "visibench": takes_visibench,
    "lmms-eval": takes_lmms_eval,
    "torchrun": takes_torchrun,
    "ray": takes_ray,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_that_its_program_takes(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert lmms_eval.lmms  # imported first: lmms-eval's import takes over the process
    program, *words = shlex.split(re.sub(r"\$\w+", "8", command), comments=True)
    PROGRAMS[program](words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_one_that_bash_takes(script):
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
