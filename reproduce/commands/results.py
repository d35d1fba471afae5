"""``g2rpo runs``, ``compare``, ``agreement``, ``render``, ``report``, ``export``: results."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError
from g2rpo.files import check_place
from g2rpo.terminal import PlainTable, plain_table, wide_console
from reproduce.commands.options import (
    ExperimentName,
    ProfileName,
    Publish,
    PublishedCells,
    Results,
    Seeds,
    layout_of,
    parse_seeds,
)
from reproduce.runs.listing import read_run_states, states_table
from reproduce.runs.state import STYLES

if TYPE_CHECKING:
    from benchmarks.evaluation.results import Cell
    from reproduce.experiment import Experiment, Profile
    from reproduce.experiment.layout import Layout
    from reproduce.tables.agreement import Agreement


def runs(
    words: Annotated[
        list[str] | None, typer.Argument(help="Only runs whose names contain all of these.")
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", help="Only runs in this state, e.g. running.")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """List runs with state, progress, ETA and last reward, most recent first.

    Reads files only, so it works from any shell.
    """
    if state is not None and state not in STYLES:
        raise UserError(f"unknown state {state!r}; valid: {', '.join(STYLES)}")
    known = read_run_states(results / "runs")
    if not known:
        raise UserError(f"{results / 'runs'}: no runs yet; use --results for another folder")
    shown = [
        one
        for one in known
        if all(word in one.name for word in words or ()) and state in (None, one.word)
    ]
    if not shown:
        raise UserError(_none_of([one.name for one in known], words or (), state))
    wide_console().print(states_table(shown, known))


def _none_of(names: Sequence[str], words: Sequence[str], state: str | None) -> str:
    """Why no run matches, with the closest match to a word that no name contains."""
    parts = sorted({part for name in names for part in name.split("-")})
    for word in words:
        if not any(word in name for name in names):
            close = get_close_matches(word, parts, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            return f"none of the {len(names)} runs has {word!r} in its name{hint}"
    wanted = [*map(repr, words), *([f"state {state}"] if state else [])]
    return f"none of the {len(names)} runs matches {' and '.join(wanted)}"


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Run folders or unique prefixes of run names; the first is the reference.",
        ),
    ],
    results: Results = Path("results"),
) -> None:
    """Compare runs with the first: scores with intervals, curves, cost, settings, provenance.

    Runs that differ only in their seed are grouped. Committed results without a run folder are
    found by the names of their runs.
    """
    from reproduce.report.comparison import members
    from reproduce.report.comparison_tables import print_comparison
    from reproduce.runs.finished import find_runs

    print_comparison(members(find_runs(names, results)), wide_console())


def agreement(
    experiment: ExperimentName,
    profiles: Annotated[
        str,
        typer.Option(help="Profiles with finished cells; the first is compared with each other."),
    ],
    seeds: Annotated[
        str | None, typer.Option(help="Training seeds to compare, e.g. 1,2,3; default: all.")
    ] = None,
    results: Results = Path("results"),
    publish: PublishedCells = False,
) -> None:
    """Compare the order of an experiment's methods under several profiles.

    Prints Kendall's rank correlation with its interval over seeds, and how many pairs of methods
    have the same order, in-domain and out-of-domain.
    """
    from reproduce import experiment as experiments
    from reproduce.tables.agreement import agreements

    names = [name.strip() for name in profiles.split(",")]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"--profiles {profiles!r}: give two or more, each once, e.g. mini,mini-2")
    chosen = None if seeds is None else parse_seeds(seeds)
    loaded = experiments.load_experiment(experiment)
    refuse_credit(loaded, f"g2rpo reproduce {experiment}")
    layout = layout_of(results, publish=publish)
    found = []
    for name in names:
        profile = experiments.load_profile(name)
        command = f"g2rpo reproduce {experiment} --profile {name}"
        found.append((profile, _finished_cells(loaded, profile, layout, command)))
    console = wide_console()
    for other in found[1:]:
        for one in agreements(loaded, found[0], other, chosen):
            console.print(_agreement_table(one))
            console.print(_agreement_sentences(one), markup=False, highlight=False)


def _agreement_table(one: "Agreement") -> PlainTable:
    table = plain_table("Method", *one.means, right=tuple(one.means))
    where = f", trained on {one.group}" if one.group else ""
    table.title = f"{one.measure.replace('_', '-')}{where}"
    for label, *values in zip(one.labels, *one.means.values(), strict=True):
        table.add_row(label, *(f"{value:.3f}" for value in values))
    return table


def _agreement_sentences(one: "Agreement") -> str:
    first, second = one.means
    text = (
        f"{one.same} of {one.pairs} pairs have the same order: Kendall's tau {one.tau:.2f} "
        f"[{one.low:.2f}, {one.high:.2f}] over seeds.\n"
        f"{one.significant} orders are significant under both {first} and {second}, "
        f"{one.contradicted} of them opposite.\n"
    )
    if one.repeated is not None:
        text += f"Two sets of as many seeds of {first} alone: tau {one.repeated:.2f} on average.\n"
    return text


def render(
    experiment: ExperimentName,
    profile: ProfileName = "mini",
    results: Results = Path("results"),
    publish: PublishedCells = False,
) -> None:
    """Write and print an experiment's table and figures from its finished cells."""
    from reproduce import experiment as experiments
    from reproduce.tables.publish import publish as write_table

    chosen = experiments.load_profile(profile)
    loaded = experiments.load_experiment(experiment)
    command = f"g2rpo reproduce {experiment} --profile {profile}"
    refuse_credit(loaded, command)
    layout = layout_of(results, publish=publish)
    cells = _finished_cells(loaded, chosen, layout, command)
    write_table(loaded, chosen, cells, (), layout)


def _finished_cells(
    experiment: "Experiment", profile: "Profile", layout: "Layout", command: str
) -> "list[Cell]":
    """The cells in the folder of tables; raises a :class:`UserError` if there are none."""
    from benchmarks.evaluation.results import cells_folder, load_cells

    folder = cells_folder(layout.tables, profile.name, experiment.name)
    cells = load_cells(folder)
    if not cells:
        published = layout.tables != layout.runs
        elsewhere = "" if published else ", or add --publish for those in RESULTS/PROFILE"
        raise UserError(f"{folder}: no finished cells; run `{command}`{elsewhere}")
    return cells


def refuse_credit(experiment: "Experiment", command: str) -> None:
    """Raises a :class:`UserError` for an experiment that measures credit: it has no cells."""
    if experiment.credit is not None:
        raise UserError(
            f"{experiment.name} measures credit and has no cells; run `{command}`, which writes "
            "credit.md from what is already measured"
        )


Experiments = Annotated[
    list[str] | None,
    typer.Argument(help="Experiments, e.g. table1 steps; default: all with finished cells."),
]
Output = Annotated[
    Path | None,
    typer.Option(help="HTML file to write; default: report.html next to the tables."),
]
Megabytes = Annotated[
    float, typer.Option("--limit", min=0.1, help="Maximum size of the page in MB.")
]


def report(
    experiments: Experiments = None,
    profile: ProfileName = "mini",
    seeds: Seeds = None,
    results: Results = Path("results"),
    publish: Publish = False,
    output: Output = None,
    limit: Megabytes = 15.0,
) -> None:
    """Write one HTML page with tables, curves, images, costs, configurations and provenance.

    The page is self-contained and opens offline. Missing results are listed with the reason.
    """
    from g2rpo.files import atomic_write_text
    from reproduce.experiment import load_experiment, load_profile
    from reproduce.jobs.runner import build_assets
    from reproduce.report.chapter import finished_experiments, load_chapter
    from reproduce.report.documents import find_documents
    from reproduce.report.page import make_page

    if output is not None:
        _check_output(output)
    chosen = load_profile(profile)
    build_assets(chosen)
    layout = layout_of(results, publish=publish)
    for name in experiments or ():
        refuse_credit(load_experiment(name), f"g2rpo reproduce {name} --profile {profile}")
    names = experiments or finished_experiments(chosen, layout)
    if not names and not publish:
        layout, names = _committed(results, chosen)
    wanted = None if seeds is None else parse_seeds(seeds)
    chapters = [load_chapter(name, chosen, layout, wanted) for name in dict.fromkeys(names)]
    if not any(chapter.cells for chapter in chapters):
        elsewhere = "" if publish else ", or add --publish to report RESULTS/PROFILE"
        raise UserError(
            f"{layout.tables / chosen.name}: no finished cells; run `g2rpo reproduce "
            f"{names[0] if names else 'table1'} --profile {profile}`{elsewhere}"
        )
    if output is None:
        folder = layout.tables / chosen.name
        if experiments and len(chapters) == 1:
            folder = layout.experiment(chosen.name, chapters[0].name)
        output = folder / "report.html"
        _check_output(output)
    documents = []
    if not experiments:
        shown = [chapter.name for chapter in chapters]
        documents = find_documents(layout.tables / chosen.name, shown)
    page = make_page(chosen, chapters, round(limit * 1e6), documents)
    atomic_write_text(output, page.html)
    for note in page.notes:
        typer.echo(note, err=True)
    typer.echo(f"wrote {output} ({len(page.html.encode()) / 1e6:.1f} MB)")


def _check_output(output: Path) -> None:
    """Checks that the page can be written, before it is made.

    Raises:
        UserError: ``output`` is a folder, or its folder is missing or not writable.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a folder; give a file, e.g. {output / 'report.html'}")
    check_place(output)


def _committed(results: Path, profile: "Profile") -> "tuple[Layout, list[str]]":
    """The committed results in ``results/PROFILE``, used if nothing was run here."""
    from reproduce.report.chapter import finished_experiments

    layout = layout_of(results, publish=True)
    names = finished_experiments(profile, layout)
    if names:
        typer.echo(
            f"no finished cells in {results / 'runs' / profile.name}; "
            f"reporting {layout.tables / profile.name}",
            err=True,
        )
    return (layout if names else layout_of(results)), names


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, as printed by `g2rpo train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder; must not exist.")],
) -> None:
    """Export a run's weights as a diffusers pipeline folder, or as a LoRA file for it."""
    from g2rpo.training.checkpoint.load import export_trained

    if output.exists():
        raise UserError(f"{output}: already exists; choose another --output")
    typer.echo(f"{output}: {export_trained(run, output)}")
