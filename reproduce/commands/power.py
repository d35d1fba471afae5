"""``g2rpo power``: the difference that a number of seeds can find, before a run."""

from typing import Annotated

import typer

from g2rpo.errors import UserError
from reproduce.commands.options import parse_seeds


def power(
    deviation: Annotated[
        float, typer.Argument(help="Standard deviation of the methods' difference over seeds.")
    ],
    seeds: Annotated[str, typer.Option(help="Numbers of seeds, e.g. 3,5,10.")] = "3,5,10,20",
    comparisons: Annotated[
        int, typer.Option(help="Number of comparisons that are corrected together.")
    ] = 1,
) -> None:
    """Print the smallest difference of two methods that is found with probability 0.8.

    By the paired t-test over shared seeds, significant at 0.05 after the correction; in the unit
    of the deviation. Deviations of earlier runs follow from the intervals in tables.
    """
    from benchmarks.evaluation.power import detectable_difference
    from g2rpo.terminal import plain_table, wide_console

    table = plain_table("seeds", "difference", right=("seeds", "difference"))
    for count in parse_seeds(seeds):
        try:
            found = detectable_difference(deviation, count, comparisons=comparisons)
        except ValueError as error:
            raise UserError(f"{count} seeds: {error}") from None
        table.add_row(str(count), f"{found:.3g}")
    wide_console().print(table)
