"""Commands that make and judge models, and let them answer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orpo_data.errors import UsageError
from orpo_data.places import as_path
from pipelines.cli.app import JsonOption, OutputOption, SetOption, print_json

if TYPE_CHECKING:
    from pipelines.jobs import TrainingJob


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of a ready recipe.")] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A tokenized dataset folder, or its URL.",
            parser=as_path,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a local folder or a hub id.")] = None,
    output: OutputOption = None,
    overrides: SetOption = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=VALUE,VALUE",
            help="Train once for each value of a key and compare, e.g. lambda=0.1,0.5,1.0; several form the product.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what memory the run would take, and train nothing.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: how many processes it is shown for.")] = 4,
    as_json: JsonOption = False,
) -> None:
    """Train on a tokenized dataset; a run, or a sweep of runs, that was interrupted goes on where it was."""
    from pipelines.jobs import sweep_jobs, training_job

    if dry_run and sweeps:
        raise UsageError("--dry-run: is for one run, not for a --sweep; give its values with --set")
    asked = (recipe, dataset, model, output, overrides or [])
    if dry_run:
        _dry_run(training_job(*asked), processes, as_json)
    elif sweeps:
        _train_sweep(sweep_jobs(sweeps, *asked), as_json)
    else:
        _train_one(training_job(*asked), as_json)


def _dry_run(job: "TrainingJob", processes: int, as_json: bool) -> None:
    from pipelines.console import out
    from pipelines.memory import job_memory, memory_json, memory_table

    estimate = job_memory(job)
    if as_json:
        print_json(memory_json(estimate, processes))
    else:
        out.print(memory_table(estimate, processes))


def _train_one(job: "TrainingJob", as_json: bool) -> None:
    from orpo_train.run import process_state
    from pipelines.memory import say_memory
    from pipelines.training import train_model

    if process_state().is_main_process:
        say_memory(job)
    report = train_model(job.dataset, job.config, job.output, job=job.name, show_progress=True)
    if not process_state().is_main_process:
        return
    if as_json:
        print_json(report.to_json())
    else:
        print(report.summary())


def _train_sweep(jobs: "dict[str, TrainingJob]", as_json: bool) -> None:
    from orpo_train.run import process_state
    from pipelines.console import out
    from pipelines.sweep import comparison_table, train_sweep

    report = train_sweep(jobs, show_progress=True)
    if not process_state().is_main_process:
        return
    if as_json:
        print_json(report.to_json())
    else:
        out.print(comparison_table(report.comparison))
        print(report.path / "comparison.png")


def evaluate(
    model_dir: Annotated[
        Path,
        typer.Argument(
            help="A trained model folder.",
            metavar="MODEL_DIR",
            parser=as_path,
        ),
    ],
    dataset: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="A tokenized dataset folder with an eval split, or its URL.",
            parser=as_path,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where to write; by default beside the model.",
            parser=as_path,
        ),
    ] = None,
    reward_model: Annotated[
        Path | None, typer.Option(metavar="RM_DIR", help="A reward model's folder, to judge answers with.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER_DIR", help="The model to win over; by default the one training began with."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Each draws an answer to every prompt; by default 1,2,3.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Most held-out prompts to answer; by default 100.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the answers that are judged; by default 1.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer that is judged; by default 256.")
    ] = None,
    embedding_model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A model's folder, to tell how alike answers are.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a model on held-out pairs, before and after training; with a reward model also its answers."""
    from pipelines.console import out
    from pipelines.evaluation import evaluate_model, evaluation_table
    from pipelines.judging import judge_settings, judge_table, summary

    asked = {
        "reward_model": reward_model and str(reward_model),
        "against": against and str(against),
        "seeds": seeds,
        "prompts": prompts,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "embedding_model": embedding_model and str(embedding_model),
    }
    report = evaluate_model(model_dir, dataset, output or model_dir.parent / "evaluate", judge_settings(asked))
    judged = report.result.get("judge")
    if as_json:
        told = {"judge": summary(judged)} if judged else {}
        print_json(report.result["after"] | told | {"path": str(report.path)})
    else:
        out.print(evaluation_table(report.result))
        if judged:
            out.print(judge_table(judged))
        print(report.path / "report.html")


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, or a hub id.", metavar="MODEL")],
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="The judge's own file of questions.")],
    form: Annotated[Literal["alpaca-eval", "mt-bench", "ifeval"], typer.Option(help="The judge.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the answers.")],
    model_id: Annotated[str | None, typer.Option(help="The model's name in the file; by default the folder's.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A name or a jinja file; by default the tokenizer's own.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="For all questions; by default the judge's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="By default the judge's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer; by default the judge's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 42,
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="By default bf16 on a GPU, otherwise fp32.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run IFEval's own rules on the answers (pip install -e '.[ifeval]').")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer the questions of AlpacaEval, MT-Bench or IFEval, in the file form that judge reads."""
    from pipelines.answering import answer_questions

    asked = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    report = answer_questions(
        model,
        prompts,
        form,
        output,
        name=model_id,
        chat_template=chat_template,
        sampling={name: value for name, value in asked.items() if value is not None},
        precision=precision,
        check=check,
    )
    followed = vars(report.followed) if report.followed else {}
    if as_json:
        told = {"path": str(report.path), "card": str(report.card), "followed": followed or None}
        print_json(vars(report) | told)
    else:
        print(f"{report.questions:,} questions answered, {report.unended:,} answers cut off")
        for name, share in followed.items():
            print(f"{name.replace('_', ', ')}: {100 * share:.2f} % followed")
        print(report.path, report.card, sep="\n")
