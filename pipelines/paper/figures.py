"""Results of the reproduction -> tables, a page, and the README. Needs results.json alone, and no run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import mean

from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from ..reports import pictures
from ..reports.comparison import cell
from ..reports.study import AnatomyLine
from .charts import chart
from .records import (
    HEADLINE,
    FigureSpec,
    Results,
    Scores,
    by_seed,
    last_scores,
    leads,
    runs_of,
    score_at,
    x_title,
)

_COSTS = ("trained", "seen", "TFLOPs", "with reuse", "s")  # columns of a table, after the scores


def table(spec: FigureSpec, results: Results, scores: Scores) -> list[list[str]]:
    """Rows of text, the header first: a run a row, the mean over its seeds with their range, and what it cost."""
    shown_scores: Scores = spec.get("scores", scores)
    shown = [*([HEADLINE] if shown_scores is scores else []), *shown_scores]
    rows = [["run", "seeds", *shown, *_COSTS]]
    for name in runs_of(spec):
        records = by_seed(results, name, spec.get("seeds"))
        if not records:
            rows.append([name, "not run yet", *[""] * (len(shown) + len(_COSTS))])
            continue
        columns = [[score_at(r["checkpoints"][-1], score, shown_scores) for r in records] for score in shown]
        costs = [
            f"{mean(r['examples_trained'] for r in records):,.0f}",
            f"{mean(r['examples_seen'] for r in records):,.0f}",
            f"{mean(r['teraflops'] for r in records):.1f}",
            f"{mean(r['teraflops_with_reuse'] for r in records):.1f}",
            f"{mean(r['seconds'] for r in records):.0f}",
        ]
        cells = [cell([v for v in column if v is not None], "{:.1f}") for column in columns]
        rows.append([name, str(len(records)), *cells, *costs])
    return rows


def page(specs: Mapping[str, FigureSpec], results: Results, scores: Scores) -> str:
    """All figures with their tables on one page that needs no network."""
    parts = []
    for name, spec in specs.items():
        drawn = chart(spec, results, scores, figure=name)
        rows = table(spec, results, scores) if runs_of(spec) else []
        parts.append((name, spec["title"], pictures.html(drawn) if drawn is not None else "", rows))
    template = Environment(autoescape=True).from_string((files(__package__) / "reproduction.html.j2").read_text())
    return template.render(plotly=get_plotlyjs(), parts=parts)


def render(template: str, specs: Mapping[str, FigureSpec], results: Results, scores: Scores) -> str:
    """Markdown from a template that calls the methods of `Readme`, and reads `studies`."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    readme = Readme(specs, results, scores)
    return environment.from_string(template).render(
        share=readme.share,
        updates=readme.updates,
        table=readme.table,
        ahead=readme.ahead,
        lead=readme.lead,
        value=readme.value,
        picture=readme.picture,
        nats=lambda x: f"{x:z.1f}",
        studies=results["studies"],
    )


@dataclass(frozen=True)
class Readme:
    """What the README's template may call; each method gives Markdown."""

    specs: Mapping[str, FigureSpec]
    results: Results
    scores: Scores

    def table(self, name: str) -> str:
        """A figure's table."""
        return _markdown(table(self.specs[name], self.results, self.scores))

    def value(self, name: str, score: str = HEADLINE) -> str:
        """A score of a run's last checkpoint, in %."""
        return cell(last_scores(self.results, name, score, self.scores), "{:.1f}")

    def ahead(self, name: str) -> str:
        """The advantage of one series over another, a line for each value of what they are plotted against."""
        spec, shown = self.specs[name], [HEADLINE, "naming @5"]
        columns = [leads(spec, self.results, score, self.scores) for score in shown]
        lines = [["", x_title(spec), "seeds", *shown]]
        for label, points in columns[0].items():
            for x, differences in points:
                cells = [cell(dict(column[label]).get(x, []), "{:+z.1f}") for column in columns]
                lines.append([label, f"{x:,}", str(len(differences)), *cells])
        return _markdown(lines)

    def lead(self, name: str, label: str, x: float, score: str = HEADLINE) -> str:
        """The advantage at one value of what the figure is plotted against, in points."""
        points = dict(leads(self.specs[name], self.results, score, self.scores)[label])
        return cell(points[x], "{:+z.1f}")

    def picture(self, name: str) -> str:
        return f"![{self.specs[name]['title']}](pictures/{name}.svg)"

    def updates(self) -> int:
        """After how many updates the oldest learner was studied."""
        return max(line["step"] for line in self._anatomy())

    def share(self, sub_batch_size: int) -> str:
        """What the off-diagonal sums are of the variance of the oldest learner's draw scores."""
        oldest = [line for line in self._anatomy() if line["step"] == self.updates()]
        (share,) = (line["off_diagonal_share"] for line in oldest if line["sub_batch_size"] == sub_batch_size)
        return f"{100 * share:.0f} %"

    def _anatomy(self) -> list[AnatomyLine]:
        lines = self.results["studies"]["anatomy"]
        assert isinstance(lines, list)
        return lines


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
