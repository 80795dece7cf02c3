"""The `piste` command: a thin layer over the library. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piste import command_line
from piste.errors import BadInput, PisteError

if TYPE_CHECKING:
    from rich.console import Console

    from piste.reporting import JsonLines, ProgressBar
    from piste.running import RunResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (0, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM)."""
    options, rest = command_line.parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.command == "submit":
            return _submit(options, rest)
        fields = command_line.fields_of(options.command, rest)
        return int(_ACTS[options.command](options, fields) or 0)
    except KeyboardInterrupt as interrupt:
        code = getattr(interrupt, "exit_code", 130)
        if arguments is None:  # the process is ours, all is recorded; unloading torch and Ray takes seconds
            sys.stdout.flush()
            os._exit(code)
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PisteError as error:
        if options.debug:
            raise
        print(f"piste: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if options.debug:
            raise
        line = str(error).strip().partition("\n")[0]
        print(f"piste: {type(error).__name__}: {line} (--debug shows where)", file=sys.stderr)
        return 1


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _observer(options: argparse.Namespace) -> ProgressBar | JsonLines:
    from piste.reporting import JsonLines, ProgressBar

    return JsonLines() if options.json else ProgressBar(_console())


def _ls(options: argparse.Namespace, _fields: dict[str, Any]) -> None:
    from piste import catalog

    kinds = [options.kind] if options.kind else list(catalog.KINDS)
    for kind in kinds:
        if kind in {"runs", "sweeps"}:
            _ls_runs() if kind == "runs" else _ls_sweeps()
            continue
        known = catalog.members(kind)
        width = max((len(name) for name in known), default=0)
        print(f"{kind}" if known else f"{kind}: none")
        for member in known.values():
            print(f"  {member.name:<{width}}  {member.summary}")
    if options.kind == "optimizers":
        print("and every class of torch.optim by name, such as adamw or sgd")


def _ls_runs() -> None:
    from piste.config import method_of
    from piste.ledger import open_ledger
    from piste.reporting import age

    ledger = open_ledger()
    print(f"runs in {ledger.name}")
    runs = [(run, method_of(run.config)["name"]) for run in ledger.runs(limit=50)]
    width = max((len(method) for _, method in runs), default=0)
    for run, method in runs:
        print(f"  {run.id:<24} {run.status:<12} {method:<{width}}  {age(run.created):<12} {run.error or ''}")


def _ls_sweeps() -> None:
    from piste.ledger import open_ledger
    from piste.reporting import age

    ledger = open_ledger()
    print(f"sweeps in {ledger.name}")
    for sweep in ledger.sweeps.newest(limit=50):
        trials = f"{ledger.sweeps.count(sweep.id)} of {sweep.trials or '?'} trials"
        print(
            f"  {sweep.id:<28} {sweep.status:<12} {trials:<20} {age(sweep.created):<12} {sweep.error or ''}"
        )


def _run(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    for name in () if options.local or options.show else options.recipes:
        _check_resources(name, fields)
    from piste import run_command, running
    from piste.config import to_toml

    configs = []
    for name in options.recipes:
        overrides = fields | (running.ONE_WORKER if options.local else {})
        configs.append((Path(name).stem, running.load_recipe(name, overrides)))
    if options.show:
        print("\n".join(to_toml(config) for _, config in configs), end="")
        return 0
    from piste.ledger import open_ledger

    ledger = open_ledger()
    results: list[RunResult] = []
    with _shared_cluster(configs, options.local):
        for name, config in configs:
            run_id = running.plan(ledger, name, config)
            results.append(run_command.to_the_end(ledger, run_id, options.local, _observer(options)))
            if results[-1].status == "interrupted":
                break
    _report(ledger, [r.id for r in results], options, results)
    return run_command.exit_code(results[-1])


def _check_resources(recipe: str, fields: dict[str, Any], sweep: bool = False) -> None:
    """Refuses impossible resources before the workload, torch or Ray is imported."""
    from pydantic import ValidationError

    from piste import catalog
    from piste.config import Resources, override, read_toml
    from piste.preflight import check_resources

    table = override(read_toml(catalog.recipe_path(recipe)), fields)
    if sweep:  # a plain value in the space is set in every trial
        space = table.get("sweep", {}).get("space", {})
        table = override(table, {key: value for key, value in space.items() if not isinstance(value, dict)})
    with suppress(ValidationError):  # named, with the rest of the recipe, when it is validated
        check_resources(Resources.model_validate(table.get("resources", {})))


def _shared_cluster(configs: Sequence[tuple[str, Any]], local: bool) -> Any:
    """One Ray for all recipes of a call."""
    from contextlib import nullcontext

    if local or len(configs) == 1 or len({c.resources.address for _, c in configs}) > 1:
        return nullcontext()
    from piste.training import cluster

    return cluster(configs[0][1].resources)


def _report(
    ledger: Any, run_ids: Sequence[str], options: argparse.Namespace, results: Sequence[RunResult]
) -> None:
    """Table, picture and the line that opens the user interface."""
    from rich.console import Console

    from piste import learning_curves, reporting
    from piste.home import home

    rows = reporting.summary(ledger, run_ids)
    if getattr(options, "json", False):
        print(json.dumps({"runs": rows}))
        return
    console = Console()
    console.print(reporting.table(rows))
    name = run_ids[0] if len(run_ids) == 1 else f"{run_ids[0]}-and-{len(run_ids) - 1}-more"
    picture = home() / "pictures" / f"{name}.png"
    if len(run_ids) == 1 or learning_curves.of_runs(ledger, run_ids, picture) is None:
        reporting.loss_curves(ledger, run_ids, picture)
    console.print(f"curves        {os.path.relpath(picture)}", soft_wrap=True, highlight=False)
    console.print(f"open MLflow   piste ui   # {_address(ledger, results)}", soft_wrap=True, highlight=False)


def _address(ledger: Any, results: Sequence[RunResult]) -> str:
    """The MLflow page of one run, or the comparison page of several."""
    from piste import reporting, tracking

    uri = tracking.tracking_uri(ledger.run(results[0].id).config["tracking"]["uri"])
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    shown = {r.mlflow_run_id: r.mlflow_experiment_id for r in results if r.mlflow_run_id}
    if not shown:
        return base
    first, experiment = next(iter(shown.items()))
    if len(shown) == 1:
        return f"{base}/#/experiments/{experiment}/runs/{first}?workflowType=machine_learning"
    return reporting.comparison_url(base, str(experiment), list(shown))


def _resume(options: argparse.Namespace, _fields: dict[str, Any]) -> int:
    from piste import run_command, running
    from piste.ledger import open_ledger

    ledger = open_ledger()
    run_id = running.resumable(ledger, options.run, options.local)
    if ledger.run(run_id).is_stream:
        from piste import stream_command

        return stream_command.follow(ledger, run_id, options)
    result = run_command.to_the_end(ledger, run_id, options.local, _observer(options))
    _report(ledger, [run_id], options, [result])
    return run_command.exit_code(result)


def _rerun(options: argparse.Namespace, _fields: dict[str, Any]) -> None:
    from piste import running
    from piste.ledger import open_ledger

    observer: Any = _observer(options)
    if open_ledger().run(options.run).is_stream:
        from piste.stream_command import observer_of

        observer = observer_of(options)
    compared = running.rerun(options.run, local=options.local, observer=observer)
    for change in compared.changed:
        print(f"changed since {compared.first}: {change}")
    if options.json:
        print(
            json.dumps(
                {"first": compared.first, "second": compared.second.id, "differences": compared.metrics}
            )
        )
        return
    different = {key: gap for key, gap in compared.metrics.items() if gap > 0.0}
    if not different:
        count = len(compared.metrics)
        print(f"{compared.second.id} repeats {compared.first} bit for bit: {count} metrics, difference 0")
    for key, gap in different.items():
        print(f"  {key:<28} differs by at most {gap:.3g}")


def _call(options: argparse.Namespace, fields: dict[str, Any]) -> None:
    from piste import running

    answer = running.call(options.run, options.verb, **fields)
    print(answer if isinstance(answer, str) else json.dumps(answer, indent=1, ensure_ascii=False))


def _sweep(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    if (options.recipe is None) == (options.resume is None):
        raise BadInput("name a recipe, or a sweep with --resume")
    if options.extend and options.resume is None:
        raise BadInput("--extend goes with --resume SWEEP")
    if options.recipe is not None and not options.local and not options.dry_run:
        _check_resources(options.recipe, fields, sweep=True)
    from piste import sweep_command

    return sweep_command.execute(options, fields)


def _stream(options: argparse.Namespace, fields: dict[str, Any]) -> int:
    if options.recipe is None and options.watch is None:
        raise BadInput("name a recipe, or a run with --watch")
    if options.metric is not None and options.watch is None:
        raise BadInput("--metric goes with --watch RUN")
    if not options.local and options.watch is None:
        _check_resources(options.recipe, fields)
    from piste import stream_command

    return stream_command.execute(options, fields)


def _study(options: argparse.Namespace, _fields: dict[str, Any]) -> int:
    from rich.console import Console

    from piste import studies, verdicts
    from piste.home import home
    from piste.reporting import ProgressBar
    from piste.sweep_reporting import SweepProgress

    for name in options.studies:
        studies.load_study(name)  # a mistyped one is refused before the first is measured
    console, unexpected = Console(stderr=True), 0
    for name in options.studies:
        found = studies.study(
            name,
            local=options.local,
            fresh=options.fresh,
            scale=options.scale,
            observer=ProgressBar(console),
            sweep_observer=SweepProgress(console),
        )
        unexpected += len(verdicts.failed(found))
        if options.json:
            print(json.dumps({"study": name, "verdicts": verdicts.rows(found)}))
        else:
            shown = Console()
            shown.print(verdicts.table(found))
            path = os.path.relpath(home() / "studies" / f"{name}.txt")
            shown.print(f"report        {path}", soft_wrap=True, highlight=False)
    return 1 if unexpected else 0


def _compare(options: argparse.Namespace, _fields: dict[str, Any]) -> None:
    from piste import running, tracking
    from piste.ledger import open_ledger

    if bool(options.runs) == (options.sweep is not None):
        raise BadInput("name runs, or a sweep with --sweep")
    if options.runs and options.equal_budgets != "all":
        raise BadInput("--equal-budgets goes with --sweep SWEEP")
    ledger = open_ledger()
    if options.sweep is not None:
        from piste import sweep_command

        sweep_id = ledger.sweeps.get(options.sweep).id
        sweep_command.report(ledger, sweep_id, options.json, options.equal_budgets)
        return
    ids = [ledger.run(name).id for name in options.runs]
    results = []
    for run_id in ids:
        uri = tracking.tracking_uri(ledger.run(run_id).config["tracking"]["uri"])
        experiment, shown = tracking.find_run(uri, run_id) or (None, None)
        found = {"mlflow_run_id": shown, "mlflow_experiment_id": experiment}
        results.append(running.result(ledger, run_id, found))
    _report(ledger, ids, options, results)


def _submit(options: argparse.Namespace, rest: Sequence[str]) -> int:
    options.words = [options.verb, *rest]
    asked, more = command_line.parse(options.words)
    fields = command_line.fields_of(asked.command, more)
    from piste import job_command

    return job_command.submit(options, asked, fields)


def _jobs(options: argparse.Namespace, _fields: dict[str, Any]) -> int:
    from piste import job_command

    return job_command.show(options)


def _sync(options: argparse.Namespace, _fields: dict[str, Any]) -> None:
    from piste import tracking
    from piste.ledger import open_ledger

    ledger = open_ledger()
    names: list[tuple[tracking.Kind, str]] = [("run", ledger.run(name).id) for name in options.runs]
    if not names:
        names = [("run", run.id) for run in ledger.runs()]
        names += [("sweep", sweep.id) for sweep in ledger.sweeps.newest()]
    remaining = tracking.sync(ledger, names)
    print(f"{len(names)} runs and sweeps in step with MLflow, {sum(remaining.values())} rows pending")


def _ui(options: argparse.Namespace, _fields: dict[str, Any]) -> None:
    from piste import tracking

    uri = tracking.tracking_uri()
    if uri.startswith("http"):
        print(f"MLflow runs at {uri}")
        return
    if (address := tracking.serving(uri)) is not None:
        print(f"MLflow on {uri} runs at {address}")
        return
    tracking.client(uri)  # creates or upgrades the store before a server opens it

    def ready(address: str) -> None:
        print(f"MLflow on {uri} at {address} (Ctrl-C ends it)", flush=True)

    tracking.serve(uri, options.port, ready)


_ACTS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], int | None]] = {
    "ls": _ls,
    "run": _run,
    "sweep": _sweep,
    "stream": _stream,
    "study": _study,
    "resume": _resume,
    "rerun": _rerun,
    "call": _call,
    "compare": _compare,
    "jobs": _jobs,
    "sync": _sync,
    "ui": _ui,
}
