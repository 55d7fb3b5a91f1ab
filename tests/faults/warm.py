"""A process that has imported everything and forks a child for every `orpo` command it is told to run.

A child is as real as a process of its own: it leads its own group, nothing but imports happened in its parent. Orders
come as lines of JSON on stdin; how a child ended goes to stdout.
"""

import ctypes
import json
import os
import sys
from typing import Any


def run(order: dict[str, Any]) -> int:
    """In the child: the command, to its end or to the event at which it dies."""
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv = ["orpo", *order["arguments"]]
    counter = ctypes.CDLL(None)
    if order["below"]:
        counter.arm(os.fsencode(order["below"]), ctypes.c_long(order["at"]), order["error"])
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    if order["below"]:
        print(f"events {counter.counted()}", flush=True)
    return code


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            child = os.fork()
            if child == 0:
                code = 98
                try:
                    code = run(order)
                finally:
                    os._exit(code)
            answer: dict[str, Any] = {"pid": child}
        else:
            _, status = os.waitpid(order["pid"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import polars  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pipelines.evaluation
    import pipelines.preparation
    import pipelines.training  # noqa: F401
    from flows.cli import main

    print("{}", flush=True)
    serve()
