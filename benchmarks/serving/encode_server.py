"""A minimal embedding server: `python -m benchmarks.serving.encode_server DIR PORT`.

It is a FastAPI route around sentence-transformers' `encode` that handles one request at a time.
"""

import sys
import threading

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
one_at_a_time = threading.Lock()


class Body(BaseModel):
    inputs: list[str]


@app.post("/embed")
def embed(body: Body) -> list[list[float]]:
    with one_at_a_time:
        return app.state.model.encode(body.inputs, show_progress_bar=False).tolist()


if __name__ == "__main__":
    app.state.model = SentenceTransformer(sys.argv[1], device="cpu")
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
