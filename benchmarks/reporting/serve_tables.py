"""Tables of servers: requests per second, and latency under load."""

from benchmarks.reporting.cells import Table, once, seconds, spread_of
from benchmarks.results import FASTBERT, Row


def serve(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        case, timings = row["case"], row["timings"]
        about = (f"{case['requests']:,} of {case['clients']} clients",)
        for what, (name, timing) in once(about, timings.items()):
            rate = timing["requests_per_second"]
            lines.append(
                (
                    *what,
                    name,
                    f"{rate:,.1f}{spread_of(timing)}",
                    f"{rate * row['tokens'] / case['requests']:,.0f}",
                    f"{timings[FASTBERT]['requests_per_second'] / rate:.2f}x",
                    f"{row['largest_difference'][name]:.0e}",
                )
            )
    header = ("requests", "server", "requests/s", "tokens/s", "fastbert's speedup over it",
              "vectors differ by")  # fmt: skip
    return Table(header, lines)


def serve_latency(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        about = (f"{row['case']['share']:.0%}",)
        for what, (name, timing) in once(about, row["timings"].items()):
            median, tail = seconds(timing["median_s"]), seconds(timing["p99_s"])
            lines.append((*what, name, f"{timing['rate']:,.1f}", median, tail))
    return Table(("load", "server", "requests/s", "median", "99 % within"), lines)
