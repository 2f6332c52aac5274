"""A training run: build or resume the model, then train step by step until a limit is reached.

    lacy train DATASET --out RUN --model gpt2-334m --objective lacy
    torchrun --nproc-per-node 8 -m lacy train DATASET --out RUN

The loss of a step is the sum over its positions with a target, divided by their number in the whole step, over all
micro-batches and ranks, so each position weighs the same. That number is known from the data before any forward pass,
because the count of chosen positions depends on the count of candidates only.
"""

import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import PreTrainedModel

from lacy.schemas.errors import TrainingError
from lacy.trainer import checkpoint, data, evaluate, model, objectives, optimizer, shards
from lacy.trainer import config as configuration
from lacy.trainer.checkpoint import Progress
from lacy.trainer.config import TrainConfig
from lacy.trainer.logs import Log
from lacy.trainer.objectives import Objective
from lacy.trainer.paths import absolute
from lacy.trainer.ranks import Ranks, join
from lacy.trainer.shards import Labels

PEAK_FLOPS = {  # dense bf16 of one GPU, by a word of its name
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
}

Batch = dict[str, torch.Tensor]
Tell = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """End of a run. `stopped` is the signal that ended it before its limit, if any."""

    progress: Progress
    stopped: int | None


@dataclass(frozen=True)
class Run:
    """The fixed parts of a run."""

    config: TrainConfig
    ranks: Ranks
    labels: Labels
    objective: Objective
    holdout: float  # share of the documents; see `shards.enough_held_out`
    held_out: int  # documents, counted up to two
    context: int
    network: PreTrainedModel
    learner: nn.Module  # the network and its head, wrapped for several ranks
    optimizer: torch.optim.AdamW
    max_steps: int | None

    @property
    def tokens_per_step(self) -> int:
        return self.config.accumulate * self.config.batch * self.context * self.ranks.count


@dataclass(frozen=True)
class Step:
    """Data of one step on this rank.

    batches   micro-batches, on the device
    counts    (micro-batches, 3) int64 on the host, see `objectives.count`
    position  state of the loader after them
    epoch     passes of this rank over its documents
    """

    batches: list[Batch]
    counts: torch.Tensor
    position: dict[str, Any]
    epoch: float


@dataclass
class Stop:
    signal: int = 0


def train(config: TrainConfig, tell: Tell | None = None) -> Outcome:
    """Run `config`, from its newest checkpoint where there is one.

    On the first rank, `tell` is called with the kind of an event ("start", "note", "step" or "valid") and its figures.
    SIGTERM and SIGINT end the run after the current step, with a checkpoint. Raises TrainingError, UsageError and
    DatasetError.
    """
    ranks = join(config)
    with _stoppable() as stop:
        outcome = _go(_prepare(config, ranks), stop, tell if tell and ranks.first else _ignore)
    ranks.leave()  # not after an error: others may be waiting for this rank, and end when its process does
    return outcome


def _prepare(config: TrainConfig, ranks: Ranks) -> Run:
    labels = _open_labels(config)
    holdout, held_out = shards.enough_held_out(labels, config.holdout)
    saved = checkpoint.newest(config.out)
    if saved:  # which may be of an older version, and have held out nothing
        holdout = checkpoint.data_of(saved).get("holdout", holdout)
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if ranks.device.type == "cpu" or config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Otherwise every new buffer is filled first, though nothing here reads one before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    source = config  # names a model that exists: the newest checkpoint has the same architecture
    if saved and not model.is_there(config.model):
        source = config.model_copy(update={"model": str(saved)})
    network = model.build(source, labels)
    torch.manual_seed(config.seed + ranks.rank)  # for dropout
    context = model.context(source)
    limits = [config.max_steps] if config.max_steps else []
    if config.epochs or not (config.max_steps or config.gt_tokens):
        tokens = (config.epochs or 1) * (1 - holdout) * labels.tokens  # without end tokens
        limits.append(math.ceil(tokens / (config.accumulate * config.batch * context * ranks.count)))
    learner = model.place(network, labels.call_id, config, ranks)
    return Run(
        config=config,
        ranks=ranks,
        labels=labels,
        objective=objectives.parse(config.objective),
        holdout=holdout,
        held_out=held_out,
        context=context,
        network=network,
        learner=learner,
        optimizer=optimizer.build(network, config),
        max_steps=min(limits, default=None),
    )


def _open_labels(config: TrainConfig) -> Labels:
    if "://" not in config.dataset and not os.path.exists(config.dataset) and (config.out / "config.yaml").exists():
        raise TrainingError(
            f"{config.out} was trained on {config.dataset}, which does not exist: "
            f"pass its new path with lacy train DATASET --out {config.out} --resume"
        )
    return shards.open_labels(config.dataset, config.labels)


def _go(run: Run, stop: Stop, tell: Tell) -> Outcome:
    config, ranks = run.config, run.ranks
    stream = _loader(run)
    progress, saved = Progress(), None
    resumed = checkpoint.newest(config.out)
    if len(set(ranks.gathered(resumed and resumed.name))) > 1:
        raise TrainingError(f"ranks find different checkpoints in {config.out}: all machines must share that folder")
    if resumed:
        progress, loader = checkpoint.restore(resumed, run.network, run.optimizer, ranks)
        stream.load_state_dict(loader)
        saved = progress.step
    saver = log = None
    if ranks.first:
        paths = {"dataset": absolute(config.dataset), "out": config.out.absolute()}
        configuration.save(config.model_copy(update=paths))
        saver = checkpoint.Saver(config, run.network, model.tokenizer_files(run.labels, run.context))
        log = Log(config, progress.step)
    tell("start", _facts(run) | asdict(progress) | {"done": _done(run, progress)})
    clock = _Clock(run, progress)
    held = _held_out(run, tell)
    position: dict[str, Any] | None = None
    try:
        for step in _steps(run, stream):
            counts, ended = _agree(run, step, stop, saver)
            if ended or _done(run, progress) >= 1:
                break
            progress, sums = _step(run, step, counts, progress)
            position = step.position
            last = _done(run, progress) >= 1
            saving = last or progress.step % config.save_every == 0
            if saving or progress.step % config.log_every == 0:
                record = asdict(progress) | _means(run, sums, progress) | {"epoch": step.epoch} | clock.read(progress)
                tell("step", record | {"done": _done(run, progress)})
                if log is not None:
                    log.write(record)
            if held and (last or progress.step % config.eval_every == 0):
                validation = {"step": progress.step} | _validate(run, held)
                tell("valid", validation)
                if log is not None:
                    log.write(validation)
                clock.skip(progress)
            if saving:
                _save(run, saver, progress, step.position)
                saved = progress.step
        if position is not None and saved != progress.step:
            _means(run, sums, progress)  # raises where the loss is not finite, which is not worth saving
            _save(run, saver, progress, position)
        if saver is not None:
            saver.wait()
    finally:
        stream.close()
        if log is not None:
            log.close()
        if saver is not None:
            saver.join()
    ranks.wait()
    return Outcome(progress, stop.signal or None)


def _step(run: Run, step: Step, counts: list[list[int]], progress: Progress) -> tuple[Progress, torch.Tensor]:
    """Update the weights once.

    `counts` are those of `Step`, summed over ranks. Returns the progress, and (5,) float64 on the device: this rank's
    sums, as in `objectives.micro_batch`, and the norm of the gradient.
    """
    config, ranks = run.config, run.ranks
    quotas = [objectives.quota(run.objective, row, config.budget) for row in counts]
    learned = sum(positions - chosen - ignored for (_, positions, ignored), chosen in zip(counts, quotas, strict=True))
    targets = learned + (0 if run.objective.ignore else sum(quotas))
    rate = optimizer.rate(config, model.learning_rate(config), progress.step, _done(run, progress), run.max_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for number, (batch, quota) in enumerate(zip(step.batches, quotas, strict=True)):
        _synchronise(run, number == len(quotas) - 1)
        with _autocast(run):
            loss, sums = objectives.micro_batch(
                run.objective,
                batch,
                partial(run.learner, batch["ids"], batch.get("positions")),
                eos_id=run.labels.eos_id,
                quota=quota,
                weight=ranks.count / max(1, targets),  # wrappers average gradients over ranks
                learn_softmax=config.learn_softmax,
                seed=config.seed,
                first_row=((progress.step * len(quotas) + number) * ranks.count + ranks.rank) * config.batch,
                joined=ranks.joined,
                rank=ranks.rank,
            )
        loss.backward()
        total += sums
    norm = nn.utils.clip_grad_norm_(run.network.parameters(), config.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    progress = Progress(progress.step + 1, progress.tokens + run.tokens_per_step, progress.gt_tokens + learned)
    return progress, torch.cat([total, checkpoint.whole(norm).detach().reshape(1).double()])


def _steps(run: Run, stream: data.Stream) -> Iterator[Step]:
    """Yield steps without end. The data of the next step moves to the device while a step is computed."""
    batches = iter(stream)

    def fetch() -> Step:
        fetched = [next(batches) for _ in range(run.config.accumulate)]
        return Step(
            batches=[{name: _moved(values, run.ranks.device) for name, values in batch.items()} for batch in fetched],
            counts=torch.stack([objectives.count(run.objective, batch, run.labels.eos_id) for batch in fetched]),
            position=stream.state_dict(),
            epoch=stream.epoch,
        )

    ahead = fetch()
    while True:
        now, ahead = ahead, fetch()
        yield now


def _moved(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start the copy to the device."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def _agree(run: Run, step: Step, stop: Stop, saver: checkpoint.Saver | None) -> tuple[list[list[int]], bool]:
    """Sum the counts of the step over all ranks, and find out whether any of them wants to end the run."""
    ends = bool(stop.signal) or (saver is not None and saver.failed)
    totals = run.ranks.total(torch.cat([step.counts.flatten(), torch.tensor([int(ends)])])).tolist()
    return [totals[at : at + 3] for at in range(0, len(totals) - 1, 3)], bool(totals[-1])


def _done(run: Run, progress: Progress) -> float:
    """Share of the run that is done, by the nearest limit."""
    shares = [progress.step / run.max_steps] if run.max_steps else []
    if run.config.gt_tokens:
        shares.append(progress.gt_tokens / run.config.gt_tokens)
    return min(1.0, max(shares))


def _means(run: Run, sums: torch.Tensor, progress: Progress) -> dict[str, Any]:
    """Turn the sums of `_step` into means over the targets of all ranks, in nats. Waits for the device.

    Raises TrainingError when the loss or the gradient is not finite.
    """
    learn, learns, call, calls = run.ranks.total(sums[:4]).tolist()
    norm = float(sums[4])
    loss = (learn + call) / max(1, learns + calls)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainingError(
            f"the loss of step {progress.step} is {loss}, and the norm of its gradient {norm}: "
            f"start a new run from the last checkpoint (--model) with a lower --lr or --clip"
        )
    return {
        "loss": loss,
        "learn_loss": learn / learns if learns else None,
        "call_loss": call / calls if calls else None,
        "called": calls / run.tokens_per_step,
        "lr": run.optimizer.param_groups[0]["lr"],
        "grad_norm": norm,
    }


def _held_out(run: Run, tell: Tell) -> list[Batch]:
    """Load this rank's batches of the held-out documents into host memory."""
    config = run.config
    if not run.holdout:
        return []
    if run.holdout > config.holdout:
        documents = "document is" if run.held_out == 1 else "documents are"
        tell(
            "note",
            {"text": f"--holdout {config.holdout:g} would hold out no document: {run.held_out} {documents} held out"},
        )
    elif run.held_out == 1:
        text = "only one document is held out, and lacy eval delegation needs two: use a larger --holdout"
        tell("note", {"text": text})
    batches = data.held_out(
        run.labels,
        batch=config.batch,
        context=run.context,
        columns={"factual"},
        rank=run.ranks.rank,
        ranks=run.ranks.count,
        holdout=run.holdout,
        positions=config.mask_documents,
        max_tokens=config.eval_tokens,
    )
    try:
        return list(batches)
    except data.NothingHeldOutError as error:
        tell("note", {"text": f"no validation: {error}"})
        return []


def _validate(run: Run, held: list[Batch]) -> dict[str, Any]:
    with _autocast(run):
        validation = evaluate.validate(run.learner, held, run.ranks).model_dump()
    if isinstance(run.learner, FSDPModule):
        run.learner.reshard()  # as a backward pass would have done
    return validation


def _save(run: Run, saver: checkpoint.Saver | None, progress: Progress, position: dict[str, Any]) -> None:
    if saver is not None:
        saver.join()  # so that only one snapshot is in memory at a time
    snapshot = checkpoint.take(progress, position, run.network, run.optimizer, run.ranks)
    if saver is not None:
        saver.start(snapshot)


def _loader(run: Run) -> data.Stream:
    config = run.config
    return data.loader(
        run.labels,
        batch=config.batch,
        context=run.context,
        columns=objectives.columns(run.objective),
        seed=config.seed,
        rank=run.ranks.rank,
        ranks=run.ranks.count,
        workers=config.loader_workers,
        holdout=run.holdout,
        buffer_tokens=config.buffer_tokens,
        positions=config.mask_documents,
    )


def _autocast(run: Run) -> Any:
    sharded = run.ranks.count > 1 and run.config.parallel == "fsdp"  # FSDP casts by itself
    if sharded or model.precision(run.config, run.ranks.device) != "bf16":
        return nullcontext()
    return torch.autocast(run.ranks.device.type, torch.bfloat16)


def _synchronise(run: Run, last: bool) -> None:
    """Exchange gradients once in a step, after its last micro-batch."""
    if isinstance(run.learner, DistributedDataParallel):
        run.learner.require_backward_grad_sync = last
    elif isinstance(run.learner, FSDPModule):
        run.learner.set_requires_gradient_sync(last)


def _facts(run: Run) -> dict[str, Any]:
    config, device = run.config, run.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "parameters": run.network.num_parameters(),
        "objective": config.objective,
        "device": name if run.ranks.count == 1 else f"{run.ranks.count} x {name}",
        "precision": model.precision(config, device),
        "tokens_per_step": run.tokens_per_step,
        "max_steps": run.max_steps,
        "gt_limit": config.gt_tokens,
    }


class _Clock:
    """Measures tokens/s since the last reading without validations, utilisation of the dense bf16 peak, and memory."""

    def __init__(self, run: Run, progress: Progress):
        self._ranks = run.ranks
        self._flops = model.flops_per_token(run.network, run.context)
        self._peak = _peak_flops(run.ranks.device)
        self.skip(progress)

    def skip(self, progress: Progress) -> None:
        self._since, self._tokens = time.perf_counter(), progress.tokens

    def read(self, progress: Progress) -> dict[str, Any]:
        seconds = time.perf_counter() - self._since
        rate = (progress.tokens - self._tokens) / seconds
        self.skip(progress)
        used = self._flops * rate / (self._peak * self._ranks.count) if self._peak else None
        return {"tokens_per_second": rate, "mfu": used, "memory": _memory(self._ranks.device)}


def _memory(device: torch.device) -> int:
    """Peak memory of the GPU or of this process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for word, flops in PEAK_FLOPS.items() if word in name), None)


@contextmanager
def _stoppable() -> Iterator[Stop]:
    """Note SIGTERM and SIGINT, but let a second ctrl-c interrupt: schedulers send SIGTERM twice, people mean it.

    The signals are also unblocked: a fork server started by a loader (`trainer.data`) blocks them in its children.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: Any) -> None:
        stop.signal = number
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, note)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    try:
        yield stop
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(_: str, __: dict[str, Any]) -> None:
    pass
