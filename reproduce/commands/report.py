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
    typer.Argument(help="Experiments, e.g. table1 steps; default: all that have finished cells."),
]
Output = Annotated[
    Path | None,
    typer.Option(help="The page; default: report.html beside the tables."),
]
Megabytes = Annotated[
    float, typer.Option("--limit", min=0.1, help="Largest size of the page, in MB.")
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

    It opens from disk and asks no network. What is missing is shown as missing, with the reason.
    """
    from g2rpo.files import atomic_write_text
    from reproduce.commands.render import no_table
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
        loaded = load_experiment(name)
        if loaded.credit is not None:
            command = f"g2rpo reproduce {name} --profile {profile}"
            raise UserError(no_table(loaded, chosen, layout, command))
    names = experiments or finished_experiments(chosen, layout)
    if not names and not publish:
        layout, names = _committed(results, chosen)
    wanted = None if seeds is None else parse_seeds(seeds)
    chapters = [load_chapter(name, chosen, layout, wanted) for name in dict.fromkeys(names)]
    if not any(chapter.cells for chapter in chapters):
        elsewhere = "" if publish else " (with --publish those of results/PROFILE are reported)"
        raise UserError(
            f"{layout.tables / chosen.name}: no finished cells; run `g2rpo reproduce "
            f"{names[0] if names else 'table1'} --profile {profile}` first{elsewhere}"
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
    """Asks whether the page can be written, before it is made.

    Raises:
        UserError: it is a folder, or there is no folder for it that may be written to.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file, such as {output / 'report.html'}")
    check_place(output)


def _committed(results: Path, profile: "Profile") -> "tuple[Layout, list[str]]":
    """Where nothing was run here: what is in ``results/PROFILE``."""
    from reproduce.report.chapter import finished_experiments

    layout = layout_of(results, publish=True)
    names = finished_experiments(profile, layout)
    if names:
        typer.echo(
            f"no finished cells in {results / 'runs' / profile.name}: those in "
            f"{layout.tables / profile.name} are reported",
            err=True,
        )
    return (layout if names else layout_of(results)), names
