"""Made-up results, as the benchmarks write them."""

import json

from benchmarks.results import FASTBERT

ENVIRONMENT = {
    "part": "environment",
    "device": "cpu (made up)",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "abc",
    "command": "python -m benchmarks",
}


def timing(median, spread=0.02):
    return {
        "median_s": median,
        "spread": spread,
        "real_tokens_per_second": 1000 / median,
        "utilisation": 0.4 / median,
    }


def step(ours=2.0, theirs=7.0, **case):
    case = {"preset": "base", "lengths": "wikipedia", "sequences": 4, **case}
    timings = {FASTBERT: timing(ours), "Hugging Face (SDPA)": timing(theirs)}
    return {"part": "steps", "case": case, "timings": timings, "fill": 0.49, "refused": {}}


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
