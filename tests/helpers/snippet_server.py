# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs the commands of documentation in forks of one process that has imported and loaded what takes seconds, without
what is hidden from them, or only reads their options: `python snippet_server.py SOCKET '["hidden", "modules"]'`, of
which a fork may see some."""

import argparse
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import sys
from importlib.machinery import PathFinder
from pathlib import Path

# What takes too long, does not end, or writes to the Hub: its options are only read.
ONLY_READ = ("demo", "push", "serve", "train-drafts")

CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
request = [sys.argv, os.getcwd(), "ONLY_READ" in os.environ, {hidden!r}, {exported!r}]
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or 70))
"""


class Shown(PathFinder):
    """Finds all modules but those that are hidden."""

    hidden = set()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in cls.hidden else super().find_spec(fullname, path, target)


PARSE = argparse.ArgumentParser.parse_known_args


def read_arguments(parser, args=None, namespace=None):
    """Ends the program once its arguments are read."""
    _, unknown = PARSE(parser, args, namespace)
    if unknown:
        parser.error(f"unknown: {unknown}")
    sys.exit()


def hide(modules):
    """What a fork does not see, besides what its server did not."""
    # What has been imported cannot be hidden any more.
    assert Shown.hidden.issuperset(modules)
    Shown.hidden = set(modules)


def run(program, arguments, only_read, exported):
    if program == "python":
        if only_read:
            argparse.ArgumentParser.parse_known_args = read_arguments
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
        return
    from mdm_asr_cli.app import app, main

    if only_read or arguments[0] in ONLY_READ:
        import typer

        typer.main.get_command(app).commands[arguments[0]].make_context(arguments[0], arguments[1:])
        return
    sys.argv = [program, *arguments]
    with contextlib.ExitStack() as stack:
        if arguments[0] == "export":
            from onnx_exports import graphs_of

            stack.enter_context(graphs_of(Path(exported)))
        main()


def serve(path, hidden):
    Shown.hidden = set(hidden)
    sys.meta_path[sys.meta_path.index(PathFinder)] = Shown
    import mdm_asr_cli.app  # noqa: F401
    from mdm_asr_hf import loading

    if "torch" not in hidden:
        import torch
        from transformers import pipeline  # noqa: F401

        import mdm_asr_hf.convert.whisper  # noqa: F401
        import mdm_asr_hf.evaluate.evaluation  # noqa: F401
        import mdm_asr_hf.evaluate.report  # noqa: F401
        import mdm_asr_hf.train.trainer  # noqa: F401
        import mdm_asr_hf.transcribe.pipeline  # noqa: F401

        # Each fork gets it as if it had loaded it: with the arguments of the commands.
        loading.load_model = functools.cache(loading.load_model)
        loading.load_model(str(loading.default_checkpoint()), None, False, "float32")
        torch.set_num_threads(1)
    # A collection in a fork would copy all of it.
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    while True:
        client, _ = server.accept()
        message, descriptors, _, _ = socket.recv_fds(client, 2**16, 3)
        if os.fork():
            client.close()
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False) for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        (program, *arguments), folder, only_read, hidden, exported = json.loads(message)
        os.chdir(folder)
        if "torch" in sys.modules:
            # PyTorch makes its pool anew in a fork, which must not be asked of it by several threads at once.
            sys.modules["torch"].set_num_threads(1)
        code = 0
        try:
            hide(hidden)
            run(os.path.basename(program), arguments, only_read, exported)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        client.send(str(code).encode())
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
