"""A file for another processor, run by an emulator such as Debian's qemu-user."""

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from elastic_model.session import ElasticSession
from export import worker

MACHINES = {"model_qint8_arm64": ("aarch64", "arm64")}  # the processors that a file is for; else x86-64
X86 = ("x86_64", "AMD64")
LOG_LINES = 3  # of an emulator that ended


class EmulatedSession(ElasticSession):
    """A session whose batches are run by `command`, which starts a Python of the other processor that has numpy and
    onnxruntime (`qemu-aarch64 -L ROOT ROOT/usr/bin/python3.11`). Loading, tokenising and checks are this machine's.

    ValueError where the command cannot run the file, or runs on another kind of processor than the file is for.
    """

    def __init__(self, command: str, model: Path, tokenizer: Path):
        super().__init__(model, tokenizer, threads=1)
        self.command, self.log = command, tempfile.TemporaryFile()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        words = [*shlex.split(command), worker.__file__, str(model)]
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=self.log, env=environment)
        except OSError as error:
            raise ValueError(f"--emulator {command!r} cannot be started: {error}") from error
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.machine = self.answers.readline().decode().strip() or self._ended()
        fitting = MACHINES.get(model.stem, X86)
        if self.machine not in fitting:
            self.close()
            raise ValueError(
                f"--emulator {command!r} runs a {self.machine}; {model.name} is for {' or '.join(fitting)}"
            )

    def infer(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of one batch, run under emulation."""
        try:
            worker.send(self.requests, feed)
            outputs = worker.receive(self.answers)
        except OSError:
            outputs = None
        if outputs is None:
            self._ended()
        return [outputs[name] for name in self.outputs]  # type: ignore[index]

    def close(self) -> None:
        """End the emulator."""
        for pipe in (self.requests, self.answers):
            try:
                pipe.close()
            except OSError:  # it ended before it read everything
                pass
        self.process.wait()
        self.log.close()

    def _ended(self):
        code = self.process.wait()
        self.log.seek(0)
        said = " | ".join(self.log.read().decode(errors="replace").splitlines()[-LOG_LINES:])
        self.close()
        raise ValueError(f"--emulator {self.command!r} ended with exit code {code}: {said or 'it said nothing'}")
