"""Audit a collection of small models: does the audit crash, and what does it find?

    python benchmarks/zoo.py --zoo FOLDER [--every 8] [--modes 16-true bf16-true 16-mixed bf16-mixed] [--no-gradients]
                             [--names llama gpt2 …] [--length 250] [--trained-like]
                             [--json FILE [--resume]] [--limit SECONDS] [--jobs 2]

FOLDER holds a ``zoo.py`` with ``ZOO``, a mapping whose keys are names, and ``build(name, seed=0, trained_like=False,
length=20)``, which returns ``(model, args, kwargs)``. Each model is audited in a process of its own with a time limit,
so that a crash or a hang of one is recorded and takes nothing else along; torch is imported once, in the server that
these processes are forked from. Caches are switched on wherever a configuration has them: they are what misleads an
audit most.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODES = ("16-true", "bf16-true", "16-mixed", "bf16-mixed")
PRELOADED = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "precision_runtime",
    "precision_runtime.auditing",
    "zoo",
)


def main() -> int:
    """Audit the models chosen and print what came out. Return 1 where an audit crashed or hung."""
    options = parse()
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    os.environ |= {"OMP_NUM_THREADS": str(threads_of(options)), "PYTHONWARNINGS": "ignore"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(options.zoo), *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    names = options.names or listed(options.zoo)[options.offset :: options.every]
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.resume else []
    known = {row["name"] for row in rows}
    names = [name for name in names if name not in known]
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        task = progress.add_task("zoo", total=len(names))
        for future in concurrent.futures.as_completed([pool.submit(audited, name, options, context) for name in names]):
            found = future.result()
            rows += found
            progress.update(task, advance=1, description=found[0]["name"])
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    rows.sort(key=lambda row: (row["name"], row["mode"]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    show(rows)
    return int(any(row["crash"] for row in rows))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zoo", type=Path, required=True, help="the folder that holds zoo.py")
    parser.add_argument("--every", type=int, default=8, help="take every N-th name in alphabetical order (default 8)")
    parser.add_argument("--offset", type=int, default=0, help="start at this name (default 0)")
    parser.add_argument("--names", nargs="+", help="these models instead")
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--no-gradients", dest="gradients", action="store_false", help="judge the forward only")
    parser.add_argument("--no-cache", dest="cache", action="store_false", help="leave caches as the zoo sets them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model in all modes (default 300)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="models at a time")
    parser.add_argument("--length", type=int, default=20, help="tokens of text inputs (default 20)")
    parser.add_argument("--trained-like", action="store_true", help="outlier channels, as trained models have them")
    parser.add_argument("--json", type=Path, help="write every row here, also while running")
    parser.add_argument("--resume", action="store_true", help="leave out the models that the JSON has already")
    options = parser.parse_args()
    if options.resume and not (options.json and options.json.exists()):
        parser.error("--resume needs --json with a file that exists")
    return options


def threads_of(options: argparse.Namespace) -> int:
    """Return how many threads each model may use."""
    return max(1, (os.cpu_count() or 1) // int(options.jobs))


def listed(zoo: Path) -> list[str]:
    """Return the names in the zoo, in order, without loading the zoo here: it changes global settings."""
    code = f"import sys; sys.path.insert(0, {str(zoo)!r}); import zoo; print(*sorted(zoo.ZOO), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def audited(name: str, options: argparse.Namespace, context: Any) -> list[dict[str, Any]]:
    """Audit one model in a process of its own and return one row for each mode, whatever happens."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, options, sender), daemon=True)
    process.start()
    sender.close()
    rows: list[dict[str, Any]] = []
    end, deadline = "", time.monotonic() + options.limit
    while True:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            end = f"still running after {options.limit:g} s"
            break
        try:
            rows.append(receiver.recv())
        except EOFError:
            break
    if end:
        process.kill()
    process.join()
    end = end or f"ended with status {process.exitcode}"
    missing = [mode for mode in options.modes if mode not in {row["mode"] for row in rows}]
    return rows + [row_of(name, mode, crash=end) for mode in missing]


SHOWN = 4  # findings of one model printed; the JSON has them all


def row_of(name: str, mode: str, **values: Any) -> dict[str, Any]:
    """Return a row with every column."""
    empty: dict[str, Any] = {"findings": [], "remarks": [], "excess": None, "calls": 0, "seconds": 0.0, "crash": None}
    return {"name": name, "mode": mode, **empty, **values}


def tail(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def work(name: str, options: argparse.Namespace, sender: Any) -> None:
    """Audit one model in this process and send one row for each mode."""
    with (
        Path(os.devnull).open("w") as silence,
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        for row in rows_of(name, options):
            sender.send(row)


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Audit one model and yield one row for each mode."""
    import traceback

    sys.path.insert(0, str(options.zoo))
    import torch

    from precision_runtime import audit
    from precision_runtime.auditing import References

    build = importlib.import_module("zoo").build  # the collection's file, not this one
    torch.set_num_threads(threads_of(options))
    try:
        model, arguments, keywords = build(name, options.seed, options.trained_like, length=options.length)
    except Exception as error:  # a model that cannot be made says nothing about the audit
        for mode in options.modes:
            message = f"not built: {type(error).__name__}: {error}"
            yield row_of(name, mode, remarks=[["not-built", "", message]])
        return
    asked: list[list[str]] = []
    if options.cache:
        switch_caches(model, on=True)
        own = refusal(model, arguments, keywords, gradients=False)
        if own:
            asked.append(["no-cache", "", own])
            switch_caches(model, on=False)
    gradients = options.gradients
    own = refusal(model, arguments, keywords, gradients)
    if own and gradients:
        asked.append(["no-gradients", "", own])
        gradients, own = False, refusal(model, arguments, keywords, gradients=False)
    references = References()
    for mode in options.modes:
        if own:
            yield row_of(name, mode, remarks=[["not-run", "", own]])
            continue
        start = time.perf_counter()
        try:
            report = audit(
                model,
                *arguments,
                mode=mode,
                kwargs=keywords,
                gradients=gradients,
                seed=options.seed,
                references=references,
            )
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            row = row_of(name, mode, crash=f"{type(error).__name__}: {tail(str(error))} ({where})")
        else:
            row = row_of(
                name,
                mode,
                findings=[[f.module, f.kind, f.where, round(f.lost_bits, 1), f.op, f.message] for f in report.findings],
                remarks=asked + [[r.kind, r.module, r.message] for r in report.remarks],
                excess=report.excess,
                calls=report.calls,
            )
        row["seconds"] = round(time.perf_counter() - start, 2)
        yield row


def refusal(model: Any, arguments: Any, keywords: Any, gradients: bool) -> str:
    """Return why the model itself does not run in FP32, in its own words, or nothing: that is no crash of an audit."""
    import copy

    import torch
    from torch.utils._pytree import tree_leaves

    model, arguments, keywords = copy.deepcopy((model, arguments, keywords))
    try:
        with torch.set_grad_enabled(gradients):
            result = model(*arguments, **keywords)
        if gradients:
            leaves = [leaf for leaf in tree_leaves(dict(result)) if torch.is_tensor(leaf) and leaf.requires_grad]
            torch.autograd.backward(leaves, [torch.ones_like(leaf) for leaf in leaves])
    except Exception as error:
        return f"the model alone: {type(error).__name__}: {tail(str(error))}"
    return ""


def switch_caches(model: Any, on: bool) -> None:
    """Set ``use_cache`` in the model's configuration and those inside it, where it exists.

    Not in the configurations of its parts: an encoder's own copy says no on purpose.
    """
    waiting: list[Any] = [getattr(model, "config", None)]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if not hasattr(config, "to_dict") or id(config) in seen:
            continue
        seen.add(id(config))
        if isinstance(getattr(config, "use_cache", None), bool):
            config.use_cache = on
        waiting += vars(config).values()


def show(rows: list[dict[str, Any]]) -> None:
    """Print every row that says something, then the sums."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "mode", "findings", "remarks", "calls", "seconds", title="zoo", title_justify="left")
    for row in rows:
        if not (row["findings"] or row["crash"]):
            continue
        found = [f"{module or '(whole)'} {kind} {where} {lost}" for module, kind, where, lost, *_ in row["findings"]]
        more = [f"… {len(found)}"] * (len(found) > SHOWN)
        text = f"CRASH {row['crash']}" if row["crash"] else "\n".join(found[:SHOWN] + more)
        counts = Counter(kind for kind, *_ in row["remarks"])
        remarks = " ".join(f"{kind}:{count}" for kind, count in counts.items())
        table.add_row(row["name"], row["mode"], text, remarks, str(row["calls"]), f"{row['seconds']:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        here = [row for row in rows if row["mode"] == mode]
        crashes = sum(bool(row["crash"]) for row in here)
        flagged = sum(bool(row["findings"]) for row in here)
        calls, seconds = sum(row["calls"] for row in here), sum(row["seconds"] for row in here)
        counts = Counter(kind for row in here for kind, *_ in row["remarks"])
        remarks = ", ".join(f"{kind} {count}" for kind, count in counts.most_common()) or "none"
        console.print(
            f"{mode}: {len(here)} models, {flagged} with findings, {crashes} crashed, {calls} module calls, "
            f"{seconds:.0f} s; remarks: {remarks}",
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(main())
