"""`PYTHON export/worker.py FILE.onnx`: runs batches that come through a pipe, in a process that may be emulated.

Needs nothing but numpy and onnxruntime. First it names its processor in a line; then, for every batch, eight bytes of
size and an .npz of inputs come in, and eight bytes and an .npz of all outputs go out.
"""

import io
import platform
import sys
from typing import IO

import numpy as np


def send(pipe: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Arrays by name into a pipe."""
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    pipe.write(len(packed.getvalue()).to_bytes(8, "little") + packed.getvalue())
    pipe.flush()


def receive(pipe: IO[bytes]) -> dict[str, np.ndarray] | None:
    """Arrays by name from a pipe; None at its end."""
    size = pipe.read(8)
    if len(size) < 8:
        return None
    with np.load(io.BytesIO(pipe.read(int.from_bytes(size, "little"))), allow_pickle=False) as packed:
        return dict(packed)


def main(file: str) -> None:
    """Answer until the pipe ends."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    sys.stdout.buffer.write(platform.machine().encode() + b"\n")
    sys.stdout.buffer.flush()
    while (feed := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, dict(zip(names, session.run(names, feed), strict=True)))


if __name__ == "__main__":
    main(sys.argv[1])
