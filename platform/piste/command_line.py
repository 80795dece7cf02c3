"""The words of the `piste` command: its commands, their options, and a recipe's fields among them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from piste.errors import BadInput

JOBS = ("run", "sweep", "stream", "study", "resume")  # what can be sent to a cluster
FLAGS = {"--skip-bad": ("data.skip_bad", True)}  # short for a recipe's field and its value


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and the words that are none of them."""
    return _parser().parse_known_args(_joined(words))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    follow = argparse.ArgumentParser(add_help=False)
    follow.add_argument("--local", action="store_true", help="in this process, without Ray, one worker")
    follow.add_argument(
        "--json", action="store_true", help="machine-readable lines instead of a progress bar"
    )

    parser = argparse.ArgumentParser(
        prog="piste", description="Experiments on gradient-descent algorithms: on Ray, torch and MLflow."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # A recipe's fields are options too (`--optimizer.lr`), so that abbreviations would swallow some.
        made = commands.add_parser(
            name, help=help, description=help, parents=[common, *parents], allow_abbrev=False
        )
        return made

    from piste.catalog import KINDS

    listing = add("ls", "what there is: workloads, optimizers, recipes, studies, runs, sweeps")
    listing.add_argument("kind", nargs="?", choices=[*KINDS, "runs", "sweeps"])
    running = add(
        "run",
        "run recipes, one after the other, and compare them; --section.field VALUE overrides; "
        "--skip-bad leaves out images that cannot be read",
        follow,
    )
    running.add_argument("recipes", nargs="+", metavar="RECIPE")
    running.add_argument("--show", action="store_true", help="print the resolved recipe and stop")
    sweeping = add(
        "sweep",
        "search a recipe's space on Ray Tune, or continue a sweep; --section.field VALUE overrides",
        follow,
    )
    sweeping.add_argument("recipe", nargs="?", metavar="RECIPE")
    sweeping.add_argument("--resume", metavar="SWEEP", help="run what it lacks; fields make its runs longer")
    sweeping.add_argument("--extend", type=int, default=0, metavar="N", help="so many trials more")
    sweeping.add_argument("--dry-run", action="store_true", help="print the trials and what they cost")
    sweeping.add_argument("--fresh", action="store_true", help="compute again what is there already")
    streaming = add(
        "stream",
        "follow streams with detectors of shifts, on Ray actors; --section.field VALUE overrides",
        follow,
    )
    streaming.add_argument("recipe", nargs="?", metavar="RECIPE")
    streaming.add_argument("--watch", metavar="RUN", help="follow a metric of a run in progress")
    streaming.add_argument("--metric", metavar="KEY", help="which; default: train/loss")
    streaming.add_argument("--name", help="the streams' id: the same recipe under it goes on")
    studying = add("study", "a paper's claims, measured; exit 1 where a verdict is not the recorded one")
    studying.add_argument("studies", nargs="+", metavar="STUDY")
    studying.add_argument("--local", action="store_true", help="in this process, without Ray")
    studying.add_argument("--fresh", action="store_true", help="compute again what is there already")
    studying.add_argument("--scale", help="one of the study's scales; default: its first")
    studying.add_argument("--json", action="store_true", help="machine-readable")
    add("resume", "continue a run from its last checkpoint", follow).add_argument("run")
    add("rerun", "repeat a run from its provenance and show the numeric difference", follow).add_argument(
        "run"
    )
    calling = add("call", "ask a finished run, for example: piste call RUN sample --prompt 'In the'")
    calling.add_argument("run")
    calling.add_argument("verb")
    comparing = add("compare", "a table and pictures of some runs, or of a sweep's trials")
    comparing.add_argument("runs", nargs="*", metavar="RUN")
    comparing.add_argument("--sweep", metavar="SWEEP", help="compare the cells of a sweep")
    comparing.add_argument(
        "--equal-budgets",
        nargs="?",
        const="cells",
        default="all",
        choices=["cells", "seconds"],
        help="every group with as much tuning as the one that got least",
    )
    comparing.add_argument("--json", action="store_true", help="machine-readable")
    sending = add("submit", "send a command to a Ray cluster as a job, and follow its log")
    sending.add_argument("verb", choices=JOBS, help="the command; its own arguments and options follow")
    sending.add_argument("--address", help="the cluster's dashboard, http://HOST:8265")
    sending.add_argument("--id", help="the job's id: the same command under the same id is one job")
    sending.add_argument("--folder", metavar="DIR", help="sent with the job; default: where the recipe lies")
    sending.add_argument("--python", default=sys.executable, help="the cluster's interpreter")
    sending.add_argument("--driver-cpus", type=float, default=0.0, help="none: it runs on the head")
    sending.add_argument("--no-follow", dest="follow", action="store_false", help="return when it is sent")
    sending.add_argument("--json", action="store_true", help="machine-readable; does not follow")
    showing = add("jobs", "the jobs, their logs and status; stop one")
    showing.add_argument("action", nargs="?", choices=["logs", "status", "stop"])
    showing.add_argument("job", nargs="?", metavar="ID")
    showing.add_argument("-f", "--follow", action="store_true", help="the log as it grows")
    showing.add_argument("--json", action="store_true", help="machine-readable")
    add("sync", "push what MLflow still lacks").add_argument("runs", nargs="*", metavar="RUN")
    serving = add("ui", "MLflow's user interface on the store in use")
    serving.add_argument("--port", type=int, default=5000)
    return parser


def _joined(words: Sequence[str]) -> list[str]:
    """`--section.field VALUE` as `--section.field=VALUE`, so that no VALUE is taken for a recipe or a run."""
    joined: list[str] = []
    for word in words:
        before = joined[-1] if joined else ""
        field = before.startswith("--") and "." in before.partition("=")[0] and "=" not in before
        if field and not word.startswith("--"):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def fields_of(command: str, rest: Sequence[str]) -> dict[str, Any]:
    """A recipe's fields among a command's words: `--section.field VALUE`, `--section.field=VALUE`, flags.

    Raises:
        BadInput: Something else is among them, or the command takes none.
    """
    from piste.config import parse_value

    fields: dict[str, Any] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise BadInput(f"unexpected argument {word!r}")
        name, equals, value = word[2:].partition("=")
        if command not in {"run", "sweep", "stream", "call"}:
            raise BadInput(f"{command} takes no --{name}")
        if word in FLAGS:
            field, setting = FLAGS[word]
            fields[field] = setting
            continue
        text = value if equals else next(words, None)
        if text is None:
            raise BadInput(f"--{name} needs a value")
        fields[name] = parse_value(text)
    return fields
