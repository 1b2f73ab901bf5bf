"""`mosa-kernels train`: one run, from data to a tested adapter."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mosa_kernels.cli.errors import MENDABLE, MendableError, message_of, plain_errors
from mosa_kernels.cli.tables import table_of
from mosa_kernels.data.backbone import OFFLINE_BACKBONE
from mosa_kernels.data.offline import FEW_LABEL_TASKS
from mosa_kernels.nn.adapter import MERGE_RULES
from mosa_kernels.train.folder import RunExistsError, RunFolder
from mosa_kernels.train.job import Job
from mosa_kernels.train.loop import NonFiniteError
from mosa_kernels.train.methods import ADAPTER_OPTIONS, METHODS, AdapterOptions, find_method
from mosa_kernels.train.progress import make_reporter
from mosa_kernels.train.recipe import RECIPES, Recipe, changed, make_recipe
from mosa_kernels.train.relevance import meaningless, refuse_meaningless
from mosa_kernels.train.settings import Settings

RECIPE = frozenset(field.name for field in dataclasses.fields(Recipe)) | {"lr", "regularisation"}


def train(
    output: Annotated[Path, typer.Option(help="Folder of the run; has to be new, unless --resume.")],
    model: Annotated[str | None, typer.Option(help=f"Name of a timm model; by default {OFFLINE_BACKBONE}.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, offline:digits, vtab:<folder>, fgvc:<folder>, torchvision:CIFAR100, ..."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}; by default mosa.")] = None,
    recipe: Annotated[str | None, typer.Option(help=f"{', '.join(RECIPES)}; other options override it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Weights of the backbone: .safetensors, .npz, .pth.")] = None,
    pretrained: Annotated[bool | None, typer.Option(help="--no-pretrained starts from random weights.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, where it is not the model's own.")] = None,
    data_root: Annotated[str | None, typer.Option(help="Files of a torchvision or timm data set.")] = None,
    download: Annotated[bool | None, typer.Option(help="Fetch missing files of a named data set.")] = None,
    data_seed: Annotated[int | None, typer.Option(help="Seed of drawn images and of held-out parts.")] = None,
    labels_per_class: Annotated[
        int | None, typer.Option(help=f"Training images a class of offline:{', '.join(FEW_LABEL_TASKS)}.")
    ] = None,
    label_noise: Annotated[float | None, typer.Option(help="Share of training labels to make wrong.")] = None,
    style: Annotated[str | None, typer.Option(help="Where adapters sit: adaptformer, pfeiffer, houlsby, lora.")] = None,
    bottleneck: Annotated[int | None, typer.Option(help="Width r of the bottleneck.")] = None,
    num_experts: Annotated[
        str | None, typer.Option(help="Number N of experts; one per block, as 4,4,2; or 1:4, more with depth.")
    ] = None,
    sparse: Annotated[str | None, typer.Option(help="Which projection is split: up, down, both, none.")] = None,
    granularity: Annotated[str | None, typer.Option(help="element, row, column, block, ...")] = None,
    activation: Annotated[str | None, typer.Option(help="gelu, relu, silu, identity.")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on the adapter's output.")] = None,
    learnable_scale: Annotated[bool | None, typer.Option(help="Train that factor.")] = None,
    norm: Annotated[bool | None, typer.Option(help="LayerNorm of the adapter's own.")] = None,
    expert_bias: Annotated[bool | None, typer.Option(help="A bias per expert, or one for all.")] = None,
    expert_scale: Annotated[str | None, typer.Option(help="Factor on the active expert in training; N for N.")] = None,
    anchored: Annotated[bool | None, typer.Option(help="First pass merged, second pass held to it.")] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers of the blocks with adapters, as 0,1,5.")] = None,
    lora_targets: Annotated[str | None, typer.Option(help="For lora: any of q,v,k,proj.")] = None,
    prompt_length: Annotated[int | None, typer.Option(help="Prompt tokens of vpt-shallow and vpt-deep.")] = None,
    expert_per: Annotated[str | None, typer.Option(help="Draw an expert per batch or per sample.")] = None,
    expert_lr: Annotated[float | None, typer.Option(help="Factor on the learning rate of what experts own.")] = None,
    dropout: Annotated[
        str | None, typer.Option(help="On the bottleneck; one per block, as 0,0.1,0.2; or 0:0.3, more with depth.")
    ] = None,
    merge_rule: Annotated[str | None, typer.Option(help="mean or jigsaw.")] = None,
    passes: Annotated[int | None, typer.Option(help="Forward passes of each batch: 1 or 2.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the consistency of two passes.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the alignment of features.")] = None,
    regularisation: Annotated[
        str | None, typer.Option(help="Table 7: none, consistency, consistency+alignment; sets alpha and align.")
    ] = None,
    align: Annotated[str | None, typer.Option(help="Blocks: none, shallow, deep, all, first-six.")] = None,
    beta_over_depth: Annotated[bool | None, typer.Option(help="Divide beta by the number of blocks.")] = None,
    detach: Annotated[bool | None, typer.Option(help="Hold the targets of the consistency constant.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="mosa: only active experts move; or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    base_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate at a batch of 256, where the recipe scales it to yours.")
    ] = None,
    lr_scaled: Annotated[bool | None, typer.Option(help="Scale --base-lr to the batch (paper), or not.")] = None,
    lr_per_epoch: Annotated[bool | None, typer.Option(help="Change it between epochs only (official).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Length; the warm-up keeps its share of it.")] = None,
    warmup_epochs: Annotated[float | None, typer.Option(help="Part of it that warms up.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images an update, over all processes.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches of which an update is made.")] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    eps: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    augment: Annotated[str | None, typer.Option(help="none, light, paper, official.")] = None,
    inference: Annotated[
        str | None, typer.Option(help="What the test reports: merged, stochastic, fixed, ensemble.")
    ] = None,
    select: Annotated[str | None, typer.Option(help="best validation accuracy, or last epoch.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random but the data.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, bf16, fp16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.")] = None,
    compile: Annotated[bool | None, typer.Option(help="Use torch.compile.")] = None,
    cpu: Annotated[bool | None, typer.Option(help="Do not use a GPU.")] = None,
) -> None:
    """Fine-tune a timm model with MoSA or a baseline, choose weights on validation data, and test them once."""
    options = {key: value for key, value in locals().items() if value is not None}
    options.pop("resume")
    del options["output"]
    console = Console()
    with plain_errors():
        settings = settings_of(options, RunFolder(output).read_config()["settings"] if resume else None)
        refuse_meaningless(settings, options)
        reporter = make_reporter(settings.recipe.epochs, console)
        job = Job(settings, output, resume, reporter)
        if job.accelerator.is_main_process:
            introduce(job, console)
        again = f"mosa-kernels train --output {shlex.quote(str(output))} --resume"
        try:
            result = job.run()
        except RunExistsError:
            raise
        except NonFiniteError as error:
            kept = f"The last good state is in {output}" if job.epochs_kept else "There is no earlier state"
            raise MendableError(f"{error}. {kept}.") from error
        except MENDABLE as error:
            raise MendableError(after_an_error(error, job, again)) from error
        except KeyboardInterrupt:
            done = f"{job.epochs_kept} of {settings.recipe.epochs} epochs are complete and kept"
            console.print(f"\nStopped; {done}. Go on with:\n  {again}")
            raise typer.Exit(130) from None
        if job.accelerator.is_main_process:
            conclude(result, output, console)


def settings_of(given: dict[str, Any], stored: dict[str, Any] | None) -> Settings:
    """Settings from the options that a user gave, over those of a stored run or the defaults.

    Raises:
        ValueError: an option is out of range, or needs another one.
    """
    given = dict(given)
    if "layers" in given:
        given["layers"] = _numbers("layers", given["layers"], "numbers of blocks such as 0,1,5")
    if "num_experts" in given and ":" not in given["num_experts"]:
        counts = _numbers("num_experts", given["num_experts"], "a number, one per block such as 4,4,2, or 1:4")
        given["num_experts"] = counts[0] if len(counts) == 1 else counts
    if isinstance(given.get("dropout"), str) and ":" not in given["dropout"]:
        rates = _numbers("dropout", given["dropout"], "a number, one per block such as 0,0.1,0.2, or 0:0.3", float)
        given["dropout"] = rates[0] if len(rates) == 1 else rates
    if "lora_targets" in given:
        given["lora_targets"] = tuple(given["lora_targets"].split(","))
    if "expert_scale" in given and given["expert_scale"] != "N":
        given["expert_scale"] = _number("expert_scale", given["expert_scale"])
    adapter = {key: value for key, value in given.items() if key in ADAPTER_OPTIONS}
    numbers = {key: value for key, value in given.items() if key in RECIPE}
    rest = {key: value for key, value in given.items() if key not in ADAPTER_OPTIONS | RECIPE | {"recipe"}}
    if stored is None:
        if "data" not in given:
            raise ValueError("data: expected a folder of images or a name such as offline:digits; give --data")
        return Settings(
            **{"model": OFFLINE_BACKBONE, **rest},
            adapter=AdapterOptions(**adapter),
            recipe=make_recipe(given.get("recipe", "paper"), rest.get("model"), **numbers),
        )
    before = Settings.from_dict(stored)
    recipe = before.recipe
    if given.get("recipe", recipe.name) != recipe.name:
        recipe = make_recipe(given["recipe"], before.model)
    if numbers.get("lr") == recipe.lr:
        del numbers["lr"]
    return dataclasses.replace(
        before,
        **rest,
        adapter=dataclasses.replace(before.adapter, **adapter),
        recipe=changed(recipe, **numbers),
    )


def _numbers(name: str, text: str, expected: str, kind: type[int] | type[float] = int) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: expected {expected}, got {text!r}") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: expected a number or N, got {text!r}") from None


def introduce(job: Job, console: Console) -> None:
    """Says what is about to be done, with every number of the recipe."""
    from mosa_kernels.train.backbones import paper_hint

    s, prepared = job.settings, job.prepared
    table = Table(title=job.title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    data = prepared.splits
    table.add_row(
        "data",
        f"{data.name}: {data.num_classes} classes, {len(data.train)} training, {len(data.validation)} validation, "
        f"{len(data.test)} test images ({data.note})",
    )
    if data.differs:
        table.add_row("", f"[yellow]not as in the paper's Table 11: {'; '.join(data.differs)}[/yellow]")
    source = s.checkpoint or ("timm's weights" if s.pretrained else "RANDOM WEIGHTS")
    table.add_row("backbone", f"{s.model} from {source}, sha256 {prepared.backbone['sha256'][:12]}")
    table.add_row("normalisation", ", ".join(f"{key} {value}" for key, value in prepared.normalisation.items()))
    table.add_row("parameters", ", ".join(f"{name} {count:,}" for name, count in job.parameters.items()))
    left_out = frozenset(meaningless(s))
    options = _listing({**dataclasses.asdict(s.adapter), **prepared.adapter}, left_out)
    if options:
        table.add_row("adapter" if find_method(s.method).has_adapters else "prompts", f"{options}, passes {s.passes}")
    toggles = {"lr": s.recipe.lr, "regularisation": s.recipe.regularisation, **s.recipe.as_dict()}
    if s.recipe.augment != "none":
        toggles["augment"] = f"{s.recipe.augment} (here: {', '.join(prepared.augmentations) or 'nothing'})"
    table.add_row(f"recipe {s.recipe.name}", _listing(toggles, left_out | {"name"}))
    table.add_row(
        "computing",
        f"{job.device}, precision {s.mixed_precision}, optimizer {s.optimizer}, "
        f"{job.accelerator.num_processes} process(es)",
    )
    console.print(table)
    hint = paper_hint(s.model)
    if hint is not None and s.recipe.name == "paper" and s.checkpoint is None:
        console.print(f"note: {hint}")


def _listing(record: dict[str, Any], leave: frozenset[str]) -> str:
    shown = {key: value for key, value in record.items() if key not in leave and value is not None}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def conclude(result: dict[str, Any], output: Path, console: Console) -> None:
    """The result: what is reported and, beside it, what else was measured."""
    rows = []
    for name, row in result["test"].items():
        reported = " (reported)" if name == result["reported"] else ""
        merged = "merged by " if name in MERGE_RULES else ""
        validation = result["validation"][name]["accuracy"]
        rows.append((f"{merged}{name}{reported}", f"{row['accuracy']:.2f}", f"{row['nll']:.3f}", f"{validation:.2f}"))
    title = f"test, weights of epoch {result['epoch']} ({result['selection']})"
    console.print(table_of(("inference", "accuracy %", "NLL", "validation %"), rows, title))
    console.print(f"{result['seconds']:.0f} s of training; everything is in {output}", highlight=False)


def after_an_error(error: BaseException, job: Job, again: str) -> str:
    """What went wrong, what is kept all the same, and how to go on.

    Args:
        error: that ended the run.
        job: the run.
        again: the command that resumes it.
    """
    text, kept, epochs = message_of(error).rstrip("."), job.epochs_kept, job.settings.recipe.epochs
    if not kept:
        return text
    if kept < epochs:
        return f"{text}. {kept} of {epochs} epochs are complete and kept; go on with: {again}"
    text += f". All {epochs} epochs are complete, with their weights in {job.folder.last.parent}; the test is missing"
    if isinstance(error, ValueError):
        root = () if job.settings.data_root is None else ("--data-root", job.settings.data_root)
        check = shlex.join(["mosa-kernels", "check-data", job.settings.data, *root, "--decode"])
        text += f". All images that cannot be read: {check}"
    evaluate = shlex.join(["mosa-kernels", "evaluate", str(job.output)])
    return f"{text}. Then go on with: {again}; with files replaced, which it refuses as other data: {evaluate}"
