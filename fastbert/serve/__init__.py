"""`fastbert serve`: a model over HTTP; requests are packed into batches without padding."""

from fastbert.check import require_libraries
from fastbert.config.serve import ServeConfig


def run(config: ServeConfig) -> None:
    """Serves until a signal; raises InputError if a library of the extra `serve` is missing."""
    require_libraries("fastbert serve", ("fastapi", "uvicorn", "prometheus_client"), "serve")
    from fastbert.serve.server import serve

    serve(config)
