"""Result files as tables and plots.

    python -m bench.report                             print every committed result, as Markdown
    python -m bench.report bench/results/cpu.jsonl     one file
    python -m bench.report --pages                     write the committed results, and what
                                                       `make demo` left in demo-out, into README.md
                                                       and docs/, pictures included
    python -m bench.report --pages evidence            only this table
    python -m bench.report --curves build/curves.png   plot over N, over intensity and over the
                                                       workspace
    python -m bench.report --kind tile                 the sweep of tiles (other kinds: sweep, sync,
                                                       kernel)

`bench/pages.py` lists the tables and their pages, and `bench/pictures.py` the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import pages, pictures, plots, where
from .tables import markdown, plain_table


def main(argv: Sequence[str] | None = None) -> None:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("files", nargs="*", type=Path, help="result files (default: all of bench/results)")
    add(
        "--pages",
        nargs="*",
        choices=pages.TABLES,
        metavar="TABLE",
        help="write the committed results into their pages: these tables, or without names all "
        f"tables and pictures. Names: {', '.join(pages.TABLES)}",
    )
    add("--curves", type=Path, help="write the curves to this file, if any")
    add("--kind", help="print the records of this kind instead of the loss")
    arguments = parser.parse_args(argv)

    if arguments.pages is not None:
        if arguments.files:
            parser.error("--pages takes the committed results, not files")
        if taken := pages.adopt_demo():
            print(f"bench/results/demo.json is a copy of {taken}")
        records = pages.committed()
        pages.write(arguments.pages or pages.TABLES, records)
        if not arguments.pages:
            pictures.draw(pictures.PICTURES, records)
        return
    records = pages.known(arguments.files) if arguments.files else pages.committed()
    if arguments.kind:
        chosen = [entry for entry in records if entry["kind"] == arguments.kind]
        print(markdown(plain_table(chosen)) if chosen else f"no record of kind {arguments.kind!r}")
    elif arguments.curves:
        plots.curves(records, arguments.curves)
    else:
        texts = (pages.loss, pages.goals, pages.goals_on_a_cpu)
        print(*(text(records) for text in texts), sep="\n\n")


if __name__ == "__main__":
    main()
