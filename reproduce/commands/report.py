"""``g2rpo report``: experiments as one HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2rpo.errors import UserError
from g2rpo.files import check_place
from reproduce.commands.options import ProfileName, Publish, Results, Seeds, layout_of, parse_seeds

if TYPE_CHECKING:
    from reproduce.experiment import Profile
    from reproduce.experiment.layout import Layout

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
    from reproduce.commands.render import refuse_credit
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
