"""`fastbert serve`: a model over HTTP; requests are packed into batches without padding."""

import importlib

from fastbert.check import InputError
from fastbert.config.serve import ServeConfig

_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")


def run(config: ServeConfig) -> None:
    """Serves until a signal stops it; InputError if a library of the extra `serve` is missing."""
    for name in _LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = (error.name or name).partition(".")[0].replace("_", "-")
            raise InputError(
                f"fastbert serve needs {missing}: pip install 'fastbert[serve]'"
            ) from None
    from fastbert.serve.server import serve

    serve(config)
