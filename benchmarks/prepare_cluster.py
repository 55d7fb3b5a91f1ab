"""What tasks cost on a cluster: `orpo run --runner dask` as it is, and with every part as a task of its own.

A cluster is started for each run on the same cores that `orpo prepare` has, so it can only be slower. What the runs of
many pairs differ by is the cost of the further tasks.
"""

from statistics import median

from benchmarks.child import use_cores
from benchmarks.prepare_flow import FEW, Flow, arguments
from benchmarks.table import markdown, processor, with_median
from orpo_data.errors import OrpoError

EVERY_PART = "import flows.clusters; flows.clusters.TASK_BYTES = 1"
DASK = ("run", "--runner", "dask")


def main() -> None:
    options = arguments("prepare_cluster", __doc__)
    use_cores(options.cores)
    from pipelines.base_model import smollm2

    tokenizer = options.tokenizer or smollm2()
    few, flow = (Flow(pairs, tokenizer, options) for pairs in (FEW, options.pairs))
    few.seconds("run")  # makes the database
    bare, whole, parts, tasks, all_tasks, start = [], [], [], 0, 0, []
    for _ in range(options.rounds):
        start.append(few.seconds(*DASK) - few.seconds("prepare"))
        bare.append(flow.seconds("prepare"))
        known = flow.tasks()
        whole.append(flow.seconds(*DASK))
        tasks = flow.tasks() - known
        parts.append(flow.seconds(*DASK, before=EVERY_PART))
        all_tasks = flow.tasks() - known - tasks
    each = [(fine - coarse) / (all_tasks - tasks) for coarse, fine in zip(whole, parts, strict=True)]
    row = {
        "pairs": f"{options.pairs:,}",
        "`orpo prepare`, s": with_median(bare),
        "on Dask, s": with_median(whole),
        "the start of that, s": with_median(start),
        "tasks": str(tasks),
        "each part a task, s": with_median(parts),
        "tasks then": str(all_tasks),
        "a task costs, s": with_median(each),
        "cost of the tasks": f"{tasks * median(each) / median(bare):.1%}",
    }
    print(
        f"{processor()}, {options.cores} cores. `orpo prepare` and `orpo run --runner dask` of HH-RLHF pairs in "
        f"{options.files} files; the start is what {FEW} pairs take longer on Dask; {options.rounds} rounds.\n\n"
        f"{markdown([row])}"
    )


if __name__ == "__main__":
    try:
        main()
    except OrpoError as error:
        raise SystemExit(f"benchmarks.prepare_cluster: {error}") from None
